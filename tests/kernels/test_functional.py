"""What the public functions refuse, and what they say."""

import re

import pytest
import torch

import qtuning_kernels as qk

LOGITS = torch.randn(2, 3, 10)
LABELS = torch.zeros(2, 3, dtype=torch.long)
HIDDEN = torch.randn(2, 3, 4)
WEIGHT = torch.randn(10, 4)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"logits": [1.0]}, TypeError, "logits must be a torch.Tensor, got list"),
        ({"logits": LOGITS.long()}, ValueError, "logits has dtype torch.int64; accepted: float32"),
        ({"logits": torch.tensor(1.0)}, ValueError, "logits must be [.., V]"),
        ({"logits": torch.empty(2, 3, 0)}, ValueError, "V >= 1, got shape [2, 3, 0]"),
        ({"logits": LOGITS.transpose(1, 2)}, ValueError, "dense last dimension, got strides [30, 1, 10]"),
        ({"labels": LABELS.float()}, ValueError, "labels has dtype torch.float32; accepted: int64, int32"),
        ({"labels": LABELS[:, :2]}, ValueError, "labels must have the shape of logits without its last"),
        ({"labels": LABELS.to("meta")}, ValueError, "labels must be on the device of logits, cpu, got meta"),
        (
            {"labels": LABELS + 10},
            IndexError,
            "labels[0] (flattened) is 10; accepted: [0, 10) or ignore_index",
        ),
        ({"labels": LABELS - 1}, IndexError, "is -1; accepted"),
        ({"softcap": 0.0}, ValueError, "softcap must be finite and positive, or None, got 0.0"),
        ({"logit_scale": float("nan")}, ValueError, "logit_scale must be finite and not 0, got nan"),
        (
            {"logits": LOGITS[:1].expand(2, 3, 10), "inplace_backward": True},
            ValueError,
            "inplace_backward=True needs logits without expanded dimensions",
        ),
    ],
)
def test_token_stats_refuses(arguments, error, message):
    with pytest.raises(error, match=re.escape(message)):
        qk.token_stats(**({"logits": LOGITS, "labels": LABELS} | arguments))


@pytest.mark.parametrize("function", [qk.linear_token_stats, qk.linear_cross_entropy])
@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"weight": WEIGHT.T}, ValueError, "got [2, 3, 4] and [4, 10]"),
        ({"weight": torch.empty(0)}, ValueError, "is the head sharded? gather it first"),
        ({"weight": torch.empty(0, 4)}, ValueError, "is the head sharded? gather it first"),
        ({"weight": WEIGHT.bfloat16()}, ValueError, "weight must have the dtype and device of hidden"),
        ({"bias": torch.zeros(4)}, ValueError, "bias must be [V] = [10], got [4]"),
        ({"labels": LABELS + 10}, IndexError, "is 10; accepted: [0, 10)"),
    ],
)
def test_linear_functions_refuse(function, arguments, error, message):
    """An empty weight is what a sharded head (FSDP, ZeRO-3) looks like outside its module."""
    with pytest.raises(error, match=re.escape(message)):
        function(**({"hidden": HIDDEN, "weight": WEIGHT, "labels": LABELS} | arguments))


def test_token_weight_is_checked():
    with pytest.raises(ValueError, match=re.escape("token_weight must have the labels' shape [2, 3]")):
        qk.linear_cross_entropy(HIDDEN, WEIGHT, LABELS, token_weight=torch.ones(6))
    with pytest.raises(ValueError, match="token_weight must not require a gradient"):
        qk.linear_cross_entropy(HIDDEN, WEIGHT, LABELS, token_weight=torch.ones(2, 3, requires_grad=True))


def test_no_graph_is_kept_in_evaluation():
    """Gradients of the head computed under no_grad would cost the training price in evaluation."""
    weight = WEIGHT.clone().requires_grad_()
    with torch.no_grad():
        assert not qk.linear_cross_entropy(HIDDEN, weight, LABELS).requires_grad
