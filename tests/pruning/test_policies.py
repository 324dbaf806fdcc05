"""Every policy against a restatement in plain Python, and against numbers made with its authors' code."""

import json
import math
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import qtuning_kernels as qk
from qtuning_kernels.config import POLICY_NAMES
from qtuning_kernels.pruning.policies import POLICIES, PoolStats, make_policy
from qtuning_kernels.pruning.policies.protocol import NEEDS

from .pools import PROPERTY, RATIOS

INF, NAN = math.inf, math.nan
AUTHORS = json.loads((Path(__file__).parent / "authors_numbers.json").read_text())
WEIGHTS_OF_THE_LOSS = ("dft", "beyond_ll", "eaft")
PRUNING = [name for name in POLICY_NAMES if name not in WEIGHTS_OF_THE_LOSS]


def policy(name, **options):
    """With every setting, as a run makes it: those of `QTuningConfig` and the policy's own."""
    settings = {each.name for each in fields(qk.QTuningConfig)} & set(options)
    own = {key: value for key, value in options.items() if key not in settings}
    return make_policy(qk.QTuningConfig(policy=name, policy_options=own, **{key: options[key] for key in settings}))


def pool_of(samples, first=None, seed=0, **run):
    """A pool of ``samples``, each a list of tokens ``(nll, entropy, reference nll)``."""
    tokens = [token for sample in samples for token in sample]
    columns = zip(*tokens, strict=True) if tokens else ((), (), ())
    nll, entropy, reference = (torch.tensor(column, dtype=torch.float32) for column in columns)
    lengths = torch.tensor([0] + [len(sample) for sample in samples])
    first = torch.zeros(len(samples)) if first is None else torch.tensor(first, dtype=torch.float32)
    return PoolStats(
        cu_seqlens=lengths.cumsum(0).to(torch.int32), sample_ids=range(len(samples)),
        generator=torch.Generator().manual_seed(seed),
        nll=nll, entropy=entropy, lse=nll, reference_nll=reference, first_nll=first, **run,
    )  # fmt: skip


def decided(decision, samples):
    """The decision as Python lists, the weights sample by sample; its own consistency is checked on the way."""
    assert (decision.keep.dtype, decision.token_weight.dtype) == (torch.bool, torch.float32)
    weights = decision.token_weight.split([len(sample) for sample in samples])
    assert not decision.token_weight[~torch.isfinite(decision.token_weight)].numel()
    for keep, weight in zip(decision.keep.tolist(), weights, strict=True):
        assert keep == bool((weight > 0).any())
    return [weight.tolist() for weight in weights]


# few values, so that ties abound; eighths, so that sums and means are exact in every order
_VALUE = st.integers(0, 16).map(lambda x: x / 8)
_BROKEN = st.sampled_from((NAN, INF, -INF))


@st.composite
def pools(draw):
    """1 to 12 samples of 0 to 6 tokens, one in three pools with NaN and infinities, and first-seen nlls."""
    value = _VALUE | st.floats(0, 4, width=32)
    if draw(st.integers(0, 2)) == 0:
        value |= _BROKEN
    token = st.tuples(value, value, value)
    samples = draw(st.lists(st.lists(token, max_size=6), min_size=1, max_size=12))
    return samples, draw(st.lists(value, min_size=len(samples), max_size=len(samples)))


def mean(values):
    """float32 of the float64 mean, as `segment_means` states."""
    values = [float(v) for v in values]
    return torch.tensor(sum(values) / len(values) if values else NAN, dtype=torch.float32).item()


def count(ratio, total):
    return min(total, max(1, math.floor(ratio * total + 1e-9)))


def best(scores, eligible, k):
    """The indices of the `k` eligible highest scores, ties to the lower index."""
    order = sorted((i for i in range(len(scores)) if eligible[i]), key=lambda i: (-scores[i], i))
    return set(order[:k])


def finite(values):
    return bool(values) and all(math.isfinite(v) for v in values)


def whole(samples, kept):
    return [[float(i in kept)] * len(sample) for i, sample in enumerate(samples)]


def f32(x):
    return torch.tensor(x, dtype=torch.float32).item()


def test_names():
    assert tuple(POLICIES) == POLICY_NAMES


