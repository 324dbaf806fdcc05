"""Package layout and the native extension; everything declarative is in pyproject.toml.

The extension is left out, with the reason recorded for `qtuning info`, where it cannot be compiled.
``QTUNING_NATIVE=1`` makes that an error instead, ``QTUNING_NATIVE=0`` leaves it out on request.
"""

import json
import os
import shutil
import sys
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

RECORD = Path("qtuning_kernels/native_build.json")  # read by qtuning_kernels/native.py
WANTED = os.environ.get("QTUNING_NATIVE", "")
SANITIZE = (
    ["-fsanitize=address,undefined", "-fno-omit-frame-pointer", "-g"]
    if os.environ.get("QTUNING_SANITIZE")
    else []
)


def why_not() -> str | None:
    """The reason not to build the extension; None if it can be tried."""
    if WANTED == "0":
        return "it was built with QTUNING_NATIVE=0"
    try:
        import torch.utils.cpp_extension  # noqa: F401
    except ImportError:
        return "PyTorch was not there at build time (install with --no-build-isolation)"
    compiler = os.environ.get("CXX", "c++" if sys.platform == "darwin" else "g++")
    if shutil.which(compiler.split()[0]) is None:
        return f"there was no C++ compiler at build time ({compiler!r} not found)"
    return None


def record(built: bool, reason: str | None) -> None:
    torch_version = None
    if built:
        import torch

        torch_version = torch.__version__
    RECORD.write_text(json.dumps({"built": built, "torch": torch_version, "reason": reason}) + "\n")


def extension() -> dict:
    from torch.utils.cpp_extension import BuildExtension, CppExtension

    class Build(BuildExtension):
        def run(self) -> None:
            try:
                super().run()
                record(True, None)
            except Exception as error:
                if WANTED == "1":
                    raise
                record(False, f"its compilation failed: {str(error).splitlines()[0]}")
                print(f"the native extension is left out: {error}", file=sys.stderr)
                self.extensions = []

    # -fopenmp at compile time only: the symbols come from the OpenMP runtime that PyTorch has loaded, since
    # a second one would ignore torch.set_num_threads. No trapping or errno: loops with selects vectorise.
    openmp = [] if sys.platform == "darwin" else ["-fopenmp"]
    compile_args = [
        "-O3",
        *openmp,
        "-fopenmp-simd",
        "-fno-math-errno",
        "-fno-trapping-math",
        "-g0",
        *SANITIZE,
    ]
    native = CppExtension(
        "qtuning_kernels._C",
        sorted(str(path) for path in Path("csrc").rglob("*.cpp")),
        extra_compile_args=compile_args,
        extra_link_args=SANITIZE,
        depends=sorted(str(path) for path in Path("csrc").rglob("*") if path.suffix in {".h", ".inc"}),
    )
    return {"ext_modules": [native], "cmdclass": {"build_ext": Build, "build_py": BuildPyLast}}


class BuildPyLast(build_py):
    """Copies the record of the build, which must be made first."""

    def run(self) -> None:
        self.run_command("build_ext")
        super().run()


reason = why_not()
if reason and WANTED == "1":
    raise SystemExit(f"QTUNING_NATIVE=1, but the native extension cannot be built: {reason}")
if reason:
    record(False, reason)
setup(
    packages=[
        "qtuning_kernels",
        "qtuning_kernels.commands",
        "qtuning_kernels.pruning",
        "qtuning_kernels.report",
        "qtuning_kernels.triton_kernels",
    ],
    # another distribution owns the import name `triton_kernels`, so the folder installs inside the package
    package_dir={"qtuning_kernels.triton_kernels": "triton_kernels"},
    package_data={"qtuning_kernels": [RECORD.name], "qtuning_kernels.report": ["templates/*"]},
    **({} if reason else extension()),
)
