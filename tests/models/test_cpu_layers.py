"""Linear layers through oneDNN and attention through the native backend, where they serve and nowhere else."""

from contextlib import nullcontext

import pytest
import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention as attention

from qtuning_kernels.kernels.dispatch import unavailable_reason
from qtuning_kernels.models import cpu_layers as module
from qtuning_kernels.models.causal_lm import CausalLM, backbone
from qtuning_kernels.models.cpu_layers import cpu_layers
from tests.tiny import tiny_model

BOTH = torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()
linear_layers = pytest.mark.skipif(not BOTH, reason="PyTorch was built without MKL or oneDNN: nothing is replaced")
native = pytest.mark.skipif(unavailable_reason("native") is not None, reason="the native backend was not built")

NORM_EPSILON = 2.0**-22  # of |x||w|, which bounds a product: two units in the last place


def through_onednn(tensor: torch.Tensor) -> bool:
    return tensor.grad_fn is not None and tensor.grad_fn.name() == "_LinearBackward"


def products(x, weight, bias, upstream):
    """The output and the gradients of all operands, with the norms that bound each."""
    y = nn.functional.linear(x, weight, bias)
    operands = [t for t in (x, weight, bias) if t is not None]
    return [y, *torch.autograd.grad(y, operands, upstream)]


@linear_layers
@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 5, 2), (64, 576, 192), (200, 192, 577)])
@pytest.mark.parametrize("leading", [(), (2,)])
@pytest.mark.parametrize("with_bias", [False, True])
def test_no_less_accurate_than_pytorch(shape, leading, with_bias):
    n, k, m = shape
    torch.manual_seed(0)
    x, weight, bias = torch.randn(*leading, n, k), torch.randn(m, k), torch.randn(m) if with_bias else None
    upstream = torch.randn(*leading, n, m)
    operands = [t.requires_grad_() if t is not None else None for t in (x, weight, bias)]
    plain = products(*operands, upstream)
    with cpu_layers(nn.Identity()):
        ours = products(*operands, upstream)
    assert through_onednn(ours[0])
    assert not through_onednn(plain[0])
    wide = [t.detach().double().requires_grad_() if t is not None else None for t in operands]
    truth = products(*wide, upstream.double())
    rows = x.numel() // k
    scales = [k**0.5 * k**0.5, m**0.5 * m**0.5, rows, rows]  # |x||w| for standard normal operands
    for got, torch_got, want, scale in zip(ours, plain, truth, scales, strict=False):
        error, torch_error = ((t - want).abs().max().item() for t in (got, torch_got))
        assert error <= torch_error + NORM_EPSILON * scale