@pytest.mark.parametrize("name", POLICY_NAMES)
def test_declarations(name):
    made = policy(name)
    assert made.needs <= NEEDS
    assert made.source or name == "full"
    assert type(made).__doc__
    assert made.weighted == (name in ("infobatch", *WEIGHTS_OF_THE_LOSS))
    assert made.of_pool == (name not in ("full", *WEIGHTS_OF_THE_LOSS))


@PROPERTY
@given(pools(), RATIOS)
def test_samples_of_the_baselines(given_pool, ratio):
    samples, _ = given_pool
    pool, some = pool_of(samples), [bool(sample) for sample in samples]
    k = count(ratio, len(samples))
    lengths = [len(sample) for sample in samples]
    assert decided(policy("full")(pool), samples) == whole(samples, set(range(len(samples))))
    longest = policy("longest", sample_ratio=ratio)(pool)
    assert decided(longest, samples) == whole(samples, best(lengths, some, k))
    entropies = [[entropy for _, entropy, _ in sample] for sample in samples]
    eligible = [finite(values) for values in entropies]
    expected = best([mean(values) for values in entropies], eligible, k)
    assert decided(policy("entropy", sample_ratio=ratio)(pool), samples) == whole(samples, expected)


@PROPERTY
@given(pools(), RATIOS, RATIOS, st.integers(0, 2**32))
def test_random(given_pool, sample_ratio, token_share, seed):
    samples, _ = given_pool
    made = policy("random", sample_ratio=sample_ratio, token_share=token_share)
    weights = decided(made(pool_of(samples, seed=seed)), samples)
    kept = [i for i, weight in enumerate(weights) if any(weight)]
    assert len(kept) == min(count(sample_ratio, len(samples)), sum(map(bool, samples)))
    assert [sum(weights[i]) for i in kept] == [count(token_share, len(samples[i])) for i in kept]
    assert decided(made(pool_of(samples, seed=seed)), samples) == weights  # a resumed run draws the same


def test_random_is_uniform():
    """400 draws of 2 of 5: each sample 160 times, standard deviation 9.8; the empty one never."""
    samples = [[(0.0, 0.0, 0.0)] * length for length in (3, 0, 9, 1, 9, 4)]
    draw = policy("random", sample_ratio=0.34)
    counts = sum(draw(pool_of(samples, seed=seed)).keep.int() for seed in range(400))
    assert counts.sum() == 800
    assert counts[1] == 0
    assert ((counts - 160).abs() < 50)[[0, 2, 3, 4, 5]].all()


@PROPERTY
@given(pools(), RATIOS, RATIOS, st.sampled_from(("full", "longest", "entropy")), st.booleans())
def test_ppl(given_pool, token_ratio, sample_ratio, first, reverse):
    samples, _ = given_pool
    name = "ppl_reversed" if reverse else "ppl"
    made = policy(name, token_ratio=token_ratio, sample_ratio=sample_ratio, samples=first)
    chosen = policy(first, sample_ratio=sample_ratio)(pool_of(samples)).keep.tolist()
    expected = []
    for sample, keep in zip(samples, chosen, strict=True):
        nll = [nll for nll, _, _ in sample]
        k = count(token_ratio, len(nll)) if keep and finite(nll) else 0
        kept = best([x if reverse else -x for x in nll], [True] * len(nll), k)
        expected.append([float(i in kept) for i in range(len(nll))])
    assert decided(made(pool_of(samples)), samples) == expected
    assert made.needs == {"nll"} | ({"entropy"} if first == "entropy" else set())


@PROPERTY
@given(pools(), RATIOS, st.sampled_from(("rho1", "token_cleaning")))
def test_excess_loss(given_pool, ratio, name):
    samples, _ = given_pool
    excess = [[f32(nll - reference) for nll, _, reference in sample] for sample in samples]
    flat = [(x, finite(values)) for values in excess for x in values]
    kept = best([x for x, _ in flat], [ok for _, ok in flat], count(ratio, len(flat)))
    weights = decided(policy(name, token_ratio=ratio)(pool_of(samples)), samples)
    assert [w for weight in weights for w in weight] == [float(i in kept) for i in range(len(flat))]


