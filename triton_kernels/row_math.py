"""The arithmetic of one row of logits, in base 2: scaling, and the running sums of the online softmax.

Every kernel that reads logits works on ``t = z·log2 e − r`` with one fused multiply-add per element, where the
reference r is close to the row's maximum and never needs to be exactly it. A partial row is ``(r, S, T)``, in code
``(row_max, sum_exp, sum_shifted_exp)``, in bits until `finalize` returns nats::

    S = Σ 2^t        T = Σ t·2^t        t relative to r
    identity: r = FLOOR, S = T = 0
    (r, S, T) under r' ≥ r, with d = r − r':   T ← (T + d·S)·2^d    S ← S·2^d

FLOOR stands in for −inf, since −inf − (−inf) is NaN; it is not near the largest float, which times log2 e would
overflow. −inf logits contribute 0 to both sums, so a row of nothing else keeps r = FLOOR and S = 0. A NaN makes S NaN;
a +inf makes it +inf, since r stays finite.
"""

import triton
import triton.language as tl

from qtuning_kernels.kernels.contract import Scaling

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
FLOOR = tl.constexpr(-1e30)
# 2^t is 0 from here on in every dtype; a factor clamped to it keeps 0·(−inf) = NaN away
NO_BITS = tl.constexpr(-1e4)


def scaling_constants(scaling: Scaling) -> dict[str, float | bool]:
    """The constants that `scaled` and the multiply-add after it need for z.

    The positive factor UNIT (bits per unit of the scaled value) costs nothing, so only a softcap or a negative
    scale leaves work per element.
    """
    logit_scale, softcap = scaling
    log2e = LOG2E.value
    if softcap is not None:
        return {"INNER": logit_scale / softcap, "HAS_SOFTCAP": True, "UNIT": softcap * log2e}
    if logit_scale <= 0:
        return {"INNER": logit_scale, "HAS_SOFTCAP": False, "UNIT": log2e}
    return {"INNER": 1.0, "HAS_SOFTCAP": False, "UNIT": logit_scale * log2e}


@triton.jit
def load_edge(ptr, lanes, begin, end, VECTOR: tl.constexpr):
    """The elements of a block that a row fills in part, and which of them are the row's.

    Whole 16-byte vectors are loaded if any element of them is the row's: such a read cannot leave the memory that
    the row lies in, and a mask per element would turn it into 2-byte loads and as many registers of masks.
    """
    inside = (lanes >= begin) & (lanes < end)
    x = tl.load(ptr + lanes, inside if VECTOR == 1 else lanes // VECTOR * VECTOR < end)
    return x, inside


@triton.jit
def load_words(ptr, words):
    """bfloat16 values two at a time, as float32: the even and the odd ones of the 32-bit words at `ptr`.

    bfloat16 is the upper half of a float32, so a shift and a mask convert; value by value it takes one more.
    """
    both = tl.load(ptr.to(tl.pointer_type(tl.int32)) + words)
    return (both << 16).to(tl.float32, bitcast=True), (both & -65536).to(tl.float32, bitcast=True)


@triton.jit
def tanh(x):
    """Hyperbolic tangent, within a few units in the last place (a polynomial where the quotient cancels)."""
    decay = tl.exp2(tl.abs(x) * (-2.0 * LOG2E))
    quotient = 1.0 - 2.0 * decay / (1.0 + decay)  # rounded once near 1
    quotient = tl.where(x < 0, -quotient, quotient)
    if x.dtype == tl.float64:
        return quotient
    square = x * x
    series = tl.fma(square, -5.70498872745e-3, 2.06390887954e-2)
    series = tl.fma(square, series, -5.37397155531e-2)
    series = tl.fma(square, series, 1.33314422036e-1)
    series = tl.fma(square, series, -3.33332819422e-1)
    return tl.where(tl.abs(x) < 0.625, tl.fma(x * square, series, x), quotient)


@triton.jit
def scaled(x, INNER: tl.constexpr, HAS_SOFTCAP: tl.constexpr):
    """The value whose multiple by UNIT is z·log2 e, in the compute dtype."""
    if x.dtype != tl.float64:
        x = x.to(tl.float32)
    if INNER != 1.0:
        x = x * INNER
    if HAS_SOFTCAP:
        x = tanh(x)
    return x


@triton.jit
def online_update(row_max, sum_exp, sum_shifted_exp, tiles, UNIT: tl.constexpr):
    """The partial rows [R] with a tuple of tiles of scaled values [R, N] added.

    One exponential per value, and one per row of all tiles together for what was summed before.
    """
    highest = tiles[0]
    for i in tl.static_range(1, len(tiles)):
        highest = tl.maximum(highest, tiles[i])
    CEILING: tl.constexpr = 1e308 if row_max.dtype == tl.float64 else 3e38
    new_max = tl.minimum(tl.maximum(row_max, tl.max(highest, 1) * UNIT), CEILING)
    tile_exp = tl.zeros_like(highest)
    tile_shifted_exp = tl.zeros_like(highest)
    for i in tl.static_range(len(tiles)):
        t = tl.fma(tiles[i], UNIT, -new_max[:, None])
        exp = tl.exp2(t)
        tile_exp += exp
        tile_shifted_exp = tl.fma(tl.maximum(t, NO_BITS), exp, tile_shifted_exp)
    d = row_max - new_max
    decay = tl.exp2(d)
    sum_shifted_exp = tl.fma(tl.fma(d, sum_exp, sum_shifted_exp), decay, tl.sum(tile_shifted_exp, 1))
    sum_exp = tl.fma(sum_exp, decay, tl.sum(tile_exp, 1))
    return new_max, sum_exp, sum_shifted_exp


@triton.jit
def merge(row_max, sum_exp, sum_shifted_exp):
    """The partial rows [R] as one."""
    new_max = tl.max(row_max, 0)
    d = row_max - new_max
    decay = tl.exp2(d)
    return new_max, tl.sum(sum_exp * decay, 0), tl.sum(tl.fma(d, sum_exp, sum_shifted_exp) * decay, 0)


@triton.jit
def finalize(row_max, sum_exp, sum_shifted_exp, x_label, V, UNIT: tl.constexpr):
    """nll, entropy, row_max and log_sum in nats, of a merged row and the scaled value at its label.

    log_sum is relative to row_max as rounded, so that their sum loses nothing to the common offset. What rounding
    leaves below 0 is 0, and so is all of it where there is nothing to choose from. Without a finite maximum row_max
    is that maximum and log_sum 0, as in PyTorch's logsumexp; nll and entropy are NaN.
    """
    only_minus_inf = sum_exp == 0
    has_plus_inf = sum_exp == float("inf")
    bits = tl.where(only_minus_inf | has_plus_inf, float("nan"), tl.log2(sum_exp))
    nll = tl.maximum(bits - tl.fma(x_label, UNIT, -row_max), 0.0, propagate_nan=tl.PropagateNan.ALL) * LN2
    entropy = tl.maximum(bits - sum_shifted_exp / sum_exp, 0.0, propagate_nan=tl.PropagateNan.ALL) * LN2
    if V == 1:
        nll = (bits - bits) + (x_label - x_label)
        entropy = bits - bits
    nats = tl.where(bits == bits, row_max * LN2, float("nan"))
    nats = tl.where(has_plus_inf, float("inf"), tl.where(only_minus_inf, float("-inf"), nats))
    log_sum = (bits - tl.fma(nats, LOG2E, -row_max)) * LN2
    return nll, entropy, nats, tl.where(only_minus_inf | has_plus_inf, 0.0, log_sum)
