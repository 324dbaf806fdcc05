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
        ({"logits": [1.0]}, TypeError, "logits is a list; accepted: a tensor"),
        ({"logits": LOGITS.long()}, ValueError, "logits has dtype torch.int64; accepted: torch.float32"),
        ({"logits": torch.tensor(1.0)}, ValueError, "logits has shape []; accepted: [.., V]"),
        ({"logits": torch.empty(2, 3, 0)}, ValueError, "logits has shape [2, 3, 0]; accepted: [.., V] with V >= 1"),
        (
            {"logits": LOGITS.transpose(1, 2)},
            ValueError,
            "logits has strides [30, 1, 10]; accepted: a dense last dimension",
        ),
        ({"labels": LABELS.float()}, ValueError, "labels has dtype torch.float32; accepted: torch.int64, torch.int32"),
        (
            {"labels": LABELS[:, :2]},
            ValueError,
            "labels has shape [2, 2]; accepted: that of logits without its last dimension, [2, 3]",
        ),
        ({"labels": LABELS.to("meta")}, ValueError, "labels is on device meta; accepted: that of logits, cpu"),
        (
            {"labels": LABELS + 10},
            IndexError,
            "labels[0] (flattened) is 10; accepted: [0, 10) or ignore_index",
        ),
        ({"labels": LABELS - 1}, IndexError, "is -1; accepted"),
        ({"softcap": 0.0}, ValueError, "softcap is 0.0; accepted: a finite number above 0, or None"),
        ({"logit_scale": float("nan")}, ValueError, "logit_scale is nan; accepted: a finite number other than 0"),
        (
            {"logits": LOGITS[:1].expand(2, 3, 10), "inplace_backward": True},
            ValueError,
            "so that rows share memory; accepted with inplace_backward=True: rows of their own",
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
        ({"weight": WEIGHT.T}, ValueError, "hidden has shape [2, 3, 4] and weight [4, 10]; accepted"),
        ({"weight": torch.empty(0)}, ValueError, "a sharded head has to be gathered first"),
        ({"weight": torch.empty(0, 4)}, ValueError, "a sharded head has to be gathered first"),
        (
            {"weight": WEIGHT.bfloat16()},
            ValueError,
            "weight has dtype torch.bfloat16; accepted: that of hidden, torch.float32",
        ),
        ({"bias": torch.zeros(4)}, ValueError, "bias has shape [4]; accepted: [V], [10]"),
        ({"labels": LABELS + 10}, IndexError, "is 10; accepted: [0, 10)"),
    ],
)
def test_linear_functions_refuse(function, arguments, error, message):
    """An empty weight is what a sharded head (FSDP, ZeRO-3) looks like outside its module."""
    with pytest.raises(error, match=re.escape(message)):
        function(**({"hidden": HIDDEN, "weight": WEIGHT, "labels": LABELS} | arguments))


def test_token_weight_is_checked():
    with pytest.raises(ValueError, match=re.escape("token_weight has shape [6]; accepted: the labels', [2, 3]")):
        qk.linear_cross_entropy(HIDDEN, WEIGHT, LABELS, token_weight=torch.ones(6))
    with pytest.raises(ValueError, match="token_weight requires a gradient; accepted"):
        qk.linear_cross_entropy(HIDDEN, WEIGHT, LABELS, token_weight=torch.ones(2, 3, requires_grad=True))


def test_no_graph_is_kept_in_evaluation():
    """Gradients of the head computed under no_grad would cost the training price in evaluation."""
    weight = WEIGHT.clone().requires_grad_()
    with torch.no_grad():
        assert not qk.linear_cross_entropy(HIDDEN, weight, LABELS).requires_grad
