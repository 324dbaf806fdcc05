"""The arithmetic of one row of logits, in base 2: scaling, and folding tiles into running sums.

Every kernel that meets logits works on ``t = z·log2 e − r`` with one fused multiply-add per element, where the
reference r is close to the row's maximum and never needs to be exactly it. A partial row is ``(r, S, T)``::

    S = Σ 2^t        T = Σ t·2^t        t relative to r, in bits
    identity: r = FLOOR, S = T = 0
    (r, S, T) under r' ≥ r, with d = r − r':   T ← (T + d·S)·2^d    S ← S·2^d

FLOOR stands in for −inf, since −inf − (−inf) is NaN; it is not near the largest float, which times log2 e would
overflow. −inf logits contribute 0 to both sums; NaN and +inf logits make both NaN.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
FLOOR = tl.constexpr(-1e30)
# 2^t is 0 from here on in every dtype; a factor clamped to it keeps 0·(−inf) = NaN away
NO_BITS = tl.constexpr(-1e4)


def scaling(logit_scale: float, softcap: float | None) -> dict[str, float | bool]:
    """The constants that `scaled` and the multiply-add behind it need for z = softcap·tanh(logit_scale·x/softcap).

    The positive factor UNIT (bits per unit of the scaled value) costs nothing, so only a softcap or a negative
    scale leaves work per element.
    """
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
def fold(r, total, weighted, tiles, UNIT: tl.constexpr):
    """Fold a tuple of tiles of scaled values [R, N] into the partial rows (r, S, T) [R].

    One exponential per value, and one per row of all tiles together for what was summed before.
    """
    highest = tiles[0]
    for i in tl.static_range(1, len(tiles)):
        highest = tl.maximum(highest, tiles[i])
    r_new = tl.maximum(r, tl.max(highest, 1) * UNIT)
    mass = tl.zeros_like(highest)
    surprise = tl.zeros_like(highest)
    for i in tl.static_range(len(tiles)):
        t = tl.fma(tiles[i], UNIT, -r_new[:, None])
        e = tl.exp2(t)
        mass += e
        surprise = tl.fma(tl.maximum(t, NO_BITS), e, surprise)
    d = r - r_new
    decay = tl.exp2(d)
    weighted = tl.fma(tl.fma(d, total, weighted), decay, tl.sum(surprise, 1))
    total = tl.fma(total, decay, tl.sum(mass, 1))
    return r_new, total, weighted


@triton.jit
def merge(r, total, weighted, axis: tl.constexpr):
    """The partial rows along `axis` as one."""
    r_all = tl.max(r, axis)
    d = r - (r_all if r_all.type.is_block() == 0 else tl.expand_dims(r_all, axis))
    decay = tl.exp2(d)
    return r_all, tl.sum(total * decay, axis), tl.sum(tl.fma(d, total, weighted) * decay, axis)


@triton.jit
def finish(r, total, weighted, x_label, V, UNIT: tl.constexpr):
    """nll, entropy, row_max and log_sum in nats, of a merged row and the scaled value at its label.

    log_sum is relative to row_max as rounded, so that their sum loses nothing to the common offset. What rounding
    leaves below 0 is 0, and so is all of it where there is nothing to choose from.
    """
    bits = tl.where(total == 0, float("nan"), tl.log2(total))
    nll = tl.maximum(bits - tl.fma(x_label, UNIT, -r), 0.0, propagate_nan=tl.PropagateNan.ALL) * LN2
    entropy = tl.maximum(bits - weighted / total, 0.0, propagate_nan=tl.PropagateNan.ALL) * LN2
    if V == 1:
        nll = (bits - bits) + (x_label - x_label)
        entropy = bits - bits
    row_max = tl.where(bits == bits, r * LN2, float("nan"))
    log_sum = (bits - tl.fma(row_max, LOG2E, -r)) * LN2
    return nll, entropy, row_max, log_sum