@PROPERTY
@given(pools(), st.sampled_from((1.0, 2.5, 5.0)), st.sampled_from((0.0, 0.1, 0.5, 1.0)))
def test_thresholds(given_pool, most, least):
    """Perplexities and probabilities in float32, as the authors' codes have them."""
    samples, _ = given_pool
    stm, profit = [], []
    for sample in samples:
        nll, reference = [nll for nll, _, _ in sample], [reference for _, _, reference in sample]
        ppl, p = torch.tensor(reference).exp().tolist(), (-torch.tensor(nll)).exp().tolist()
        stm.append([float(finite(reference) and x <= most) for x in ppl])
        profit.append([float(finite(nll) and x >= least) for x in p])
    assert decided(policy("stm", threshold=most)(pool_of(samples)), samples) == stm
    assert decided(policy("profit", threshold=least)(pool_of(samples)), samples) == profit


@PROPERTY
@given(pools(), st.sampled_from((0.0, 0.25, 0.5, 0.9)), st.integers(0, 2**32), st.sampled_from((0, 86, 87, 99)))
def test_infobatch(given_pool, ratio, seed, step):
    samples, _ = given_pool
    means = [mean([nll for nll, _, _ in sample]) for sample in samples]
    eligible = [m for m in means if math.isfinite(m)]
    level = sum(eligible) / len(eligible) if eligible else NAN
    pool = pool_of(samples, seed=seed, step=step, total_steps=99)
    weights = decided(policy("infobatch", prune_ratio=ratio)(pool), samples)
    prunes = step < 0.875 * 99
    for sample, m, weight in zip(samples, means, weights, strict=True):
        if not math.isfinite(m):
            assert weight == [0.0] * len(sample)
        elif m < level and prunes:
            assert weight in ([0.0] * len(sample), [f32(1 / (1 - ratio))] * len(sample))
        else:
            assert weight == [1.0] * len(sample)


@pytest.mark.parametrize("ratio", [0.5, 0.8])
def test_infobatch_is_unbiased(ratio):
    """The mean of Σ w·nll / tokens over 2,000 draws lies within 3 standard errors of the loss of all samples."""
    generator = torch.Generator().manual_seed(1)
    lengths = torch.randint(1, 20, (64,), generator=generator).tolist()
    samples = [[(x, 0.0, 0.0) for x in (2 * torch.rand(n, generator=generator)).tolist()] for n in lengths]
    pool, infobatch = pool_of(samples), policy("infobatch", prune_ratio=ratio)
    losses = torch.stack([(infobatch(pool).token_weight * pool.nll).mean() for _ in range(2000)]).double()
    error = losses.std() / 2000**0.5
    assert error > 1e-4  # the draws differ
    assert (losses.mean() - pool.nll.double().mean()).abs() < 3 * error


def test_infobatch_without_a_known_end_prunes_on():
    samples = [[(float(i), 0.0, 0.0)] for i in range(40)]
    assert not policy("infobatch")(pool_of(samples, step=10**6)).keep.all()
    assert policy("infobatch", delta=0.0)(pool_of(samples, step=0, total_steps=1)).keep.all()


@PROPERTY
@given(pools(), st.sampled_from((0.0, 0.25, 0.5, 0.9)))
def test_tailsft(given_pool, ratio):
    samples, first = given_pool
    means = [mean([nll for nll, _, _ in sample]) for sample in samples]
    rise = [f32(m - f) for m, f in zip(means, first, strict=True)]
    eligible = [math.isfinite(x) for x in rise]
    total = sum(eligible)
    kept = best(rise, eligible, total - min(round(ratio * total), total - 1))
    kept |= {i for i, x in enumerate(rise) if eligible[i] and x >= 0}
    weights = decided(policy("tailsft", drop_ratio=ratio)(pool_of(samples, first)), samples)
    assert weights == whole(samples, kept)


def test_tailsft_trains_on_all_that_it_meets_first():
    samples = [[(float(i), 0.0, 0.0)] for i in range(8)]
    assert policy("tailsft")(pool_of(samples, [float(i) for i in range(8)])).keep.all()


def ranked(values):
    return [sum(w < v for w in values) + (sum(w == v for w in values) - 1) / 2 for v in values]


def plane(samples, residual):
    """PPL and second axis of every sample; NaN where one of them is not finite (decision h)."""
    ppl = [f32(math.exp(m)) if (m := mean([t[0] for t in sample])) < 88 else m for sample in samples]
    entropy = [mean([t[1] for t in sample]) for sample in samples]
    if residual:
        on = [i for i in range(len(samples)) if math.isfinite(ppl[i]) and math.isfinite(entropy[i])]
        x, y = (torch.tensor(ranked([axis[i] for i in on]), dtype=torch.float64) for axis in (ppl, entropy))
        entropy = [NAN] * len(samples)
        if on:
            slope = torch.linalg.lstsq((x - x.mean())[:, None], (y - y.mean())[:, None], driver="gelsd").solution.item()
            for i, value in zip(on, (y - y.mean() - slope * (x - x.mean())).tolist(), strict=True):
                entropy[i] = value
    return ppl, entropy


