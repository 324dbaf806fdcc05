"""Float32 linear layers through oneDNN: the same values as PyTorch's, where they are asked for and nowhere else."""

import pytest
import torch
from torch import nn

from qtuning_kernels import cpu_linear
from qtuning_kernels.causal_lm import CausalLM, backbone
from qtuning_kernels.cpu_linear import onednn_linear

from .tiny import tiny_model

BOTH = torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()
pytestmark = pytest.mark.skipif(not BOTH, reason="PyTorch was built without MKL or oneDNN: nothing is replaced")

NORM_EPSILON = 2.0**-22  # of |x||w|, which bounds a product: two units in the last place


def through_onednn(tensor: torch.Tensor) -> bool:
    return tensor.grad_fn is not None and tensor.grad_fn.name() == "_LinearBackward"


def products(x, weight, bias, upstream):
    """The output and the gradients of all operands, with the norms that bound each."""
    y = nn.functional.linear(x, weight, bias)
    operands = [t for t in (x, weight, bias) if t is not None]
    return [y, *torch.autograd.grad(y, operands, upstream)]


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
    with onednn_linear(nn.Identity()):
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


def test_rows_that_are_not_contiguous():
    x, weight = torch.randn(9, 40)[:, ::2].requires_grad_(), torch.randn(30, 7).t().requires_grad_()
    x, weight = x[:, :], weight[:, :20]
    with onednn_linear(nn.Identity()):
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
    with onednn_linear(nn.Identity()):
        y = nn.functional.linear(x, weight)
    assert not through_onednn(y)
    assert torch.equal(y, nn.functional.linear(x, weight))


def test_leaves_autocast_alone():
    x, weight = torch.ones(2, 4), torch.ones(3, 4, requires_grad=True)
    with onednn_linear(nn.Identity()), torch.autocast("cpu", torch.bfloat16):
        assert nn.functional.linear(x, weight).dtype == torch.bfloat16


def test_off_with_the_backend():
    weight = torch.ones(3, 4, requires_grad=True)
    with torch.backends.mkldnn.flags(enabled=False), onednn_linear(nn.Identity()):
        assert not through_onednn(nn.functional.linear(torch.ones(2, 4), weight))


def test_ends_with_its_context():
    weight = torch.ones(3, 4, requires_grad=True)
    with onednn_linear(nn.Identity()):
        pass
    assert not through_onednn(nn.functional.linear(torch.ones(2, 4), weight))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_backbone_and_its_gradients(checkpointing):
    """Checkpointed activations are computed again outside of the context, and must find what they saved."""
    model = tiny_model()
    if checkpointing:
        model.gradient_checkpointing_enable()
    model.train()
    parts = CausalLM(model)
    input_ids = torch.arange(12).view(2, 6)
    found = []
    for enabled in (False, True):
        with torch.backends.mkldnn.flags(enabled=enabled):
            hidden = backbone(parts.decoder, input_ids)
            found.append([hidden, *torch.autograd.grad(hidden.square().sum(), list(parts.decoder.parameters()))])
    for plain, ours in zip(*found, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-4)


def test_a_model_is_compared_with_its_parts_under_the_same_products(monkeypatch):
    """Two libraries' rounding adds up, in a large model, to more than the comparison allows."""
    monkeypatch.setattr(cpu_linear, "_product", lambda x, weight, bias=None: 1.001 * (x @ weight.t()))
    CausalLM(tiny_model()).check()
