"""The Triton kernels as a package of the Hugging Face `kernels` library, in build/hub_kernel (`make hub-kernel`).

A project of its kernel-builder: this folder, and under torch-ext/ the package's own sources with relative imports; and
what that builds of Python alone: a folder per backend under build/, with the metadata that the library reads.
"""

import base64
import hashlib
import json
import re
import shutil
import tomllib
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
OUTPUT = ROOT / "build/hub_kernel"
MODULE = "qtuning_kernels"
SOURCES = ("arguments.py", "kernels/__init__.py", "kernels/contract.py", "kernels/functional.py")


def relative(text: str, depth: int) -> str:
    """A source with its imports of the package relative, `depth` folders below the package's own."""
    return re.sub(rf"^(\s*from ){MODULE}\.", rf"\1{'.' * (depth + 1)}", text, flags=re.MULTILINE)


def make(output: Path = OUTPUT) -> Path:
    """Write the project anew, and return its folder."""
    shutil.rmtree(output, ignore_errors=True)
    shutil.copytree(HERE, output, ignore=shutil.ignore_patterns("make.py", "__pycache__"))
    shutil.copy(ROOT / "LICENSE", output)
    package = output / "torch-ext" / MODULE
    triton = {path: f"triton_kernels/{path.name}" for path in sorted((ROOT / "triton_kernels").glob("*.py"))}
    for source, name in {ROOT / MODULE / name: name for name in SOURCES}.items() | triton.items():
        (package / name).parent.mkdir(exist_ok=True)
        (package / name).write_text(relative(source.read_text(), name.count("/")))
    general = tomllib.loads((output / "build.toml").read_text())["general"]
    names = sorted(path.relative_to(package).as_posix() for path in package.rglob("*.py"))
    digests = {name: hashlib.sha256((package / name).read_bytes()).digest() for name in names}
    unique = hashlib.sha256(b"".join(digests.values())).hexdigest()[:7]
    files = {name: base64.b64encode(value).decode() for name, value in digests.items()}
    for backend in general["backends"]:
        built = output / "build" / f"torch-{backend}"
        shutil.copytree(package, built)
        metadata = {key: general[key] for key in ("name", "version", "license")} | {
            "id": f"_{MODULE}_{backend}_{unique}",
            "python-depends": [],
            "backend": {"type": backend},
            "digest": {"algorithm": "sha256", "files": files},
        }
        (built / "metadata.json").write_text(json.dumps(metadata, indent=2) + "\n")
    shutil.copy(HERE / "CARD.md", output / "build")
    return output


if __name__ == "__main__":
    print(make())