@PROPERTY
@given(pools(), RATIOS, RATIOS, st.booleans())
def test_qtuning(given_pool, sample_ratio, token_ratio, residual):
    """The policy is triage and token pruning on its plane, which is restated; the two have tests of their own."""
    samples, _ = given_pool
    pool = pool_of(samples)
    made = POLICIES["qtuning_residual" if residual else "qtuning"](sample_ratio, token_ratio)
    decision = made(pool)
    weights = decided(decision, samples)
    ppl, entropy = plane(samples, residual)
    nan = [not (math.isfinite(p) and math.isfinite(e)) for p, e in zip(ppl, entropy, strict=True)]
    for axis, expected in ((decision.plane.ppl, ppl), (decision.plane.entropy, entropy)):
        on = [i for i, off in enumerate(nan) if not off]
        assert axis[on].tolist() == pytest.approx([expected[i] for i in on], rel=1e-5, abs=1e-5)
    assert not decision.keep[nan].any()
    triage = qk.triage_samples(decision.plane.ppl, decision.plane.entropy, sample_ratio)
    mask = qk.prune_tokens(pool.nll, pool.cu_seqlens, triage, token_ratio)
    assert [w for weight in weights for w in weight] == mask.float().tolist()
    assert torch.equal(decision.keep, triage.keep)
    assert torch.equal(decision.triage.role, triage.role)


def test_residual_axis_worked():
    """Ranks of PPL 0 1 2 3 and of entropy 1 0 3 2: slope 3/5; without a spread in PPL the ranks themselves remain."""
    rows = [[(float(i), e, 0.0)] for i, e in enumerate((0.2, 0.1, 0.4, 0.3))]
    residual = POLICIES["qtuning_residual"](0.5, 0.5).plane(pool_of(rows)).entropy
    assert residual.tolist() == pytest.approx([0.4, -1.2, 1.2, -0.4])
    flat = [[(1.0, e, 0.0)] for e in (0.2, 0.1, 0.2)]
    residual = POLICIES["qtuning_residual"](0.5, 0.5).plane(pool_of(flat)).entropy
    assert residual.tolist() == pytest.approx([0.5, -1.0, 0.5])


POISONABLE = [name for name in PRUNING if name not in ("full", "random", "longest")]
GOOD = [
    [(float(1 + (3 * i + j) % 5), float((2 * i + j) % 7), float((i + 2 * j) % 4)) for j in range(4)] for i in range(7)
]


@pytest.mark.parametrize("name", POISONABLE)
@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_one_bad_token_takes_its_sample_and_no_other(name, value):
    """Decision d: the sample goes, however many of its tokens are fine; the others fare as in a pool that has a sample
    without tokens in its place, which no policy keeps either."""
    bad = [*GOOD[:3], [*GOOD[3][:1], (value,) * 3, *GOOD[3][2:]], *GOOD[4:]]
    first = [2.0, 3.0, 1.0, 2.5, 4.0, 3.5, 2.0]
    made = policy(name, sample_ratio=0.5, token_ratio=0.5)
    one = decided(made(pool_of(bad, first)), bad)
    assert one.pop(3) == [0.0] * 4
    assert any(any(weight) for weight in one)
    if name not in ("rho1", "token_cleaning"):  # their budget counts the tokens of the pool
        empty = [*GOOD[:3], [], *GOOD[4:]]
        other = decided(made(pool_of(empty, first)), empty)
        assert other.pop(3) == []
        assert one == other


@pytest.mark.parametrize("name", PRUNING)
def test_a_pool_without_tokens_keeps_none(name):
    decision = policy(name)(pool_of([[], []]))
    assert decision.keep.tolist() == [False, False]
    assert decision.token_weight.shape == (0,)


