"""Random pools for the property tests."""

import torch
from hypothesis import HealthCheck, assume, settings
from hypothesis import strategies as st

# the fixtures only set an environment variable, so sharing them between examples is sound
PROPERTY = settings(
    max_examples=100,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)

RATIOS = st.sampled_from((0.125, 0.25, 0.5, 0.7, 1.0)) | st.floats(0.01, 1.0)


@st.composite
def tie_free_pools(draw, min_size=2, max_size=101):
    """PPL and entropy, correlated from not at all (full corners) to 0.95 (few in Q2 and Q4)."""
    size = draw(st.integers(min_size, max_size))
    correlation = draw(st.sampled_from((0.0, 0.5, 0.8, 0.95)))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    x, y = torch.randn(2, size, generator=generator)
    ppl, entropy = x.exp(), (correlation * x + (1 - correlation**2) ** 0.5 * y).exp()
    assume(len(ppl.unique()) == size == len(entropy.unique()))
    return ppl, entropy


_COORDINATE = st.integers(0, 6).map(float)
_BROKEN = st.sampled_from((float("nan"), float("inf"), float("-inf")))


@st.composite
def rough_pools(draw, max_size=40):
    """Tied and duplicate samples, constant axes, NaN and infinities."""
    axis = _COORDINATE | _BROKEN if draw(st.booleans()) else _COORDINATE
    pairs = draw(st.lists(st.tuples(axis, axis), min_size=1, max_size=max_size))
    if draw(st.integers(0, 4)) == 0:
        pairs = [(2.0, entropy) for _, entropy in pairs]
    ppl, entropy = zip(*pairs, strict=True)
    return torch.tensor(ppl), torch.tensor(entropy)
