"""The native backend's causal attention: against float64, no less accurate than PyTorch's, and causal."""

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from qtuning_kernels.kernels.dispatch import unavailable_reason

if reason := unavailable_reason("native"):
    pytest.skip(f"backend native: {reason}", allow_module_level=True)

import qtuning_kernels.kernels.native  # noqa: F401  registers the operators

attention = torch.ops.qtuning_native.causal_attention
attention_backward = torch.ops.qtuning_native.causal_attention_backward

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# of the largest value of a result: that much more than PyTorch's error. In low precision it is less than what rounding
# the result costs
EPSILON = {torch.float32: 2.0**-22, torch.bfloat16: 2.0**-10, torch.float16: 2.0**-13}

# (B, heads, key heads, L, D): one token; lengths around blocks of 4 and 8 queries and of 48 keys; sums of keys'
# gradients over more blocks than one chain holds; every remainder of D by two vectors
SHAPES = [
    (1, 1, 1, 1, 16),
    (2, 3, 1, 7, 32),
    (1, 2, 1, 11, 5),
    (1, 4, 2, 8, 48),
    (2, 2, 2, 49, 64),
    (1, 9, 3, 97, 64),
    (3, 2, 1, 144, 72),
    (1, 3, 1, 523, 16),
    (1, 2, 2, 65, 128),
]


def operands(shape, dtype, dense=False):
    """query, key, value and the upstream gradient, laid out as the layers around attention give them."""
    b, heads, key_heads, length, dim = shape
    torch.manual_seed(0)
    made = [torch.randn(b, length, n, dim).to(dtype).transpose(1, 2) for n in (heads, key_heads, key_heads, heads)]
    return [t.contiguous() for t in made] if dense else made


def by_pytorch(query, key, value, grad, scale=None):
    leaves = [t.detach().requires_grad_() for t in (query, key, value)]
    out = scaled_dot_product_attention(*leaves, is_causal=True, scale=scale, enable_gqa=True)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad)]


def ours(query, key, value, grad, scale=None):
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    return [attention(query, key, value, scale), *attention_backward(grad, query, key, value, scale)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dense", [False, True])
def test_no_less_accurate_than_pytorch(shape, dtype, dense):
    inputs = operands(shape, dtype, dense)
    truth = by_pytorch(*(t.double() for t in inputs))
    for name, got, torch_got, want in zip(
        ("out", "query", "key", "value"), ours(*inputs), by_pytorch(*inputs), truth, strict=True
    ):
        assert got.dtype == dtype
        assert got.shape == want.shape
        error, torch_error = ((t.double() - want).abs().max().item() for t in (got, torch_got))
        assert error <= torch_error + EPSILON[dtype] * want.abs().max().item(), name


def test_scale():
    inputs = operands((1, 2, 1, 20, 32), torch.float32)
    for got, want in zip(ours(*inputs, scale=0.7), by_pytorch(*(t.double() for t in inputs), scale=0.7), strict=True):
        torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("magnitude", [1e4, 1e18])
def test_large_scores_do_not_overflow(magnitude):
    """One key takes it all; its neighbours' e^(s - max) underflow."""
    query, key, value, grad = operands((1, 2, 1, 50, 16), torch.float32)
    found = ours(magnitude * query, key, value, grad)
    want = by_pytorch(magnitude * query.double(), key.double(), value.double(), grad.double())
    torch.testing.assert_close(found[0].double(), want[0], rtol=1e-4, atol=1e-4)
    assert all(t.isfinite().all() for t in found)


def test_no_token_sees_a_later_one():
    query, key, value, grad = operands((1, 2, 1, 60, 32), torch.float32)
    before = attention(query, key, value, 0.2)
    for tensor in (query, key, value):
        tensor[:, :, 37:] = torch.randn_like(tensor[:, :, 37:])
    assert torch.equal(attention(query, key, value, 0.2)[:, :, :37], before[:, :, :37])
    grad[:, :, :37] = 0
    of_query, of_key, of_value = attention_backward(grad, query, key, value, 0.2)
    assert (of_query[:, :, :37] == 0).all()
    assert all(t[:, :, :37].abs().sum() > 0 for t in (of_key, of_value)), "later queries see earlier keys"
    grad[:, :, 37:] = 0
    grad[:, :, 20] = 1
    _, of_key, of_value = attention_backward(grad, query, key, value, 0.2)
    assert all((t[:, :, 21:] == 0).all() for t in (of_key, of_value))


def test_nan_is_not_lost():
    query, key, value, grad = operands((1, 1, 1, 40, 16), torch.float32)
    key[:, :, 25] = torch.nan
    out = attention(query, key, value, 0.25)
    assert out[:, :, 25:].isnan().all()
    assert not out[:, :, :25].isnan().any()
    assert all(t.isnan().any() for t in attention_backward(grad, query, key, value, 0.25))


def test_same_bits_for_any_number_of_threads():
    inputs = operands((3, 6, 2, 130, 32), torch.float32)
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(ours(*inputs))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda q, k, v: (q[0], k, v), r"query, key and value have shapes \[2, 20, 32\].*accepted: \[B, heads, L, D\]"),
        (lambda q, k, v: (q, k[:, :, :9], v[:, :, :9]), "accepted: one shape but for the heads"),
        (lambda q, k, v: (q[:, :1], k.repeat(1, 2, 1, 1), v.repeat(1, 2, 1, 1)), "of which query has a multiple"),
        (lambda q, k, v: (q.double(), k.double(), v.double()), "query has dtype float64; accepted: float32"),
        (lambda q, k, v: (q, k.half(), v), "have dtypes Float, Half, Float; accepted: one"),
        (lambda q, k, v: (q, k.mT.contiguous().mT, v), "has stride 20 along its last dimension; accepted: 1"),
    ],
)
def test_bad_operands_are_named(change, message):
    query, key, value, _ = operands((1, 2, 1, 20, 32), torch.float32)
    with pytest.raises(ValueError, match=message):
        attention(*change(query, key, value), 0.2)


def test_a_gradient_of_another_shape_is_named():
    query, key, value, grad = operands((1, 2, 1, 20, 32), torch.float32)
    with pytest.raises(ValueError, match=r"grad has shape \[1, 2, 19, 32\] and dtype Float; accepted: those of query"):
        attention_backward(grad[:, :, :19], query, key, value, 0.2)