@pytest.mark.parametrize("name", WEIGHTS_OF_THE_LOSS)
def test_weights_of_the_loss_prune_nothing(name):
    made = policy(name)
    assert not made.needs
    decision = made(pool_of([[(NAN, NAN, NAN)], [], [(1.0, 1.0, 1.0)] * 2]))
    assert decision.keep.tolist() == [True, False, True]
    assert decision.token_weight.tolist() == [1.0, 1.0, 1.0]


@PROPERTY
@given(
    st.lists(st.tuples(_VALUE | st.floats(-1e-6, 40) | _BROKEN, _VALUE | st.floats(0, 12) | st.just(-1e-7) | _BROKEN)),
    RATIOS,
)
def test_weights_of_the_loss(tokens, exponent):
    nll = torch.tensor([t[0] for t in tokens], dtype=torch.float32, requires_grad=True)
    entropy = torch.tensor([t[1] for t in tokens], dtype=torch.float32, requires_grad=True)
    expected = {"dft": [], "beyond_ll": [], "eaft": []}
    for n, h in zip(nll.tolist(), entropy.tolist(), strict=True):
        expected["dft"].append(math.exp(-n) if math.isfinite(n) else 0.0)
        expected["beyond_ll"].append(math.exp(-exponent * n) if math.isfinite(n) else 0.0)
        both = math.isfinite(n) and math.isfinite(h)
        expected["eaft"].append(min(max(h, 0.0) / 3, 1.0) ** exponent if both else 0.0)
    for name, weights in expected.items():
        made = policy(name) if name == "dft" else policy(name, exponent=exponent)
        got = made.loss_weight(nll, entropy)
        assert not got.requires_grad
        assert got.tolist() == pytest.approx(weights, rel=1e-5)


def authors_logits():
    """float64 ``[6, 20]``, as the file of the authors' numbers states."""
    i, j = torch.arange(6)[:, None], torch.arange(20)[None]
    z = ((13 * (7 * i**2 + 3 * j**2 + i * j)) % 17 - 8).float() / 2
    return z.double().requires_grad_()


@pytest.mark.parametrize(
    ("key", "name", "options"),
    [
        ("dft", "dft", {}),
        ("beyond_ll_0.5", "beyond_ll", {"exponent": 0.5}),
        ("beyond_ll_10", "beyond_ll", {"exponent": 10.0}),
        ("eaft", "eaft", {}),
        ("eaft_exponent_2", "eaft", {"exponent": 2.0}),
    ],
)
def test_weighted_losses_have_the_gradients_of_the_authors(key, name, options):
    """Of 20 logits the 20 highest are all, so that EAFT's entropy is the whole one."""
    z, labels = authors_logits(), torch.tensor(AUTHORS["labels"])
    log_p = z.log_softmax(-1)
    nll, entropy = -log_p[torch.arange(6), labels], -(log_p.exp() * log_p).sum(-1)
    loss = (policy(name, **options).loss_weight(nll, entropy) * nll).sum() / 6
    loss.backward()
    got = z.grad[torch.arange(6), labels].tolist()
    assert got == pytest.approx(AUTHORS[key]["gradient_at_label"], rel=1e-5, abs=1e-30)
    if name != "beyond_ll":  # whose loss has the same gradient and another value
        assert loss.item() == pytest.approx(AUTHORS[key]["loss"], rel=1e-5)


def kept_tokens(decision):
    return decision.token_weight.nonzero().flatten().tolist()


def test_thresholds_of_the_authors():
    z, labels = authors_logits(), torch.tensor(AUTHORS["labels"])
    nll = -z.detach().log_softmax(-1)[torch.arange(6), labels]
    samples = [[(n, 0.0, n) for n in nll.tolist()]]
    assert nll.exp().tolist() == pytest.approx(AUTHORS["stm"]["perplexity"], rel=1e-5)
    assert 0 < len(AUTHORS["stm"]["kept"]) < len(AUTHORS["profit"]["kept"]) < 6
    assert kept_tokens(policy("stm")(pool_of(samples))) == AUTHORS["stm"]["kept"]
    assert kept_tokens(policy("profit")(pool_of(samples))) == AUTHORS["profit"]["kept"]


@pytest.mark.parametrize("key", ["token_cleaning", "token_cleaning_tied"])
def test_token_cleaning_of_the_authors(key):
    case = AUTHORS[key]
    pairs = zip(case["base"], case["reference"], strict=True)
    samples = [[(n, 0.0, r) for n, r in zip(base, reference, strict=True)] for base, reference in pairs]
    weights = decided(policy("token_cleaning", token_ratio=case["token_ratio"])(pool_of(samples)), samples)
    assert [[i, j] for i, weight in enumerate(weights) for j, w in enumerate(weight) if w] == case["kept"]


