"""What only the native backend has: its exp, instruction sets, threads, workspaces, and its build."""

import json
import os
import subprocess
import sys
import threading

import pytest
import torch

from qtuning_kernels.kernels.contract import BackendUnavailableError
from qtuning_kernels.kernels.dispatch import unavailable_reason

if reason := unavailable_reason("native"):
    pytest.skip(f"backend native: {reason}", allow_module_level=True)

from benchmarks.common import in_child
from qtuning_kernels.kernels import native

SCALING = (-100, 1.0, None)
EXP_ULP = 1.1  # as csrc/cpu/simd_math.h states, with fused multiply-add
EXP_ULP_BASELINE = 1.5  # and without


@pytest.fixture
def threads():
    """Sets the number of threads, and puts the old one back."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def exp_errors(bits: torch.Tensor) -> float:
    """The largest error of exp, in units in the last place, over float32 values of these bit patterns."""
    x = bits.to(torch.int32).view(torch.float32)
    actual = native.vector_exp(x)
    truth = x.double().exp()
    smallest, largest = torch.finfo(torch.float32).tiny, torch.finfo(torch.float32).max
    assert torch.equal(actual.isnan(), x.isnan())
    assert (actual[truth < smallest * (1 - 1e-6)] == 0).all(), "a subnormal result must be 0"
    assert (actual[truth > largest * (1 + 1e-6)] == torch.inf).all()
    normal = (truth >= smallest * (1 + 1e-6)) & (truth <= largest * (1 - 1e-6))
    truth, actual = truth[normal], actual[normal].double()
    ulp = torch.ldexp(torch.ones_like(truth), torch.frexp(truth).exponent - 24)
    return float(((actual - truth).abs() / ulp).max()) if truth.numel() else 0.0


def ulp_bound() -> float:
    return EXP_ULP_BASELINE if native.instruction_set() == "baseline" else EXP_ULP


def test_exp_over_the_whole_float_range():
    """Every 1009th of the 2³² bit patterns: both signs, subnormals, infinities and NaN."""
    bits = torch.arange(-(2**31), 2**31, 1009, dtype=torch.int64)
    assert exp_errors(bits) <= ulp_bound()


@pytest.mark.slow
def test_exp_of_every_float():
    step = 1 << 24
    assert max(exp_errors(torch.arange(s, s + step)) for s in range(-(2**31), 2**31, step)) <= ulp_bound()


def run_with(isa: str, *arguments: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "QTUNING_CPU_ISA": isa}
    return subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True)


def accepted_instruction_sets() -> list[str]:
    """Those that this processor runs, best first; the error message of a wrong name lists them."""
    probe = "from qtuning_kernels import native; native.instruction_set()"
    return run_with("none", "-c", probe).stderr.strip().splitlines()[-1].split("accepted: ")[1].split(", ")


def test_an_unknown_instruction_set_is_refused():
    done = run_with("mmx", "-c", "from qtuning_kernels import native; native.instruction_set()")
    assert done.returncode != 0
    assert "ValueError: QTUNING_CPU_ISA=mmx is not usable here; accepted: " in done.stderr
    assert "baseline" in accepted_instruction_sets()


@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])
def test_every_instruction_set_passes_the_suite(isa):
    """The choice is made once per process, hence a child. float16 and float64 paths included."""
    if isa not in accepted_instruction_sets():
        pytest.skip(f"this processor has no {isa}")
    chosen = "test_exp_over_the_whole_float_range or test_matches_float64_at_every_block_edge or no_less_accurate"
    probe = run_with(isa, "-m", "pytest", "-q", "-x", "tests/test_native.py", "tests/test_attention.py", "-k", chosen)
    assert probe.returncode == 0, probe.stdout[-3000:]
    assert "passed" in probe.stdout


# blocks of 2048 logits and segments of 16384: each edge, one to either side, and both tails together
EDGES = [1, 2, 15, 16, 17, 2047, 2048, 2049, 16383, 16384, 16385, 18433, 40000]


@pytest.mark.parametrize("softcap", [None, 30.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_matches_float64_at_every_block_edge(dtype, softcap):
    for size in EDGES:
        logits = (4 * torch.randn(2, 3, size)).to(dtype)
        logits[0, 0, 0] = -60000.0
        labels = torch.randint(size, (2, 3))
        scaling = (-100, 1.0, softcap)
        actual = native.token_stats(logits, labels, *scaling)
        truth = native.token_stats(logits.double(), labels, *scaling)
        z = logits.double() if softcap is None else softcap * torch.tanh(logits.double() / softcap)
        log_p = torch.log_softmax(z, -1)
        entropy = -(log_p.exp() * log_p.clamp(min=-1e4)).sum(-1)
        torch.testing.assert_close(truth[0], -log_p.gather(-1, labels[..., None])[..., 0])
        torch.testing.assert_close(truth[1], entropy, rtol=1e-9, atol=1e-9)
        tolerance = 1e-12 if dtype == torch.float64 else 2e-6 if softcap is None else 6e-6
        for name, a, t in zip(("nll", "entropy", "row_max", "log_sum"), actual, truth, strict=True):
            error = ((a.double() - t).abs() / (1 + t.abs())).max()
            assert error <= tolerance, f"{name} at V={size}: {error:.2g}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("rows", "size"), [(1, 100_003), (3, 50_257), (64, 1000)])
def test_bitwise_equal_for_any_number_of_threads(threads, dtype, rows, size):
    """Pieces of a row are fixed and merged in order, whoever computed them; so with the tiles of the head."""
    logits, labels = torch.randn(1, rows, size).to(dtype), torch.randint(size, (1, rows))
    hidden, weight = torch.randn(rows, 32).to(dtype), torch.randn(size, 32).to(dtype)
    grads = [torch.randn(1, rows) for _ in range(3)]
    seen = []
    for count in (1, 2, 3, 7):
        threads(count)
        stats = native.token_stats(logits, labels, *SCALING)
        grad = native.token_stats_backward(logits, labels, *stats[1:], *grads, *SCALING)
        seen.append((*stats, grad, *native.linear_token_stats(hidden, weight, None, labels[0], *SCALING)))
    for other in seen[1:]:
        assert all(torch.equal(a, b) for a, b in zip(seen[0], other, strict=True))


def test_training_the_head_is_deterministic():
    hidden, weight = torch.randn(700, 24).bfloat16(), torch.randn(60_000, 24).bfloat16()
    labels = torch.randint(60_000, (700,))
    run = lambda: native.linear_cross_entropy(hidden, weight, None, labels, None, *SCALING, [True] * 3)  # noqa: E731
    assert all(torch.equal(a, b) for a, b in zip(run(), run(), strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_head_in_several_chunks(dtype):
    """More rows than one chunk of 48 MiB holds, with gaps: the sums over chunks must be float32."""
    size, rows, width = 60_000, 1100, 24
    hidden, weight = torch.randn(rows, width).to(dtype), (0.3 * torch.randn(size, width)).to(dtype)
    labels, token_weight = torch.randint(size, (rows,)), torch.rand(rows)
    token_weight[::7] = 0
    needs = [True, True, False]
    actual = native.linear_cross_entropy(hidden, weight, None, labels, token_weight, *SCALING, needs)
    h, w = (x.double().requires_grad_() for x in (hidden, weight))
    nll = torch.nn.functional.cross_entropy(h @ w.T, labels, reduction="none")
    truth = (token_weight * nll).sum()
    grads = torch.autograd.grad(truth, (h, w))
    hh, ww = (x.clone().requires_grad_() for x in (hidden, weight))
    same = (token_weight * torch.nn.functional.cross_entropy(hh @ ww.T, labels, reduction="none")).sum()
    torch_grads = torch.autograd.grad(same, (hh, ww))
    for a, t, p in zip(actual[1:3], grads, torch_grads, strict=True):
        ours, theirs = (a.double() - t).norm() / t.norm(), (p.double() - t).norm() / t.norm()
        assert ours <= theirs + 1e-6
    assert (actual[0].double() - truth.detach()).abs() <= 1e-3 * truth.detach()


def test_workspaces_are_reused():
    hidden, weight, labels = torch.randn(300, 16), torch.randn(5000, 16), torch.randint(5000, (300,))

    def run():
        native.linear_token_stats(hidden, weight, None, labels, *SCALING)
        native.linear_cross_entropy(hidden, weight, None, labels, None, *SCALING, [True, True, False])
        return native.workspace_bytes_held()

    run()
    held = run()
    assert held > 0
    assert {run() for _ in range(5)} == {held}


def test_concurrent_callers_do_not_share_a_workspace():
    hidden, weight = torch.randn(8, 200, 16), torch.randn(3000, 16)
    labels = torch.randint(3000, (8, 200))
    alone = [native.linear_token_stats(h, weight, None, y, *SCALING) for h, y in zip(hidden, labels, strict=True)]
    together = [None] * 8

    def work(i):
        for _ in range(5):
            together[i] = native.linear_token_stats(hidden[i], weight, None, labels[i], *SCALING)

    workers = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    for a, b in zip(alone, together, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_head_statistics_fit_64_mib():
    """The logits of this call would take 3 GiB."""
    shape = ["--peak", "linear_stats", "native", "16384", "16", "49152", "float32"]
    assert float(in_child("benchmarks.kernels", shape)) <= 64


def test_rows_beyond_32_bit_offsets():
    """Two rows 2³¹ + 8 elements apart; the memory between them is never touched."""
    size, stride = 1000, 2**31 + 8
    storage = torch.empty(stride + size, dtype=torch.bfloat16)
    logits = storage.as_strided((1, 2, size), (stride + size, stride, 1))
    logits.copy_(torch.randn(1, 2, size))
    labels = torch.randint(size, (1, 2))
    near = logits.contiguous()
    stats = native.token_stats(logits, labels, *SCALING)
    assert all(torch.equal(a, b) for a, b in zip(stats, native.token_stats(near, labels, *SCALING), strict=True))
    upstream = (torch.ones(1, 2), None, None)
    expected = native.token_stats_backward(near, labels, *stats[1:], *upstream, *SCALING)
    native.token_stats_backward_(logits, labels, *stats[1:], *upstream, *SCALING)
    assert torch.equal(logits, expected)


def test_a_build_that_left_it_out_says_why(tmp_path, monkeypatch):
    record = tmp_path / "native_build.json"
    monkeypatch.setattr(native, "_RECORD", record)
    with pytest.raises(BackendUnavailableError, match="never compiled"):
        native._load()
    record.write_text(json.dumps({"built": False, "torch": None, "reason": "there was no C++ compiler"}))
    with pytest.raises(BackendUnavailableError, match="there was no C\\+\\+ compiler"):
        native._load()


def test_a_build_for_another_torch_is_refused(tmp_path, monkeypatch):
    """Loading it would crash on a changed C++ interface, not raise."""
    record = tmp_path / "native_build.json"
    record.write_text(json.dumps({"built": True, "torch": "2.8.0+cpu", "reason": None}))
    monkeypatch.setattr(native, "_RECORD", record)
    with pytest.raises(BackendUnavailableError, match=r"compiled for PyTorch 2\.8\.0"):
        native._load()
