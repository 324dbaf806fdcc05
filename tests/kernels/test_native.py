"""What only the native backend has: its exp2, instruction sets, threads, and its build."""

import json
import os
import subprocess
import sys

import pytest
import torch

from qtuning_kernels.kernels.contract import BackendUnavailableError
from qtuning_kernels.kernels.dispatch import unavailable_reason

if reason := unavailable_reason("native"):
    pytest.skip(f"backend native: {reason}", allow_module_level=True)

from qtuning_kernels.kernels import dispatch, native
from qtuning_kernels.kernels.extension import load_extension

from . import truth

OPS = torch.ops.qtuning_native
SCALING = (-100, 1.0, None)
EXP2_ULP = 1.0  # as csrc/cpu/simd_math.h states, with fused multiply-add
EXP2_ULP_BASELINE = 1.2  # and without


@pytest.fixture
def threads():
    """Sets the number of threads, and puts the old one back."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def exp2_errors(bits: torch.Tensor) -> float:
    """The largest error of exp2, in units in the last place, over the float32 values of these bit patterns that lie in
    [−126, 128): the kernels ask for no others."""
    x = bits.to(torch.int32).view(torch.float32)
    x = x[(x >= -126) & (x < 128)]
    actual, truth = OPS.exp2(x).double(), x.double().exp2()
    ulp = torch.ldexp(torch.ones_like(truth), torch.frexp(truth).exponent - 24)
    return float(((actual - truth).abs() / ulp).max()) if truth.numel() else 0.0


def ulp_bound() -> float:
    return EXP2_ULP_BASELINE if native.instruction_set() == "baseline" else EXP2_ULP


def test_exp2_over_its_whole_range():
    """Every 1009th of the 2³² bit patterns: both signs, subnormals."""
    bits = torch.arange(-(2**31), 2**31, 1009, dtype=torch.int64)
    assert exp2_errors(bits) <= ulp_bound()


@pytest.mark.slow
def test_exp2_of_every_float():
    step = 1 << 24
    assert max(exp2_errors(torch.arange(s, s + step)) for s in range(-(2**31), 2**31, step)) <= ulp_bound()


def run_with(isa: str, *arguments: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "QTUNING_CPU_ISA": isa}
    return subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True)


@pytest.fixture(scope="module")
def accepted() -> list[str]:
    """Instruction sets that this processor runs, best first, as the refusal of a wrong name lists them."""
    done = run_with("mmx", "-c", "from qtuning_kernels.kernels import native; native.instruction_set()")
    assert done.returncode != 0
    refusal = done.stderr.strip().splitlines()[-1]
    assert refusal.startswith("ValueError: QTUNING_CPU_ISA=mmx is not usable here; accepted: ")
    return refusal.split("accepted: ")[1].split(", ")


def test_the_best_instruction_set_is_taken(accepted):
    assert accepted[-1] == "baseline"
    assert native.instruction_set() == os.environ.get("QTUNING_CPU_ISA", accepted[0])


@pytest.mark.parametrize("isa", [pytest.param("baseline", marks=pytest.mark.slow), "avx2", "avx512"])
def test_every_instruction_set_passes_the_suite(accepted, isa):
    """The choice is made once per process, hence a child. float16 and float64 paths included."""
    if isa not in accepted:
        pytest.skip(f"this processor has no {isa}")
    if isa == native.instruction_set():
        pytest.skip(f"{isa} is what this process runs")
    chosen = "its_whole_range or every_block_edge or softcap_of_1000 or no_finite_maximum or common_offset"
    probe = run_with(isa, "-m", "pytest", "-q", "-x", __file__, "-k", chosen)
    assert probe.returncode == 0, probe.stdout[-3000:]
    assert "passed" in probe.stdout


# blocks of 2048 logits and chunks of 16384: each edge, one to either side, and both tails together
EDGES = [1, 2, 15, 16, 17, 2047, 2048, 2049, 16383, 16384, 16385, 18433, 40000]


@pytest.mark.parametrize("softcap", [None, 30.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_matches_float64_at_every_block_edge(dtype, softcap):
    for size in EDGES:
        logits = (4 * torch.randn(2, 3, size)).to(dtype)
        logits[0, 0, 0] = -60000.0
        labels = torch.randint(size, (2, 3))
        scaling = (-100, 1.0, softcap)
        actual = OPS.token_stats(logits, labels, *scaling)
        truth = OPS.token_stats(logits.double(), labels, *scaling)
        z = logits.double() if softcap is None else softcap * torch.tanh(logits.double() / softcap)
        log_p = torch.log_softmax(z, -1)
        entropy = -(log_p.exp() * log_p.clamp(min=-1e4)).sum(-1)
        torch.testing.assert_close(truth[0], -log_p.gather(-1, labels[..., None])[..., 0])
        torch.testing.assert_close(truth[1], entropy, rtol=1e-9, atol=1e-9)
        tolerance = 1e-12 if dtype == torch.float64 else 2e-6 if softcap is None else 6e-6
        for name, a, t in zip(("nll", "entropy", "row_max", "log_sum"), actual, truth, strict=True):
            error = ((a.double() - t).abs() / (1 + t.abs())).max()
            assert error <= tolerance, f"{name} at V={size}: {error:.2g}"


def error_quantiles(actual, expected):
    error = (actual.double() - expected).abs() / expected.abs().clamp(min=1)
    return error.square().mean().sqrt(), error.max()


@pytest.mark.parametrize("center", [0, -1000])
def test_a_softcap_of_1000_is_no_less_accurate_than_pytorch(center):
    """A softcap multiplies the error of tanh: with one of 2 units in the last place the logits 300·randn - 1000 in
    float16, scaled by 2.5 and capped at 1000, have z wrong by 1e-4, and the entropy of rows of 65 a largest error
    of 2.5e-5, where PyTorch's is 2.1e-5. Single rows say little: each error is one rounding of z at 250, large or
    small by chance."""
    generator = torch.Generator().manual_seed(0)
    logits = (300 * torch.randn(1, 20000, 65, generator=generator) + center).half()
    labels = torch.randint(65, (1, 20000), generator=generator)
    scaling = {"logit_scale": 2.5, "softcap": 1000.0}
    nll, entropy, row_max, log_sum = OPS.token_stats(logits, labels, -100, *scaling.values())
    expected = truth.stats(logits.double(), labels, **scaling)
    same = truth.stats(logits.float(), labels, **scaling)
    actual = (nll, entropy, row_max.double() + log_sum.double())
    for name, a, s, e in zip(("nll", "entropy", "lse"), actual, same, expected, strict=True):
        (rms, worst), (torch_rms, torch_worst) = error_quantiles(a, e), error_quantiles(s, e)
        assert rms <= torch_rms, f"{name}: {rms:.3g}, PyTorch's {torch_rms:.3g}"
        assert worst <= torch_worst + 1e-6, f"{name}: {worst:.3g}, PyTorch's {torch_worst:.3g}"


@pytest.mark.parametrize("offset", [1e4, -1e4])
@pytest.mark.parametrize("scaling", [(-100, 1.0, None), (-100, 0.3, None), (-100, -0.3, None)], ids=str)
def test_common_offset_of_statistics_and_gradient(offset, scaling):
    """1e4·log2 e in float32 is wrong by up to 5e-4 bits: a reference that is rounded so, and not made up for, puts
    a factor of 1.0003 on all p of a row."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.round(torch.randn(1, 50, 3000, generator=generator) * 4 * 256) / 256 + offset
    labels = torch.randint(3000, (1, 50), generator=generator)
    upstream = list(torch.randn(3, 1, 50, generator=generator))
    nll, *stats = OPS.token_stats(logits, labels, *scaling)
    grad = OPS.token_stats_backward(logits, labels, *stats, *upstream, *scaling)

    def run(x):
        return truth.stats(x, labels, logit_scale=scaling[1])

    entropy, row_max, log_sum = stats
    for name, a, s, e in zip(
        ("nll", "entropy", "lse"), (nll, entropy, row_max + log_sum), run(logits), run(logits.double()), strict=True
    ):
        truth.assert_no_worse(name, a, s, e)
    (expected,), (same,) = (truth.grads(run, [x], upstream) for x in (logits.double(), logits))
    truth.assert_no_worse("grad", grad, same, expected)


