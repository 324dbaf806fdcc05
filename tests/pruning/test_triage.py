"""Stage 1: hand-worked pools, decisions a to d, the rank form against definition and bisection."""

import math

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

import qtuning_kernels as qk
from qtuning_kernels.pruning.budget import keep_count

from .pools import PROPERTY, RATIOS, rough_pools, tie_free_pools

INF, NAN = math.inf, math.nan

# high keys 0 ∞ 2 ∞ and low keys ∞ 1 ∞ 3 of PPL; ∞ 0 2 ∞ and 1 ∞ ∞ 3 of entropy; so key(Q2) is 1 for sample 0,
# key(Q4) is 1 for sample 1, and nothing else is ever in a corner. Supplement scores 1, 1, 1/18, 5/36.
WORKED = (torch.tensor([10.0, 1.0, 5.0, 2.0]), torch.tensor([0.1, 0.9, 0.5, 0.3]))


def assert_triage(triage, quadrant, role, kept_index, supplemented, alpha):
    assert triage.quadrant.tolist() == quadrant
    assert triage.role.tolist() == role
    assert triage.keep.tolist() == [r > 0 for r in role]
    assert triage.kept_index.tolist() == kept_index
    assert triage.supplemented.nonzero().flatten().tolist() == supplemented
    assert triage.alpha.item() == pytest.approx(alpha, abs=1e-7)
    dtypes = (torch.int8, torch.int8, torch.bool, torch.int64, torch.bool, torch.float32)
    assert tuple(x.dtype for x in triage) == dtypes
    assert triage.alpha.shape == ()


def test_worked_trim():
    """Both corners come in at κ = 1, room is for one: equal scores, so the lower index. The other one keeps
    its quadrant."""
    assert_triage(qk.triage_samples(*WORKED, 0.25), [2, 4, 0, 0], [2, 0, 0, 0], [0], [], 1 / 8)


def test_worked_exact():
    assert_triage(qk.triage_samples(*WORKED, 0.5), [2, 4, 0, 0], [2, 4, 0, 0], [0, 1], [], 1 / 8)


def test_worked_fill():
    """Two corner samples for three places: sample 3 has the higher score and leans to Q4 (2/18 < 1/4)."""
    assert_triage(qk.triage_samples(*WORKED, 0.75), [2, 4, 1, 3], [2, 4, 0, 4], [0, 1, 3], [3], 0.49)


def test_worked_fill_leaning_to_q2():
    """The same pool with the entropies of 2 and 3 lowered a little: now both lean to Q2 (decision c)."""
    entropy = torch.tensor([0.1, 0.9, 0.3, 0.15])
    assert_triage(qk.triage_samples(WORKED[0], entropy, 0.75), [2, 4, 1, 3], [2, 4, 2, 0], [0, 1, 2], [2], 0.49)


def test_ineligible_samples_are_never_kept():
    """k comes from all six, everything else from the four that have a place on the plane (decision d)."""
    ppl = torch.tensor([NAN, 10.0, 1.0, INF, 5.0, 2.0])
    entropy = torch.tensor([0.2, 0.1, 0.9, 0.2, 0.5, 0.3])
    triage = qk.triage_samples(ppl, entropy, 0.5)
    assert_triage(triage, [0, 2, 4, 0, 1, 3], [0, 2, 4, 0, 0, 4], [1, 2, 5], [5], 0.49)


def test_fewer_eligible_than_the_budget():
    """All eligible ones are kept, and the padding of kept_index cannot be used by mistake."""
    ppl = torch.tensor([NAN, 3.0, -INF, 1.0])
    entropy = torch.tensor([0.2, 0.1, 0.9, NAN])
    triage = qk.triage_samples(ppl, entropy, 0.75)
    assert_triage(triage, [0, 1, 0, 0], [0, 4, 0, 0], [1, 4, 4], [1], 0.49)
    with pytest.raises(IndexError):
        ppl[triage.kept_index]


