"""Package layout and the two extensions; everything declarative is in pyproject.toml.

``native`` is the C++ backend; ``cuda`` the CUDA C++ backend, which takes a PyTorch with CUDA, and nvcc. Each is left
out, with the reason recorded for `qtuning info`, where it cannot be compiled, as in an isolated build, which has no
PyTorch. ``QTUNING_NATIVE=1`` and ``QTUNING_CUDA=1`` make that an error instead, ``=0`` leaves the extension out on
request. ``TORCH_CUDA_ARCH_LIST`` says for which GPUs the CUDA kernels are compiled.
"""

import json
import os
import re
import shutil
import sys
import tomllib
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

RECORDS: dict[str, dict] = {"native": {}, "cuda": {}}  # what became of each, written as {name}_build.json
WANTED = {name: os.environ.get(f"QTUNING_{name.upper()}", "") for name in RECORDS}
# Ampere, Ada, Hopper, Blackwell, and PTX for what comes after
ARCHITECTURES = "8.0;8.6;8.9;9.0;10.0;12.0+PTX"
ARCHITECTURES_BEFORE_12_8 = "8.0;8.6;8.9;9.0+PTX"  # toolkits that do not know Blackwell
SANITIZE = ["-fsanitize=address,undefined", "-O1"] if os.environ.get("QTUNING_SANITIZE") else []


def why_not(name: str) -> str | None:
    """The reason not to build the extension; None if it can be tried."""
    if WANTED[name] == "0":
        return f"it was built with QTUNING_{name.upper()}=0"
    try:
        import torch.utils.cpp_extension
    except ImportError:
        return "PyTorch was not there at build time"
    compiler = os.environ.get("CXX", "c++")
    if shutil.which(compiler.split()[0]) is None:
        return f"there was no C++ compiler at build time ({compiler!r} not found)"
    if name == "cuda":
        if torch.version.cuda is None:
            return f"PyTorch {torch.__version__} was built without CUDA"
        toolkit = torch.utils.cpp_extension.CUDA_HOME
        if toolkit is None or not (Path(toolkit) / "bin/nvcc").exists():
            return "there was no nvcc at build time (set CUDA_HOME to the folder of the CUDA toolkit)"
    return None


def note(name: str, built: bool, torch_version: str | None, reason: str | None) -> None:
    """What the build writes into the package for `qtuning info`: that the extension is built, or why it is not."""
    RECORDS[name] = {"built": built, "torch": torch_version, "reason": reason}
    if reason:
        print(f"the {name} extension is left out: {reason}", file=sys.stderr)


def native_extension():
    from torch.utils.cpp_extension import CppExtension

    # -fopenmp at compile time only: the symbols come from the OpenMP runtime that PyTorch has loaded, since
    # a second one would ignore torch.set_num_threads. No trapping or errno: loops with selects vectorise.
    openmp = [] if sys.platform == "darwin" else ["-fopenmp"]
    vectorise = ["-fopenmp-simd", "-fno-math-errno", "-fno-trapping-math"]
    return CppExtension(
        "qtuning_kernels._C",
        sorted(str(path) for folder in ("csrc/cpu", "csrc/ops") for path in Path(folder).rglob("*.cpp")),
        extra_compile_args=["-O3", "-g0", *openmp, *vectorise, *SANITIZE],
        extra_link_args=SANITIZE,
        depends=sorted(str(path) for path in Path("csrc").rglob("*") if path.suffix in {".h", ".inc"}),
    )


def cuda_extension():
    import torch
    from torch.utils.cpp_extension import CUDA_HOME, CUDAExtension

    version = tuple(int(part) for part in torch.version.cuda.split(".")[:2])
    default = ARCHITECTURES if version >= (12, 8) else ARCHITECTURES_BEFORE_12_8
    architectures = os.environ.setdefault("TORCH_CUDA_ARCH_LIST", default)
    print(f"the cuda extension is built with {CUDA_HOME}/bin/nvcc for {architectures}", file=sys.stderr)
    return CUDAExtension(
        "qtuning_kernels._cuda",
        ["csrc/cuda_binding.cpp", *sorted(str(path) for path in Path("csrc/cuda").glob("*.cu"))],
        extra_compile_args={"cxx": ["-O2", "-g0"], "nvcc": ["-O3"]},
        depends=sorted(str(path) for path in Path("csrc").rglob("*.*h")),
    )


def readme() -> str:
    """README.md, with addresses that hold on other pages too where the project's metadata have one of its source."""
    project, text = (Path(name).read_text(encoding="utf-8") for name in ("pyproject.toml", "README.md"))
    project = tomllib.loads(project)["project"]
    source = project["urls"].get("Source")
    if source is None:
        return text
    for kind, link in {"raw": r"(!\[[^]]*\]\()", "blob": r"((?<!!)\[[^]]*\]\()"}.items():
        text = re.sub(rf"{link}(?!\w+:|#)", rf"\g<1>{source}/{kind}/v{project['version']}/", text)
    return text


class BuildPyLast(build_py):
    """Writes the records of the build, which must be made first."""

    def run(self) -> None:
        self.run_command("build_ext")
        super().run()
        folder = Path("" if self.editable_mode else self.build_lib, "qtuning_kernels")
        for name, record in RECORDS.items():
            (folder / f"{name}_build.json").write_text(json.dumps(record) + "\n")


def commands() -> dict:
    """The extensions that can be tried, each compiled by itself so that one's failure leaves the other.

    None of them is looked for, and so PyTorch not imported, where nothing is built (an sdist, the metadata).
    """
    modules: dict = {}
    if {"egg_info", "dist_info", "sdist"} & set(sys.argv):
        return {}
    for name, make in {"native": native_extension, "cuda": cuda_extension}.items():
        if reason := why_not(name):
            if WANTED[name] == "1":
                raise SystemExit(f"QTUNING_{name.upper()}=1, but the {name} extension cannot be built: {reason}")
            note(name, False, None, reason)
        else:
            modules[name] = make()
    if not modules:
        return {"cmdclass": {"build_py": BuildPyLast}}
    import torch
    from torch.utils.cpp_extension import BuildExtension

    class Build(BuildExtension):
        def run(self) -> None:
            built = []
            for name, module in modules.items():
                self.extensions = [module]
                try:
                    super().run()
                    note(name, True, torch.__version__, None)
                    built.append(module)
                except Exception as error:
                    if WANTED[name] == "1":
                        raise
                    note(name, False, None, f"its compilation failed: {str(error).splitlines()[0]}")
                    print(error, file=sys.stderr)
            self.extensions = built

    return {"ext_modules": list(modules.values()), "cmdclass": {"build_ext": Build, "build_py": BuildPyLast}}


setup(
    packages=[*find_packages(include=["qtuning_kernels*"]), "qtuning_kernels.triton_kernels"],
    # another distribution owns the import name `triton_kernels`, so the folder installs inside the package
    package_dir={"qtuning_kernels.triton_kernels": "triton_kernels"},
    include_package_data=False,
    package_data={"qtuning_kernels": ["py.typed"], "qtuning_kernels.report": ["templates/*"]},
    long_description=readme(),
    long_description_content_type="text/markdown",
    **commands(),
)
