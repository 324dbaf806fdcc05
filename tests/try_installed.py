"""Run by `make dist` with the Python of an environment that has the package installed, away from its sources."""

import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import torch

import qtuning_kernels as qk


def statistics(backend: str) -> list[torch.Tensor]:
    """nll, entropy, lse and the logits' gradient in float64, as one backend gives them."""
    os.environ["QTUNING_BACKEND"] = backend
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(64, 5003, dtype=torch.float64, generator=generator).requires_grad_()
    stats = qk.token_stats(logits, torch.randint(0, 5003, (64,), generator=generator))
    (stats.nll + 0.5 * stats.entropy).sum().backward()
    return [stats.nll, stats.entropy, stats.lse, logits.grad]


def run(*command: str) -> str:
    return subprocess.run(
        [Path(sys.prefix, "bin/qtuning"), *command], check=True, capture_output=True, text=True
    ).stdout


package = Path(qk.__file__).resolve().parent
assert package.is_relative_to(Path(sys.prefix).resolve()), f"{package} is not in {sys.prefix}"
for file in ("py.typed", "report/templates/report.html", "triton_kernels/token_stats.py"):
    assert (package / file).exists(), file
assert qk.backend("cpu") == "native", qk.backend("cpu")
for native, reference in zip(statistics("native"), statistics("reference"), strict=True):
    torch.testing.assert_close(native, reference, rtol=1e-12, atol=1e-15)
del os.environ["QTUNING_BACKEND"]
version = run("--version").strip()
assert version == f"qtuning-kernels {metadata.version('qtuning-kernels')}", version
assert "served by native" in run("info")
print(f"{version} in {package}: the native kernels agree with the reference")
