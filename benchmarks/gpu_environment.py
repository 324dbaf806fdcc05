"""The GPU of this machine, and an environment of its own: the pinned torch for CUDA or ROCm, peers, this package.

Imports nothing but the standard library, since nothing else is there yet.
"""

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
PEERS = ("trl", "liger-kernel", "cut-cross-entropy", "quack-kernels")
ROCM_WHEELS = "https://download.pytorch.org/whl/rocm"  # and the version of ROCm


@dataclass(frozen=True)
class Device:
    """`kind` is "CUDA", "ROCm" or "CPU"; `architecture` is what TORCH_CUDA_ARCH_LIST takes, "" where unknown."""

    kind: str
    name: str
    architecture: str = ""


def find_device() -> Device | None:
    """The first GPU that the driver's own tool names; None if there is none."""
    if found := _first_line("nvidia-smi", "--query-gpu=name,compute_cap", "--format=csv,noheader"):
        name, _, capability = found.rpartition(",")
        return Device("CUDA", name.strip(), capability.strip())
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


def find_nvcc() -> str | None:
    places = [os.environ.get("CUDA_HOME"), "/usr/local/cuda"]
    return shutil.which("nvcc") or next((f"{p}/bin/nvcc" for p in places if p and Path(p, "bin/nvcc").exists()), None)


def commands(device: Device, folder: Path, torch: str, offline: Path | None = None) -> list[tuple[list[str], bool]]:
    """The commands that make the environment in `folder`, and whether one may fail.

    Args:
        torch: requirement, ``torch==VERSION``; no later command may change it.
        offline: a folder of wheels, from which alone everything then comes.
    """
    python = str(folder / "bin/python")
    pins = folder / "pins.txt"
    source = ["--no-index", "--find-links", str(offline)] if offline else []
    wheels = [*source]
    if device.kind == "ROCm" and not offline:
        version = Path("/opt/rocm/.info/version")
        version = ".".join(version.read_text().split(".")[:2]) if version.exists() else ""
        wheels += ["--index-url", f"{ROCM_WHEELS}{version}"]
    install = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    pinned = [*install, *source, "--constraint", str(pins)]
    return [
        ([sys.executable, "-m", "venv", str(folder)], False),
        ([*install, *wheels, torch], False),
        ([python, "-c", f"open({str(pins)!r}, 'w').write({torch!r})"], False),
        ([*pinned, "setuptools>=77", "wheel", "ninja"], False),
        ([*pinned, "--no-build-isolation", "--editable", ".[lora,demo,report,test]"], False),
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
        if nvcc := find_nvcc():
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