def test_no_eligible_sample():
    bad = torch.full((3,), NAN)
    assert_triage(qk.triage_samples(bad, bad, 0.7), [0, 0, 0], [0, 0, 0], [3, 3], [], 0.49)


def test_pool_of_one():
    """It is high on both axes, in no corner, and the only one to fill with."""
    assert_triage(qk.triage_samples(*torch.tensor([[3.0], [0.5]]), 0.1), [1], [4], [0], [0], 0.49)


def test_constant_axis():
    """Constant PPL makes everything high and normalises to 0: a low entropy is Q2, and who fills in has role
    4, the highest entropy first."""
    ppl, entropy = torch.full((4,), 7.0), torch.tensor([0.4, 0.1, 0.3, 0.2])
    assert_triage(qk.triage_samples(ppl, entropy, 0.75), [1, 2, 1, 2], [4, 2, 0, 2], [0, 1, 3], [0], 0.49)


def test_duplicates():
    """Identical samples tie in everything: the lower index is kept."""
    assert qk.triage_samples(torch.full((8,), 2.0), torch.full((8,), 1.0), 0.25).kept_index.tolist() == [0, 1]


def definition(ppl, entropy, k):
    """method.md's closed form for one pool, sample by sample, in Python integers."""
    eligible = [math.isfinite(p) and math.isfinite(e) for p, e in zip(ppl, entropy, strict=True)]
    pool = [i for i, ok in enumerate(eligible) if ok]
    n = len(pool)

    def keys(x):
        above = [sum(x[j] > v for j in pool) for v in x]
        below = [sum(x[j] < v for j in pool) for v in x]
        high = [2 * h if 100 * h <= 49 * n else INF for h in above]
        low = [2 * b + 1 if b < h and 100 * b < 49 * n else INF for h, b in zip(above, below, strict=True)]
        return high, low

    def normalised(x):
        single = torch.tensor(x, dtype=torch.float32)
        lowest, highest = single[pool].min(), single[pool].max()
        return ((single - lowest) / (highest - lowest) if highest > lowest else single * 0).tolist()

    if not pool:
        return [0] * len(ppl), [0] * len(ppl), [False] * len(ppl), 0.49
    (high_p, low_p), (high_e, low_e) = keys(ppl), keys(entropy)
    p_hat, e_hat = normalised(ppl), normalised(entropy)
    key, corner = {}, {}
    for i in pool:
        q2, q4 = max(high_p[i], low_e[i]), max(low_p[i], high_e[i])
        key[i], corner[i] = min(q2, q4), 2 if (q2, -p_hat[i]) < (q4, -e_hat[i]) else 4
    kept = sorted(pool, key=lambda i: (key[i], -abs(torch.tensor(p_hat[i]) - e_hat[i]).item(), i))[:k]
    finite = sorted(v for v in key.values() if v < INF)
    short = len(finite) < k
    kappa = 2 * n if short else finite[k - 1]
    quadrant = [0] * len(ppl)
    for i in pool:
        if key[i] <= kappa:
            quadrant[i] = corner[i]
        elif max(high_p[i], high_e[i]) <= kappa:
            quadrant[i] = 1
        elif max(low_p[i], low_e[i]) <= kappa:
            quadrant[i] = 3
    role = [corner[i] if i in kept else 0 for i in range(len(ppl))]
    supplemented = [i in kept and key[i] == INF for i in range(len(ppl))]
    return quadrant, role, supplemented, 0.49 if short else min(kappa / (2 * n), 0.49)


@PROPERTY
@given(rough_pools() | tie_free_pools(1, 24), RATIOS)
def test_rank_form_is_the_definition(pool, ratio):
    triage = qk.triage_samples(*pool, ratio)
    k = keep_count(ratio, len(pool[0]))
    quadrant, role, supplemented, alpha = definition(*(x.tolist() for x in pool), k)
    kept = [i for i, r in enumerate(role) if r]
    padding = [len(role)] * (k - len(kept))
    expected_filled = [i for i, s in enumerate(supplemented) if s]
    assert_triage(triage, quadrant, role, kept + padding, expected_filled, alpha)


