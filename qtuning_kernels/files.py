"""Files that are whole or not there, and that are never the input they were made from."""

import importlib.util
import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def write_atomic(path: Path) -> Iterator[Path]:
    """A temporary path beside `path`, made if missing, for the block to write to.

    When the block ends, the file is synced to the disk and renamed to `path`. When it raises, the file is removed and
    `path` is as it was.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        _ordinary(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def refuse_overwrite(output: Path, inputs: Iterable[str | Path]) -> None:
    """Raise if `output` is one of the input files, or a file of an input folder, under whatever name.

    Args:
        output: the file to be written.
        inputs: files and folders; what is neither, such as a name on a hub, is passed over.

    Raises:
        FileExistsError: `output` is an input; symbolic and hard links are followed.
        IsADirectoryError: `output` is a folder.
        OSError: its folder, made if missing, cannot be written to.
    """
    if output.is_dir():
        raise IsADirectoryError(f"output {str(output)!r} is a folder; accepted: the name of a file")
    output.parent.mkdir(parents=True, exist_ok=True)
    if not os.access(output.parent, os.W_OK):
        raise PermissionError(f"output {str(output)!r}: its folder cannot be written to")
    if not output.exists():
        return
    for given in (Path(each).expanduser() for each in inputs):
        if any(file.is_file() and file.samefile(output) for file in (given, *given.rglob("*"))):
            raise FileExistsError(f"output {str(output)!r} is a file of the input {str(given)!r}; give another output")


def share(folder: Path) -> None:
    """Give files of a folder the permissions of any new file."""
    for file in folder.iterdir() if folder.is_dir() else ():  # a sharded state is written elsewhere
        if file.is_file():
            _ordinary(file)


def _ordinary(file: Path) -> None:
    """Safetensors writes for a file's owner alone."""
    os.umask(umask := os.umask(0))
    file.chmod(0o666 & ~umask)


def require(what: str, extra: str, *modules: str) -> None:
    """Raise ModuleNotFoundError, with what to type, unless the modules of an extra are installed."""
    for name in modules:
        if importlib.util.find_spec(name) is None:
            command = f"{sys.executable} -m pip install 'qtuning-kernels[{extra}]'"
            raise ModuleNotFoundError(f"{what} needs {name}: {command}", name=name)