def test_infobatch_of_the_authors():
    """They draw how many stay, ⌊(1−r)·n⌋, we whether each does: the same samples are in danger, at the same weight."""
    case = AUTHORS["infobatch"]
    theirs = torch.tensor(case["weights"])
    samples = [[(n, 0.0, 0.0)] for n in case["mean_nll"]]
    infobatch = policy("infobatch", prune_ratio=case["prune_ratio"])
    ours = torch.stack([infobatch(pool_of(samples, seed=seed)).token_weight for seed in range(64)])
    safe = (theirs == 1).all(0)
    assert torch.equal(safe, (ours == 1).all(0))
    assert set(theirs[:, ~safe].flatten().tolist()) == set(ours[:, ~safe].flatten().tolist()) == {0.0, 2.5}


@pytest.mark.parametrize("ratio", list(AUTHORS["tailsft"]["kept"]))
def test_tailsft_of_trl(ratio):
    case = AUTHORS["tailsft"]
    pool = pool_of([[(n, 0.0, 0.0)] for n in case["mean_nll"]], case["first_nll"])
    assert policy("tailsft", drop_ratio=float(ratio))(pool).keep.tolist() == case["kept"][ratio]


@pytest.mark.parametrize(
    ("name", "option", "value", "error", "accepted"),
    [
        ("random", "token_share", 0.0, ValueError, r"a number in \(0, 1\]"),
        ("infobatch", "prune_ratio", 1.0, ValueError, r"a number in \[0.0, 1.0\)"),
        ("infobatch", "delta", -0.1, ValueError, r"a number in \[0, 1\]"),
        ("ppl", "samples", "qtuning", ValueError, "'full', 'random', 'longest', 'entropy'"),
        ("stm", "threshold", 0.9, ValueError, r"a number in \[1.0, inf\)"),
        ("profit", "threshold", NAN, ValueError, r"a number in \[0, 1\]"),
        ("beyond_ll", "exponent", -1.0, ValueError, r"a number in \[0.0, inf\)"),
        ("eaft", "exponent", "one", TypeError, "a number"),
        ("tailsft", "drop_ratio", INF, ValueError, r"a number in \[0.0, 1.0\)"),
    ],
)
def test_bad_options(name, option, value, error, accepted):
    with pytest.raises(error, match=f"{option} is {value!r}; accepted: {accepted}"):
        policy(name, **{option: value})


def test_unknown_options_and_policies():
    with pytest.raises(ValueError, match=r"policy_options has \['share'\]; accepted for rho1: \['token_ratio'\]"):
        policy("rho1", share=0.5)
    with pytest.raises(ValueError, match="policy is 'rho2'; accepted: full, random"):
        policy("rho2")


DOCUMENT = (Path(__file__).parents[2] / "docs" / "policies.md").read_text()


def test_the_documents_table():
    """Names in the registry's order, needs, weighted and source are those of the classes."""
    rows = [
        [cell.strip() for cell in line.split("|")[1:-1]] for line in DOCUMENT.splitlines() if line.startswith("| `")
    ]
    for row, (name, made) in zip(rows, POLICIES.items(), strict=True):
        assert row[0] == f"`{name}`"
        assert row[3] == (", ".join(sorted(made.needs, key=lambda need: (need == "reference_nll", need))) or "–")
        assert row[4] == ("yes" if made.weighted else "no")
        number = made.source.removeprefix("arXiv ")
        assert row[5] == (
            f"[{number}](https://arxiv.org/abs/{number})" if number != made.source else made.source or "–"
        )


def test_the_policy_of_ones_own():
    """By name as the command line gives it; the document quotes the file."""
    samples = [[(n, 0.0, 0.0)] * 2 for n in (0.25, 0.5, 2.0, 2.75)] + [[]]
    by_name = policy("examples.own_policy:Band", most=2.0)
    assert by_name(pool_of(samples)).keep.tolist() == [False, True, True, False, False]
    assert (by_name.needs, by_name.weighted) == ({"nll"}, False)
    source = (Path(__file__).parents[2] / "examples" / "own_policy.py").read_text()
    assert source[source.index("@dataclass") :] in DOCUMENT
