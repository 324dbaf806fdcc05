"""The Triton backend as a whole: a training run, very large vocabularies, and its benchmark's plan."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

import qtuning_kernels as qk
from qtuning_kernels.kernels.dispatch import unavailable_reason
from tests.training.test_trainer import losses, trainer

from . import truth

ROOT = Path(__file__).parents[2]


@pytest.fixture
def triton(request, monkeypatch):
    """Operators served by Triton, in the interpreter where there is no GPU."""
    if reason := unavailable_reason("triton"):
        pytest.skip(f"backend triton: {reason}")
    from tests.interpreter import speed_up_interpreter

    speed_up_interpreter()
    return lambda name: monkeypatch.setenv("QTUNING_BACKEND", name)


def test_trains_to_the_same_losses_as_the_reference(triton, tmp_path):
    curves = {}
    for backend in ("reference", "triton"):
        triton(backend)
        run = trainer(tmp_path / backend, count=24, max_steps=3, config={"sample_ratio": 0.25, "token_ratio": 0.5})
        run.train()
        curves[backend] = losses(run)
    assert len(curves["triton"]) == 3
    torch.testing.assert_close(torch.tensor(curves["triton"]), torch.tensor(curves["reference"]), rtol=1e-4, atol=1e-4)


# models' vocabularies that the operators' own suite leaves out: Llama 3's and Qwen's are the largest in use
@pytest.mark.parametrize("vocabulary", [49152, 128256, pytest.param(151936, marks=pytest.mark.slow)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_token_stats_of_large_vocabularies(triton, vocabulary, dtype):
    triton("triton")
    logits = (torch.randn(2, vocabulary, dtype=torch.float64) * 3).to(dtype)
    labels = torch.tensor([vocabulary - 1, 0])
    upstream = [torch.tensor([0.7, -0.3], dtype=torch.float64) for _ in range(3)]
    stats = qk.token_stats(logits, labels)
    expected = truth.stats(logits.double(), labels)
    for name, a, s, e in zip(stats._fields, stats, truth.stats(logits.float(), labels), expected, strict=True):
        truth.assert_no_worse(name, a, s, e)
    (actual,) = truth.grads(lambda x: qk.token_stats(x, labels), [logits], upstream)
    (exact,) = truth.grads(lambda x: truth.stats(x, labels), [logits.double()], upstream)
    spacing = torch.finfo(dtype).eps * exact.abs() + 1e-6
    assert ((actual.double() - exact).abs() <= spacing).all()


def test_gpu_benchmark_prints_its_plan():
    command = [sys.executable, "-m", "benchmarks.gpu", "--dry-run", "--rows", "8", "--vocabulary", "64"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "NOT YET RUN" in done.stdout
    assert "token_stats" in done.stdout