@PROPERTY
@given(tie_free_pools(), RATIOS)
def test_rank_form_equals_bisection(pool, ratio):
    rank = qk.triage_samples(*pool, ratio)
    bisect = qk.triage_samples(*pool, ratio, method="bisect")
    for name in ("quadrant", "role", "keep", "kept_index", "supplemented"):
        assert torch.equal(getattr(rank, name), getattr(bisect, name)), name
    # the loop ends at the edge of the step whose middle the rank form names
    assert abs(rank.alpha - bisect.alpha) <= 0.5 / len(pool[0]) + 1e-5


@PROPERTY
@given(tie_free_pools(), RATIOS)
def test_quadrants_follow_from_alpha(pool, ratio):
    """The paper's quadrants, from quantiles at the reported α, are the reported ones."""
    triage = qk.triage_samples(*pool, ratio)
    size = len(pool[0])

    def sides(x):
        ascending = x.sort().values.tolist()
        tolerance = 1e-4  # α is float32: exact multiples of 1/B need slack, in samples
        low = math.ceil(triage.alpha.item() * size - tolerance)
        high = math.ceil((1 - triage.alpha.item()) * size - tolerance)
        is_high = x >= ascending[high - 1]
        return is_high, (x <= (ascending[low - 1] if low else -INF)) & ~is_high

    (high_p, low_p), (high_e, low_e) = map(sides, pool)
    expected = 1 * (high_p & high_e) + 2 * (high_p & low_e) + 3 * (low_p & low_e) + 4 * (low_p & high_e)
    assert triage.quadrant.tolist() == expected.tolist()


@PROPERTY
@given(rough_pools() | tie_free_pools(1), RATIOS, st.sampled_from(("rank", "bisect")))
def test_exactly_k_are_kept(pool, ratio, method):
    triage = qk.triage_samples(*pool, ratio, method=method)
    size = len(pool[0])
    eligible = pool[0].isfinite() & pool[1].isfinite()
    k = max(1, math.floor(ratio * size + 1e-9))
    kept = min(k, int(eligible.sum()))
    assert triage.kept_index.shape == (k,)
    assert triage.keep.sum() == kept
    assert not (triage.keep & ~eligible).any()
    assert triage.kept_index[:kept].tolist() == triage.keep.nonzero().flatten().tolist()
    assert triage.kept_index[kept:].tolist() == [size] * (k - kept)
    assert torch.equal(triage.keep, triage.role > 0)
    assert set(triage.role.tolist()) <= {0, 2, 4}
    inside = triage.keep & ~triage.supplemented
    assert torch.equal(triage.role[inside], triage.quadrant[inside])
    assert not (triage.supplemented & ~triage.keep).any()
    assert not ((triage.quadrant == 2) | (triage.quadrant == 4))[triage.supplemented].any()
    assert not triage.quadrant[~eligible].any()


def scores(ppl, entropy):
    hats = ((x - x.min()) / (x.max() - x.min()) for x in (ppl, entropy))
    return (next(hats) - next(hats)).abs()


@PROPERTY
@given(tie_free_pools(), RATIOS, st.sampled_from(("rank", "bisect")), st.integers(0, 2**32))
def test_permuting_the_pool(pool, ratio, method, seed):
    """The order of the pool decides nothing, unless two supplement scores are equal."""
    assume(len(scores(*pool).unique()) == len(pool[0]))
    order = torch.randperm(len(pool[0]), generator=torch.Generator().manual_seed(seed))
    one = qk.triage_samples(*pool, ratio, method=method)
    other = qk.triage_samples(*(x[order] for x in pool), ratio, method=method)
    for name in ("quadrant", "role", "keep", "supplemented"):
        assert torch.equal(getattr(one, name)[order], getattr(other, name)), name
    assert one.alpha == other.alpha


