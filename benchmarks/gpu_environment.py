"""The GPU of this machine, and an environment of its own: the pinned torch for CUDA or ROCm, peers, this package.

Imports nothing but the standard library, since nothing else is there yet.
"""

import importlib.util
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
PEERS = ("trl", "liger-kernel", "cut-cross-entropy", "quack-kernels")
# of the extra "test" what the parts need: the rest takes minutes, and deepspeed is compiled
TESTS = ("pytest>=8", "pytest-timeout>=2.3", "pytest-xdist>=3.6", "hypothesis>=6.100")
WHEELS = "https://download.pytorch.org/whl/"  # and "cu126", or "rocm" and the version of ROCm
CUDA_13_DRIVER = 580  # the first that runs PyPI's torch, which is built for CUDA 13


@dataclass(frozen=True)
class Device:
    """`kind` is "CUDA", "ROCm" or "CPU"; `architecture` is what TORCH_CUDA_ARCH_LIST takes, "" where unknown.

    `driver` is the first number of NVIDIA's driver, 0 where unknown.
    """

    kind: str
    name: str
    architecture: str = ""
    driver: int = 0


def find_device() -> Device | None:
    """The first GPU that the driver's own tool names; None if there is none."""
    if found := _first_line("nvidia-smi", "--query-gpu=name,compute_cap,driver_version", "--format=csv,noheader"):
        name, capability, driver = (field.strip() for field in found.rsplit(",", 2))
        major = driver.partition(".")[0]
        return Device("CUDA", name, capability, int(major) if major.isdigit() else 0)
    agents = _output("rocminfo").split("Agent ")
    for agent in agents:
        fields = dict(line.strip().split(":", 1) for line in agent.splitlines() if ":" in line)
        if fields.get("Device Type", "").strip() == "GPU":
            return Device("ROCm", fields.get("Marketing Name", fields.get("Name", "")).strip())
    return None


def _output(*command: str) -> str:
    if shutil.which(command[0]) is None:
        return ""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return "" if done.returncode else done.stdout


def _first_line(*command: str) -> str:
    return next(iter(_output(*command).strip().splitlines()), "")


def find_tool(name: str) -> str | None:
    """A program of CUDA's toolkit, which is often not on the path."""
    places = [f"{home}/bin/{name}" for home in (os.environ.get("CUDA_HOME"), "/usr/local/cuda") if home]
    return shutil.which(name) or next((place for place in places if Path(place).exists()), None)


def commands(device: Device, folder: Path, torch: str, offline: Path | None = None) -> list[tuple[list[str], bool]]:
    """The commands that make the environment in `folder`, and whether one may fail.

    Args:
        torch: requirement, ``torch==VERSION``, or "here" for the torch and all other packages of the Python that runs
            this; no later command may change it.
        offline: a folder of wheels, from which alone everything then comes.
    """
    python = str(folder / "bin/python")
    pins = folder / "pins.txt"
    source = ["--no-index", "--find-links", str(offline)] if offline else []
    wheels = [*source]
    if device.kind == "ROCm" and not offline:
        version = Path("/opt/rocm/.info/version")
        version = ".".join(version.read_text().split(".")[:2]) if version.exists() else ""
        wheels += ["--index-url", f"{WHEELS}rocm{version}"]
    elif 0 < device.driver < CUDA_13_DRIVER and not offline:
        wheels += ["--index-url", f"{WHEELS}cu126"]
    has_pip = importlib.util.find_spec("ensurepip") is not None  # Debian's Python has it in a package of its own
    pip = [python, "-m", "pip"] if has_pip else [sys.executable, "-m", "pip", "--python", python]
    install = [*pip, "install", "--quiet", "--disable-pip-version-check"]
    pinned = [*install, *source, "--constraint", str(pins)]
    torch_comes = [*install, *wheels, torch]
    if torch == "here":  # not --system-site-packages, which would be those below a virtual environment
        seen = "\n".join(path for path in sys.path if path.endswith(("site-packages", "dist-packages")))
        code = f"import site; open(site.getsitepackages()[0] + '/here.pth', 'w').write({seen!r})"
        torch_comes = [python, "-c", code]
    works = f"import torch; torch.zeros(1, device='cuda'); v = torch.__version__; open({str(pins)!r}, 'w')"
    return [
        ([sys.executable, "-m", "venv", *([] if has_pip else ["--without-pip"]), str(folder)], False),
        (torch_comes, False),
        ([python, "-c", f"{works}.write('torch==' + v.partition('+')[0])"], False),
        ([*pinned, "setuptools>=77", "wheel", "ninja", *TESTS], False),
        ([*pinned, "--no-build-isolation", "--editable", ".[lora,demo]"], False),
        *(([*pinned, "--upgrade", peer], True) for peer in PEERS),
        ([str(folder / "bin/qtuning"), "fetch"], True),  # the embedded model
    ]


def make(device: Device, folder: Path, torch: str, offline: Path | None = None) -> None:
    """Run those commands, each told before it runs; the extensions are built for this GPU alone, if there is nvcc.

    Raises:
        subprocess.CalledProcessError: one that may not fail did.
    """
    environ = os.environ | ({"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(offline)} if offline else {})
    if device.kind == "CUDA":
        environ.setdefault("TORCH_CUDA_ARCH_LIST", device.architecture)
        if nvcc := find_tool("nvcc"):
            environ.setdefault("CUDA_HOME", str(Path(nvcc).resolve().parents[1]))
    for command, may_fail in commands(device, folder, torch, offline):
        print("$", " ".join(command), flush=True)
        done = subprocess.run(command, cwd=ROOT, env=environ, check=not may_fail)
        if done.returncode:
            print(f"failed with {done.returncode}, and is left out", flush=True)


if __name__ == "__main__":  # FOLDER TORCH [WHEELS]
    found = find_device()
    if found is None:
        sys.exit("no GPU is here")
    make(found, Path(sys.argv[1]), sys.argv[2], *map(Path, sys.argv[3:]))
