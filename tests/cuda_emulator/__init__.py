"""The CUDA kernels and their binding, compiled by the host's C++ compiler to run on CPU tensors.

What csrc/cuda says is then executed thread by thread without a GPU: indexing, alignment, masks, reductions, shuffles
and barriers are those of the kernels; only the instructions of `vector.cuh` and the fast exponential are replaced by
their plain C++ meaning.
"""

import hashlib
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from filelock import FileLock

from qtuning_kernels.kernels import dispatch as ops

_ROOT = Path(__file__).parents[2]
_HERE = Path(__file__).parent
# no fused multiply-add where the source does not ask for one: rounded_product() must be what its name says
_FLAGS = ["-std=c++20", "-O1", "-fPIC", "-g0", "-ffp-contract=off", "-Wno-unknown-pragmas", "-DQTUNING_CUDA_EMULATED"]


def why_not() -> str | None:
    """The reason that the emulator cannot be built; None if it can be tried."""
    return None if shutil.which("g++") else "the emulator needs g++"


def library() -> Path:
    """The shared library, compiled if the sources have changed (about half a minute), by one process at a time."""
    (_ROOT / "build").mkdir(exist_ok=True)
    with FileLock(_ROOT / "build/cuda_emulator.lock"):
        return _library()


def _library() -> Path:
    sources = sorted((_ROOT / "csrc/cuda").glob("*.cu")) + [_ROOT / "csrc/cuda_binding.cpp", _HERE / "emulator.cpp"]
    headers = [p for d in ("csrc", "csrc/cuda", "csrc/core", _HERE) for p in sorted((_ROOT / d).glob("*.*h"))]
    text = b"".join(p.read_bytes() for p in (*sources, *headers, Path(__file__))) + torch.__version__.encode()
    target = _ROOT / "build/cuda_emulator" / f"{hashlib.sha256(text).hexdigest()[:16]}.so"
    if target.exists():
        return target
    shutil.rmtree(target.parent, ignore_errors=True)
    target.parent.mkdir(parents=True)

    torch_root = Path(torch.__file__).parent
    includes = [_HERE, torch_root / "include", sysconfig.get_paths()["include"]]

    def compile_one(source: Path) -> Path:
        output = target.with_name(source.name + ".o")
        command = ["g++", *_FLAGS, *(f"-I{path}" for path in includes)]
        subprocess.run([*command, "-x", "c++", "-c", str(source), "-o", str(output)], check=True)
        return output

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compile_one, sources))
    partial = target.with_suffix(".partial")
    link = ["-shared", "-o", str(partial), *map(str, objects), f"-L{torch_root / 'lib'}", "-ltorch_cpu", "-lc10"]
    subprocess.run(["g++", *link], check=True)
    partial.rename(target)
    return target


def serve_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets the backend cuda serve CPU tensors for the rest of the test; skips it where that cannot be."""
    if reason := why_not():
        pytest.skip(f"backend cuda: {reason}")
    monkeypatch.setenv("QTUNING_CUDA_EMULATOR", str(library()))
    if "qtuning_kernels.kernels.cuda" not in sys.modules:
        ops._module.cache_clear()  # another test may have asked, and found no extension