@linear_layers
def test_rows_that_are_not_contiguous():
    x, weight = torch.randn(9, 40)[:, ::2].requires_grad_(), torch.randn(30, 7).t().requires_grad_()
    x, weight = x[:, :], weight[:, :20]
    with cpu_layers(nn.Identity()):
        y = nn.functional.linear(x, weight)
    assert through_onednn(y)
    torch.testing.assert_close(y, x @ weight.t(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "x",
    [
        torch.ones(2, 4, dtype=torch.float64),
        torch.ones(2, 4, dtype=torch.bfloat16),
        torch.ones(4),
        torch.ones(0, 4),
    ],
    ids=["float64", "bfloat16", "vector", "no rows"],
)
def test_leaves_other_operands_alone(x):
    weight = torch.ones(3, 4, dtype=x.dtype, requires_grad=True)
    with cpu_layers(nn.Identity()):
        y = nn.functional.linear(x, weight)
    assert not through_onednn(y)
    assert torch.equal(y, nn.functional.linear(x, weight))


def test_leaves_autocast_alone():
    x, weight = torch.ones(2, 4), torch.ones(3, 4, requires_grad=True)
    with cpu_layers(nn.Identity()), torch.autocast("cpu", torch.bfloat16):
        assert nn.functional.linear(x, weight).dtype == torch.bfloat16


def test_linear_layers_are_off_with_onednn():
    weight = torch.ones(3, 4, requires_grad=True)
    with torch.backends.mkldnn.flags(enabled=False), cpu_layers(nn.Identity()):
        assert not through_onednn(nn.functional.linear(torch.ones(2, 4), weight))


def test_ends_with_its_context():
    weight = torch.ones(3, 4, requires_grad=True)
    with cpu_layers(nn.Identity()):
        pass
    assert not through_onednn(nn.functional.linear(torch.ones(2, 4), weight))
    assert not through_native(attention(*heads(), is_causal=True))


def heads(length: int = 6, dtype: torch.dtype = torch.float32, key_heads: int = 2) -> list[torch.Tensor]:
    sizes = [(1, n, length, 8) for n in (2, key_heads, key_heads)]
    return [torch.randn(size).to(dtype).requires_grad_() for size in sizes]


def through_native(tensor: torch.Tensor) -> bool:
    return tensor.grad_fn.name() == "_CausalAttentionBackward"


@native
@pytest.mark.parametrize("scale", [None, 0.3])
@pytest.mark.parametrize("key_heads", [1, 2])
def test_attention_and_its_gradients(scale, key_heads):
    tensors = heads(key_heads=key_heads)
    found = []
    for context in (nullcontext(), cpu_layers(nn.Identity())):
        with context:
            out = attention(*tensors, None, 0.0, True, scale=scale, enable_gqa=key_heads == 1)
        assert through_native(out) == bool(found)
        found.append([out, *torch.autograd.grad(out.square().sum(), tensors)])
    for plain, ours in zip(*found, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-5)


@native
@pytest.mark.parametrize(
    ("tensors", "settings"),
    [
        (heads(), {"is_causal": False}),
        (heads(), {"attn_mask": torch.ones(6, 6, dtype=torch.bool).tril()}),
        (heads(), {"is_causal": True, "dropout_p": 0.5}),
        (heads(dtype=torch.float64), {"is_causal": True}),
        ([heads(1)[0], *heads()[1:]], {"is_causal": True}),
        ([heads()[0], heads()[1], torch.randn(1, 2, 6, 16)], {"is_causal": True}),
        ([t[0] for t in heads()], {"is_causal": True}),
        ([t.mT.contiguous().mT for t in heads()], {"is_causal": True}),
    ],
    ids=["not causal", "mask", "dropout", "float64", "one query", "wider values", "no batch", "strides"],
)
def test_other_attention_is_left_to_pytorch(tensors, settings):
    found = []
    for context in (nullcontext(), cpu_layers(nn.Identity())):
        torch.manual_seed(0)
        with context:
            found.append(attention(*tensors, **settings))
    assert not through_native(found[1])
    assert torch.equal(*found)


@native
def test_attention_under_autocast_has_its_precision():
    query, key, value = heads()
    with cpu_layers(nn.Identity()), torch.autocast("cpu", torch.bfloat16):
        out = attention(query, key, value.bfloat16(), is_causal=True)
    assert through_native(out)
    assert out.dtype == torch.bfloat16
    out.float().sum().backward()
    assert query.grad.dtype == torch.float32


@native
def test_attention_is_pytorchs_under_another_backend(monkeypatch):
    monkeypatch.setenv("QTUNING_BACKEND", "reference")
    with cpu_layers(nn.Identity()):
        assert not through_native(attention(*heads(), is_causal=True))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_backbone_and_its_gradients(checkpointing):
    """Checkpointed activations are computed again outside of the context, and must find what they saved."""
    model = tiny_model()
    if checkpointing:
        model.gradient_checkpointing_enable()
    model.train()
    decoder = CausalLM(model).decoder
    input_ids = torch.arange(12).view(2, 6)
    found = []
    for forward in (lambda: decoder(input_ids=input_ids, use_cache=False)[0], lambda: backbone(decoder, input_ids)):
        hidden = forward()
        found.append([hidden, *torch.autograd.grad(hidden.square().sum(), list(decoder.parameters()))])
    for plain, ours in zip(*found, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-4)


@native
@pytest.mark.parametrize(("training", "replaced"), [(True, False), (False, True)])
def test_checkpointing_matters_in_training_only(training, replaced):
    model = tiny_model()
    model.gradient_checkpointing_enable()
    model.train(training)
    with cpu_layers(model):
        assert through_native(attention(*heads(), is_causal=True)) == replaced


@linear_layers
def test_a_model_is_compared_with_its_parts_under_the_same_products(monkeypatch):
    """Two libraries' rounding adds up, in a large model, to more than the comparison allows."""
    monkeypatch.setattr(module, "_product", lambda x, weight, bias=None: 1.001 * (x @ weight.t()))
    CausalLM(tiny_model()).check()