@pytest.mark.parametrize("scaling", [(-100, 1.0, None), (-100, -2.0, None), (-100, 1.0, 30.0)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("size", [3, 5000, 40000])
def test_no_finite_maximum(dtype, size, scaling):
    """The position tells blocks and chunks apart."""
    truth.assert_no_finite_maximum(OPS, dtype, size, scaling)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("rows", "size"), [(1, 100_003), (3, 50_257), (64, 1000)])
def test_bitwise_equal_for_any_number_of_threads(threads, dtype, rows, size):
    """Chunks of a row are fixed and merged in order, whoever computed them."""
    logits, labels = torch.randn(1, rows, size).to(dtype), torch.randint(size, (1, rows))
    grads = [torch.randn(1, rows) for _ in range(3)]
    seen = []
    for count in (1, 2, 3, 7):
        threads(count)
        stats = OPS.token_stats(logits, labels, *SCALING)
        grad = OPS.token_stats_backward(logits, labels, *stats[1:], *grads, *SCALING)
        seen.append((*stats, grad))
    for other in seen[1:]:
        assert all(torch.equal(a, b) for a, b in zip(seen[0], other, strict=True))


def test_rows_beyond_32_bit_offsets():
    """Two rows 2³¹ + 8 elements apart; the memory between them is never touched."""
    size, stride = 1000, 2**31 + 8
    storage = torch.empty(stride + size, dtype=torch.bfloat16)
    logits = storage.as_strided((1, 2, size), (stride + size, stride, 1))
    logits.copy_(torch.randn(1, 2, size))
    labels = torch.randint(size, (1, 2))
    near = logits.contiguous()
    stats = OPS.token_stats(logits, labels, *SCALING)
    assert all(torch.equal(a, b) for a, b in zip(stats, OPS.token_stats(near, labels, *SCALING), strict=True))
    upstream = (torch.ones(1, 2), None, None)
    expected = OPS.token_stats_backward(near, labels, *stats[1:], *upstream, *SCALING)
    OPS.token_stats_backward_(logits, labels, *stats[1:], *upstream, *SCALING)
    assert torch.equal(logits, expected)


@pytest.mark.parametrize("name", dispatch.SCHEMAS)
def test_operators_have_the_schemas_of_the_dispatcher(name):
    """token_stats_backward_ was registered without a schema, and so declared no mutation of the logits."""
    operator = getattr(OPS, name).default
    schema = torch._C.parse_schema(f"qtuning_native::{name}{dispatch.SCHEMAS[name]}")
    assert str(operator._schema) == str(schema)
    assert operator._schema.is_mutable == name.endswith("_")


def test_a_build_that_left_it_out_says_why(tmp_path):
    record = tmp_path / "native_build.json"
    with pytest.raises(BackendUnavailableError, match="never compiled"):
        load_extension("_C", str(record), "a C++ compiler")
    record.write_text(json.dumps({"built": False, "torch": None, "reason": "there was no C++ compiler"}))
    with pytest.raises(BackendUnavailableError, match="there was no C\\+\\+ compiler"):
        load_extension("_C", str(record), "a C++ compiler")


def test_a_build_for_another_torch_is_refused(tmp_path):
    """Loading it would crash on a changed C++ interface, not raise."""
    record = tmp_path / "native_build.json"
    record.write_text(json.dumps({"built": True, "torch": "2.8.0+cpu", "reason": None}))
    with pytest.raises(BackendUnavailableError, match=r"compiled for PyTorch 2\.8\.0"):
        load_extension("_C", str(record), "a C++ compiler")