MONOTONE = {
    "scale": lambda x: 8 * x,
    "exp": lambda x: (x / 32).exp(),
    "cube": lambda x: x**3,
    "step": lambda x: x + 100 * (x > 40),
}


@PROPERTY
@given(
    st.lists(
        st.tuples(st.integers(0, 100), st.integers(0, 100)),
        min_size=2,
        max_size=40,
        unique_by=(lambda pair: pair[0], lambda pair: pair[1]),
    ),
    RATIOS,
    st.sampled_from(sorted(MONOTONE)),
    st.sampled_from(sorted(MONOTONE)),
)
def test_monotone_maps_of_the_axes(pairs, ratio, map_ppl, map_entropy):
    """Stage 1 looks at ranks alone; only the supplement score looks at distances, which trims and fills."""
    ppl, entropy = torch.tensor(pairs, dtype=torch.float32).unbind(1)
    one = qk.triage_samples(ppl, entropy, ratio)
    other = qk.triage_samples(MONOTONE[map_ppl](ppl), MONOTONE[map_entropy](entropy), ratio)
    assert one.alpha == other.alpha
    corners = (one.quadrant == 2) | (one.quadrant == 4)
    assume(corners.sum() == len(one.kept_index))
    for name in ("quadrant", "role", "keep", "kept_index", "supplemented"):
        assert torch.equal(getattr(one, name), getattr(other, name)), name


def test_float64_coordinates():
    ppl, entropy = torch.rand(2, 20, dtype=torch.float64)
    double, single = (qk.triage_samples(ppl.to(d), entropy.to(d), 0.3) for d in (torch.float64, torch.float32))
    assert all(torch.equal(a, b) for a, b in zip(double, single, strict=True))


GOOD = torch.ones(3)


@pytest.mark.parametrize(
    ("ppl", "entropy", "ratio", "options", "error", "message"),
    [
        ([1.0], GOOD, 0.5, {}, TypeError, "ppl is a list; accepted: a tensor"),
        (GOOD.view(1, 3), GOOD, 0.5, {}, ValueError, r"ppl has shape \[1, 3\]; accepted: one dimension"),
        (
            GOOD.half(),
            GOOD.half(),
            0.5,
            {},
            ValueError,
            "ppl has dtype torch.float16; accepted: torch.float32",
        ),
        (
            GOOD,
            GOOD.double(),
            0.5,
            {},
            ValueError,
            "entropy has dtype torch.float64; accepted: torch.float32",
        ),
        (GOOD, GOOD[:2], 0.5, {}, ValueError, "entropy has 2 entries; accepted: 3"),
        (GOOD, GOOD.to("meta"), 0.5, {}, ValueError, "entropy is on device meta; accepted: cpu"),
        (GOOD[:0], GOOD[:0], 0.5, {}, ValueError, "ppl has 0 entries; accepted: a pool of at least one"),
        (GOOD, GOOD, 0, {}, ValueError, r"keep_ratio is 0; accepted: a number in \(0, 1\]"),
        (GOOD, GOOD, 1.01, {}, ValueError, r"keep_ratio is 1.01; accepted"),
        (GOOD, GOOD, NAN, {}, ValueError, "keep_ratio is nan; accepted"),
        (GOOD, GOOD, "half", {}, TypeError, "keep_ratio is 'half'; accepted: a number"),
        (GOOD, GOOD, 0.5, {"method": "sort"}, ValueError, "method is 'sort'; accepted: 'rank', 'bisect'"),
    ],
)
def test_bad_arguments(ppl, entropy, ratio, options, error, message):
    with pytest.raises(error, match=message):
        qk.triage_samples(ppl, entropy, ratio, **options)
