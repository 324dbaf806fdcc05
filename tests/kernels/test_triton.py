"""The Triton backend as a whole: a training run, very large vocabularies, rows without a finite maximum."""

import importlib

import pytest
import torch

import qtuning_kernels as qk
from benchmarks import gpu
from qtuning_kernels.kernels.contract import RowStats, Scaling, Upstream
from qtuning_kernels.kernels.dispatch import unavailable_reason
from tests.interpreter import speed_up_interpreter
from tests.training.test_trainer import losses, trainer

from . import truth


@pytest.fixture
def served_by(monkeypatch):
    """Chooses the backend; Triton runs in the interpreter where there is no GPU."""
    if reason := unavailable_reason("triton"):
        pytest.skip(f"backend triton: {reason}")
    speed_up_interpreter()
    return lambda name: monkeypatch.setenv("QTUNING_BACKEND", name)


def test_trains_to_the_same_losses_as_the_reference(served_by, tmp_path):
    curves = {}
    for backend in ("reference", "triton"):
        served_by(backend)
        run = trainer(tmp_path / backend, count=16, max_steps=2, config={"sample_ratio": 0.25, "token_ratio": 0.5})
        run.train()
        curves[backend] = losses(run)
    assert len(curves["triton"]) == 2
    torch.testing.assert_close(torch.tensor(curves["triton"]), torch.tensor(curves["reference"]), rtol=1e-4, atol=1e-4)


# models' vocabularies that the operators' own suite leaves out: Llama 3's and Qwen's are the largest in use. The
# label's logit is one of them in the first row, and has p > 0.999, a fine-tuned model's usual token, in the second.
@pytest.mark.parametrize("vocabulary", [49152, 128256, pytest.param(151936, marks=pytest.mark.slow)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_token_stats_of_large_vocabularies(served_by, vocabulary, dtype):
    """Every entry of the gradient to a few roundings of the terms that it is the sum of."""
    served_by("triton")
    logits = torch.randn(2, vocabulary, dtype=torch.float64) * 3
    labels = torch.tensor([vocabulary - 1, 0])
    logits[1, 0] = 30
    logits = logits.to(dtype)
    upstream = [torch.tensor([0.7, -0.3], dtype=torch.float64) for _ in range(3)]
    stats = qk.token_stats(logits, labels)
    expected = truth.stats(logits.double(), labels)
    assert expected[0][1] < 1e-3
    for name, a, s, e in zip(stats._fields, stats, truth.stats(logits.float(), labels), expected, strict=True):
        truth.assert_no_worse(name, a, s, e)
    (actual,) = truth.grads(lambda x: qk.token_stats(x, labels), [logits], upstream)
    (exact,) = truth.grads(lambda x: truth.stats(x, labels), [logits.double()], upstream)
    log_p = torch.log_softmax(logits.double(), -1)
    g_nll, g_entropy, g_lse = (g.abs().unsqueeze(-1) for g in upstream)
    terms = log_p.exp() * (g_nll + g_lse + g_entropy * (log_p.abs() + expected[1].unsqueeze(-1)))
    terms = terms.scatter_add(-1, labels.unsqueeze(-1), g_nll)
    spacing = 0 if dtype == torch.float32 else 0.51 * torch.finfo(dtype).eps * exact.abs()
    assert ((actual.double() - exact).abs() <= spacing + 2e-6 * terms + 1e-12).all()


# one block and several, 16-byte vectors of each kind; a softcap, under which an infinite logit is a finite z
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("vocabulary", [1, 7, 4100])
@pytest.mark.parametrize("scaling", [(-100, 1.0, None), (-100, -0.5, None), (-100, 2.0, 5.0)], ids=str)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, in the interpreter
def test_no_finite_maximum(served_by, dtype, vocabulary, scaling):
    served_by("triton")
    truth.assert_no_finite_maximum(torch.ops.qtuning_kernels, dtype, vocabulary, scaling)


def test_token_stats_return_the_contract_tuples(served_by):
    from qtuning_kernels import triton_kernels

    nll, stats = triton_kernels.token_stats(torch.randn(2, 3, 5), torch.zeros(2, 3, dtype=torch.long), -100, Scaling())
    assert isinstance(nll, torch.Tensor)
    assert isinstance(stats, RowStats)


@pytest.mark.parametrize("operator", ["token_stats", "token_stats_backward"])
def test_rows_are_on_the_first_axis_of_the_grid(monkeypatch, operator):
    """The others end at 65,535 blocks, which neither the interpreter nor a smaller test would tell."""
    if reason := unavailable_reason("triton"):
        pytest.skip(f"backend triton: {reason}")
    module = importlib.import_module(f"qtuning_kernels.triton_kernels.{operator}")
    grids = []

    class Recorder:
        def __getitem__(self, grid):
            grids.append(grid)
            return lambda *_, **__: None

    monkeypatch.setattr(module, f"{operator}_kernel", Recorder())
    logits, labels = torch.zeros(2, 65_536, 1), torch.zeros(2, 65_536, dtype=torch.long)
    tokens = torch.zeros(2, 65_536)
    given = (RowStats(*[tokens] * 3), Upstream(tokens)) if operator == "token_stats_backward" else ()
    getattr(module, operator)(logits, labels, *given, -100, Scaling())
    assert grids == [(131_072,)]


def test_gpu_benchmark_prints_its_plan(capsys):
    gpu.main(["--dry-run", "--rows", "8", "--vocabulary", "64", "--hidden", "16"])
    plan = capsys.readouterr().out
    assert "to be timed: copy, at least 0.00 GB" in plan
    for name in ("token_stats", "trl, gradient", "quack-kernels", "linear_cross_entropy, 25%", "head product alone"):
        assert f"to be timed: {name}, at least" in plan
