"""Compiles the CUDA C++ kernels for GPUs that are not there, and names those that stand in the table."""

import hashlib
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from benchmarks.machine_code import Kernel, read_cubin

ROOT = Path(__file__).parent.parent
SOURCES = sorted((ROOT / "csrc/cuda").glob("*.cu"))
_HEADERS = sorted(p for folder in ("csrc/cuda", "csrc/core") for p in (ROOT / folder).glob("*.*h"))
ARCHITECTURES = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120")  # of setup.py's default
_FLAGS = ("-std=c++17", "-O3", "-Werror", "all-warnings", "-Xcompiler", "-Wall,-Wextra")
THREADS = {"combine": 32}  # per block, at most; 256 where nothing is said
_DTYPES = {"8bfloat16": "bfloat16", "7float16": "float16", "f": "float32", "d": "float64"}
FORMS = ("linear", "negated", "softcap")  # of csrc/cuda/scaling.cuh


def nvcc() -> str | None:
    """The compiler of the CUDA toolkit, if there is one."""
    home = os.environ.get("CUDA_HOME")
    return shutil.which("nvcc", path=f"{home}/bin") if home else shutil.which("nvcc")


def nvcc_version() -> str:
    said = subprocess.run([nvcc(), "--version"], capture_output=True, text=True, check=True).stdout
    return re.search(r"release ([\d.]+)", said).group(1)


def compile_source(source: Path, arch: str) -> bytes:
    """The cubin of one file, from the cache in build/ if nothing has changed. A warning is an error.

    Raises:
        RuntimeError: nvcc refused; the message is nvcc's.
    """
    text = b"".join(p.read_bytes() for p in (source, *_HEADERS)) + " ".join((arch, *_FLAGS)).encode()
    target = ROOT / "build/cuda_static" / f"{source.stem}-{arch}-{hashlib.sha256(text).hexdigest()[:16]}.cubin"
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_suffix(f".{os.getpid()}.partial")
        command = [nvcc(), *_FLAGS, f"-arch={arch}", "-cubin", "-o", str(partial), str(source)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{source.name} for {arch}:\n{done.stdout}{done.stderr}")
        for older in target.parent.glob(f"{source.stem}-{arch}-*.cubin"):
            older.unlink(missing_ok=True)
        partial.rename(target)
    return target.read_bytes()


def describe(symbol: str) -> dict[str, object]:
    """A kernel's operator and template arguments, from its mangled name."""
    operator, arguments = re.match(r"_ZN2qt\d+(\w+?)_kernel(?:I(.*?)EEv)?", symbol).groups()
    arguments = arguments or ""
    dtype = next((name for key, name in _DTYPES.items() if re.match(rf"(?:NS_)?{key}", arguments)), None)
    form = re.search(r"FormE(\d)E", arguments + "E")
    flags = [flag == "1" for flag in re.findall(r"Lb([01])", arguments)]
    return {
        "operator": operator,
        "dtype": dtype,
        "form": FORMS[int(form.group(1))] if form else None,
        "has_entropy": flags[0] if flags else None,
        "same_lead": flags[1] if flags else None,
    }


def compile_all(arch: str) -> list[tuple[dict[str, object], Kernel]]:
    """Every kernel for `arch`, described."""
    with ThreadPoolExecutor(2) as pool:
        cubins = list(pool.map(lambda source: compile_source(source, arch), SOURCES))
    kernels = []
    for cubin in cubins:
        for kernel in read_cubin(cubin, arch, 256):
            description = describe(kernel.name)
            kernel.threads = THREADS.get(description["operator"], 256)
            kernels.append((description, kernel))
    return kernels


def table(arch: str) -> Iterator[tuple[str, Kernel]]:
    """What stands in the table, by name: the kernels for bfloat16 logits without a softcap."""
    for what, kernel in compile_all(arch):
        name = what["operator"]
        if (what["dtype"], what["form"]) != ("bfloat16", "linear"):
            continue
        if what["has_entropy"] is not None:
            name += ", all" if what["has_entropy"] else ", nll"
            name += "" if what["same_lead"] else ", other alignment"
        yield name, kernel
