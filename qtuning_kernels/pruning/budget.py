"""How many to keep of how many (decisions a and e of docs/method.md)."""

import math

import torch
from torch import Tensor

# 0.29 · 100 is 28.999999999999996 in float64, and 29 is meant. The ratio, the product and the product with
# this factor are each off by at most 2^-53 of themselves, together less than the headroom.
_HEADROOM = 1 + 2**-51


def keep_count(ratio: float, total: int) -> int:
    """max(1, ⌊ratio · total⌋), and never more than `total`."""
    return min(total, max(1, math.floor(ratio * total * _HEADROOM)))


def keep_counts(ratio: float, totals: Tensor) -> Tensor:
    """`keep_count` of every entry; int64, without waiting for the device."""
    counts = (totals.double() * ratio * _HEADROOM).floor().clamp(min=1).to(torch.int64)
    return torch.minimum(counts, totals.to(torch.int64))
