"""`token_stats` on every backend, against float64, and one test for each defect that others shipped."""

import itertools

import pytest
import torch

import qtuning_kernels as qk

from . import truth

HALF = (torch.bfloat16, torch.float16)
DTYPES = (torch.float32, torch.float64, *HALF)
# one column; fewer than a vector; several vectors; odd and over a block; GPT-2's, which no tile divides
VOCABULARIES = (1, 7, 1000, 4097, 50257)
SCALINGS = ({}, {"logit_scale": 0.3}, {"softcap": 5.0}, {"logit_scale": 2.0, "softcap": 30.0})


def make(dtype, vocabulary, shape=(2, 4), scale=4.0):
    """Logits and labels of tokens that hesitate (the first and the third), one that is ignored, and confident ones."""
    logits = torch.randn(*shape, vocabulary, dtype=torch.float64) * scale
    labels = torch.randint(0, vocabulary, shape)
    labels.view(-1)[1] = -100
    if vocabulary > 1:
        make_confident(logits.view(-1, vocabulary)[3:], labels.view(-1)[3:])
    return logits.to(dtype), labels


def make_confident(logits, labels, margin=9.0, **scaling):
    """Give every label p of about 1 − e^−margin, fine-tuning's usual token, by its own logit; in place."""
    z = truth.scaled(logits, **scaling).scatter(-1, labels.unsqueeze(-1), -torch.inf)
    target = torch.logsumexp(z, -1, keepdim=True) + margin
    if cap := scaling.get("softcap"):
        target = cap * torch.atanh(target / cap)
    logits.scatter_(-1, labels.unsqueeze(-1), target / scaling.get("logit_scale", 1.0))


def assert_confident(logits, labels, **scaling):
    """A median p(label) over 0.999, read from the values as they were rounded."""
    assert truth.p_label(logits, labels, **scaling).median() > 0.999


def upstreams(shape):
    """A different gradient for every token and output, with one token pruned."""
    gradients = torch.randn(3, *shape, dtype=torch.float64)
    gradients.view(3, -1)[:, -1] = 0
    return list(gradients)


def accumulation(dtype):
    return torch.float64 if dtype == torch.float64 else torch.float32


def test_criterion_sees_small_entries():
    """Almost all of a gradient's entries are below 1e-6: an absolute bound of 1e-6, or one relative to 1, let any value
    of theirs pass. Wrong by 1 % they fail, and so do the label's entry and each class alone; PyTorch's own pass."""
    for dtype, vocabulary in itertools.product((torch.float32, torch.float64), (1000, 50257)):
        logits, labels = make(dtype, vocabulary)
        upstream = upstreams(labels.shape)
        terms = truth.logit_terms(logits, labels, upstream)

        def grad(x, labels=labels, upstream=upstream):
            return truth.grads(lambda y: truth.stats(y, labels), [x], upstream)[0]

        same, expected = grad(logits), grad(logits.double())
        truth.assert_grad_no_worse("grad", same, same, expected, terms)
        small = (same.abs() < 1e-6) & (same != 0)
        assert small.float().mean() > 0.5
        for mask in (small, *terms.classes.values(), terms.classes["small"] & (same.abs() > 1e-8)):
            assert mask.any()
            with pytest.raises(AssertionError, match="of an entry's terms"):
                truth.assert_grad_no_worse("grad", torch.where(mask, same * 1.01, same), same, expected, terms)
        pruned = same.clone()
        pruned[-1, -1, 0] = 1e-30
        with pytest.raises(AssertionError, match="error inf"):
            truth.assert_grad_no_worse("grad", pruned, same, expected, terms)


@pytest.mark.parametrize("dtype", HALF)
def test_half_precision_criterion_sees_small_entries(dtype):
    """One unit in the last place, added to the entries under 1e-6 alone, fails in bfloat16; in float16 all of them are
    subnormal. The rounded truth itself passes."""
    logits, labels = make(dtype, 50257)
    upstream = upstreams(labels.shape)
    terms = truth.logit_terms(logits, labels, upstream)
    (expected,) = truth.grads(lambda y: truth.stats(y, labels), [logits.double()], upstream)
    rounded = expected.to(dtype)
    truth.assert_grad_rounded_once("grad", rounded, expected, terms)
    small = (rounded.abs() < 1e-6) & (rounded != 0)
    assert small.any()
    next_one = (rounded.view(torch.int16) + 1).view(dtype)
    with pytest.raises(AssertionError, match="units in the last place"):
        truth.assert_grad_rounded_once("grad", torch.where(small, next_one, rounded), expected, terms)


def test_criterion_sees_confident_statistics():
    """nll of a confident token is 1e-4: relative to 1 nat, an error of 1 % was no error."""
    logits, labels = make(torch.float32, 1000)
    same, expected = truth.stats(logits, labels), truth.stats(logits.double(), labels)
    for a, e in zip(same[:2], expected[:2], strict=True):
        truth.assert_no_worse("statistic", a, a, e)
        confident = (e > 0) & (e < 1e-2)
        assert confident.any()
        with pytest.raises(AssertionError, match="error"):
            truth.assert_no_worse("statistic", torch.where(confident, a * 1.01, a), a, e)


def assert_stats(actual, logits, labels, **scaling):
    expected = truth.stats(logits.double(), labels, **scaling)
    same = truth.stats(logits.to(accumulation(logits.dtype)), labels, **scaling)
    for name, a, s, e in zip(qk.TokenStats._fields, actual, same, expected, strict=True):
        assert a.dtype == accumulation(logits.dtype)
        assert a.shape == labels.shape
        truth.assert_no_worse(name, a, s, e)


def truncates(backend):
    """Triton's interpreter truncates to bfloat16 where hardware rounds to nearest even."""
    return backend == "triton"


def assert_grad(backend, actual, logits, labels, upstream, **scaling):
    def run(x):
        return truth.stats(x, labels, **scaling)

    (expected,) = truth.grads(run, [logits.double()], upstream)
    terms = truth.logit_terms(logits, labels, upstream, **scaling)
    assert actual.dtype == logits.dtype
    assert actual.shape == logits.shape
    if logits.dtype in HALF:
        ulps = 1.01 if truncates(backend) and logits.dtype == torch.bfloat16 else 0.51
        truth.assert_grad_rounded_once("grad", actual, expected, terms, ulps)
    else:
        (same,) = truth.grads(run, [logits], upstream)
        truth.assert_grad_no_worse("grad", actual, same, expected, terms)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocabulary", VOCABULARIES)
def test_forward(backend, dtype, vocabulary):
    logits, labels = make(dtype, vocabulary)
    assert_confident(logits, labels)
    assert_stats(qk.token_stats(logits, labels), logits, labels)


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocabulary", VOCABULARIES)
def test_backward(backend, dtype, vocabulary, inplace):
    logits, labels = make(dtype, vocabulary)
    upstream = upstreams(labels.shape)
    x = logits.clone().requires_grad_()
    truth.objective(qk.token_stats(x, labels, inplace_backward=inplace), upstream).backward()
    assert_grad(backend, x.grad, logits, labels, upstream)
    if inplace:
        assert torch.equal(x.detach(), x.grad)
    else:
        assert torch.equal(x.detach(), logits)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scaling", SCALINGS, ids=str)
def test_scaling(backend, dtype, scaling):
    logits, labels = make(torch.float64, 1000, scale=4.0 / scaling.get("logit_scale", 1.0))
    if scaling.get("softcap") != 5.0:  # 1000 logits between −5 and 5 leave no token confident
        make_confident(logits.view(8, -1)[3:], labels.view(-1)[3:], **scaling)
        assert_confident(logits.to(dtype), labels, **scaling)
    logits = logits.to(dtype)
    upstream = upstreams(labels.shape)
    x = logits.clone().requires_grad_()
    stats = qk.token_stats(x, labels, **scaling)
    assert_stats([s.detach() for s in stats], logits, labels, **scaling)
    truth.objective(stats, upstream).backward()
    assert_grad(backend, x.grad, logits, labels, upstream, **scaling)


@pytest.mark.parametrize("only", [0, 1, 2])
def test_each_upstream_alone(backend, only):
    """Entropy's gradient dropped (TRL): a loss on entropy alone would then have gradient 0."""
    logits, labels = make(torch.float32, 1000)
    assert_confident(logits, labels)
    upstream = [g if i == only else torch.zeros_like(g) for i, g in enumerate(upstreams(labels.shape))]
    x = logits.clone().requires_grad_()
    (qk.token_stats(x, labels)[only] * upstream[only].float()).sum().backward()
    assert x.grad.abs().max() > 1e-3
    assert_grad(backend, x.grad, logits, labels, upstream)


def test_upstream_gradient_is_per_token(backend):
    """A per-token upstream gradient read as a scalar (Liger #488, #678, #968): with weights 1, 2, 3 every
    row would carry the first token's weight, and a uniform gradient would hide it."""
    logits, _ = make(torch.float32, 100, shape=(3,))
    labels = torch.tensor([3, 5, 7])
    make_confident(logits[1:], labels[1:])
    assert_confident(logits, labels)
    x = logits.clone().requires_grad_()
    weights = torch.tensor([1.0, 2.0, 3.0])
    (qk.token_stats(x, labels).nll * weights).sum().backward()
    assert_grad(backend, x.grad, logits, labels, [weights, torch.zeros(3), torch.zeros(3)])


def test_expanded_upstream_gradient(backend):
    """`.sum().backward()` hands down a stride-0 gradient: indexed as if dense it reads past its end."""
    logits, labels = make(torch.float32, 50, shape=(4, 5))
    assert_confident(logits, labels)
    x = logits.clone().requires_grad_()
    qk.token_stats(x, labels).nll.sum().backward()
    ones = [torch.ones(labels.shape), torch.zeros(labels.shape), torch.zeros(labels.shape)]
    assert_grad(backend, x.grad, logits, labels, ones)


@pytest.mark.parametrize("offset", [1e4, -1e4])
def test_common_offset(backend, offset):
    """Unshifted entropy cancels under a common offset, and e^(z − lse) with a rounded lse is wrong by 10⁻³.

    The offset is a multiple of the logits' spacing, so the shifted logits are exact and only our arithmetic
    is measured.
    """
    logits, labels = make(torch.float32, 1000, shape=(6,))
    logits = torch.round(logits * 256) / 256 + offset
    assert_confident(logits, labels)
    x = logits.clone().requires_grad_()
    stats = qk.token_stats(x, labels)
    assert_stats([s.detach() for s in stats], logits, labels)
    upstream = upstreams(labels.shape)
    truth.objective(stats, upstream).backward()
    assert_grad(backend, x.grad, logits, labels, upstream)


def test_all_negative_logits(backend):
    """A running maximum that starts at 0 (verl #7439): at −200 every exponential would underflow, S = 0."""
    logits = -200 - torch.rand(4, 777)
    labels = torch.randint(0, 777, (4,))
    assert_stats(qk.token_stats(logits, labels), logits, labels)


@pytest.mark.parametrize("vocabulary", [5, 129, 1000, 2049, 4100])
def test_tail_of_the_vocabulary(backend, vocabulary):
    """A vocabulary that is no multiple of the tile (verl #2899): with all the mass in the last column, a
    tail that is skipped or padded with 0 moves nll from about 0 to over 30."""
    logits = torch.full((3, vocabulary), -30.0)
    logits[:, -1] = 3.0
    labels = torch.tensor([vocabulary - 1, 0, vocabulary - 2])
    assert_stats(qk.token_stats(logits, labels), logits, labels)


def test_minus_infinity(backend):
    """Masked logits: 0·−inf would be NaN in entropy and in every gradient. Also for a whole first block."""
    logits = torch.randn(3, 5000)
    logits[0, ::2] = -torch.inf
    logits[1, :4500] = -torch.inf
    logits[2, 10:] = -torch.inf
    labels = torch.tensor([1, 4600, 3])
    make_confident(logits[1:], labels[1:])
    assert_confident(logits, labels)
    x = logits.clone().requires_grad_()
    stats = qk.token_stats(x, labels)
    assert_stats([s.detach() for s in stats], logits, labels)
    upstream = upstreams(labels.shape)
    truth.objective(stats, upstream).backward()
    assert torch.isfinite(x.grad).all()
    assert (x.grad[torch.isneginf(logits)] == 0).all()
    p = torch.softmax(logits.double(), -1)
    surprise = torch.where(p == 0, 0.0, p * (p.log() - torch.xlogy(p, p).sum(-1, keepdim=True)))
    g_nll, g_entropy, g_lse = (g.unsqueeze(-1) for g in upstream)
    one_hot = torch.nn.functional.one_hot(labels, 5000)
    expected = g_nll * (p - one_hot) - g_entropy * surprise + g_lse * p
    # PyTorch's own gradient of entropy is NaN here
    terms = truth.logit_terms(logits, labels, upstream)
    truth.assert_grad_no_worse("grad", x.grad, expected, expected, terms)


def test_ignored_rows_hold_anything(backend):
    """An ignored token is 0 in every output and its gradient exactly 0, whatever its logits hold."""
    logits = torch.randn(4, 300)
    logits[1], logits[2], logits[3] = torch.nan, torch.inf, -torch.inf
    labels = torch.tensor([5, -100, -100, -100])
    x = logits.clone().requires_grad_()
    stats = qk.token_stats(x, labels)
    assert all((s[1:] == 0).all() for s in stats)
    sum(s.sum() for s in stats).backward()
    assert (x.grad[1:] == 0).all()
    assert x.grad[0].abs().max() > 0


@pytest.mark.parametrize("inplace", [False, True])
def test_pruned_rows_hold_anything(backend, inplace):
    """A pruned token (upstream 0) has gradient exactly 0 even where 0·p would be NaN."""
    logits = torch.randn(3, 300)
    logits[1] = torch.nan
    x = logits.clone().requires_grad_()
    nll = qk.token_stats(x, torch.tensor([5, 6, 7]), inplace_backward=inplace).nll
    nll.backward(torch.tensor([1.0, 0.0, -0.0]))
    assert (x.grad[1:] == 0).all()
    assert torch.isfinite(x.grad[0]).all()


def test_nan_is_not_hidden(backend):
    """A live row with a NaN has NaN statistics: a maximum that skips NaN must not pass for a finite row."""
    for position in (0, 150, 299):
        logits = torch.randn(2, 300)
        logits[1, position] = torch.nan
        stats = qk.token_stats(logits, torch.tensor([5, 6]))
        assert all(torch.isfinite(s[0]) and torch.isnan(s[1]) for s in stats), position


def test_all_rows_ignored(backend):
    """All rows ignored: no division by their number, and the graph still reaches the parameters."""
    logits, _ = make(torch.float32, 100)
    x = logits.clone().requires_grad_()
    loss = qk.token_stats(x, torch.full((2, 4), -100)).nll.sum()
    loss.backward()
    assert loss.item() == 0
    assert torch.equal(x.grad, torch.zeros_like(x))


def test_no_rows(backend):
    x = torch.empty(0, 3, 50, requires_grad=True)
    stats = qk.token_stats(x, torch.empty(0, 3, dtype=torch.long))
    stats.nll.sum().backward()
    assert stats.nll.shape == (0, 3)
    assert x.grad.shape == x.shape


@pytest.mark.parametrize("inplace", [False, True])
def test_input_survives_unless_asked(backend, inplace):
    """Logits overwritten although nobody asked, also in evaluation (Liger #343, unsloth #5002)."""
    logits, labels = make(torch.float32, 100)
    for grad_mode in (torch.no_grad(), torch.enable_grad()):
        with grad_mode:
            x = logits.clone().requires_grad_()
            qk.token_stats(x, labels, inplace_backward=inplace)
            assert torch.equal(x, logits)


def layouts(dtype):
    """[A, C, V] views with odd row starts, gaps, a shifted sequence, and rows far apart."""
    wide = (torch.randn(2, 6, 130, dtype=torch.float64) * 4).to(dtype)
    return {
        "shifted": wide[:, :-1],
        "every second": wide[:, ::2],
        "odd row stride": wide[..., :127],
        "odd row start": wide[..., 3:],
        "transposed": wide.transpose(0, 1),
        "four dimensions": wide.view(2, 3, 2, 130),
        "one row": wide[0, 0],
    }


def rounded_confident(view, labels):
    logits = view.double()
    make_confident(logits, labels)
    assert_confident(logits.to(view.dtype), labels)
    return logits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", layouts(torch.float32))
@pytest.mark.parametrize("inplace", [False, True])
def test_layouts(backend, dtype, layout, inplace):
    view = layouts(dtype)[layout]
    labels = torch.randint(0, view.shape[-1], view.shape[:-1])
    upstream = upstreams(labels.shape) if labels.numel() > 1 else [torch.randn(()).double() for _ in range(3)]
    view.copy_(rounded_confident(view, labels))
    expected_input = view.clone()
    holder = view.detach().requires_grad_()
    stats = qk.token_stats(holder, labels, inplace_backward=inplace)
    assert_stats([s.detach() for s in stats], expected_input, labels)
    truth.objective(stats, upstream).backward()
    assert_grad(backend, holder.grad, expected_input, labels, upstream)


def test_more_rows_than_a_grid_s_other_axes_hold(backend):
    """Rows on any axis but the first end at 65,535 blocks."""
    if backend in ("triton", "cuda") and not torch.empty(0).is_cuda:
        pytest.skip("interpreted or emulated it takes minutes; test_rows_are_on_the_first_axis_of_the_grid")
    logits, labels = torch.randn(65_537, 3, dtype=torch.float64).requires_grad_(), torch.arange(65_537) % 3
    stats = qk.token_stats(logits, labels)
    stats.nll.sum().backward()
    expected = torch.log_softmax(logits.detach(), -1)
    torch.testing.assert_close(stats.nll.detach(), -expected.gather(-1, labels[:, None])[:, 0])
    torch.testing.assert_close(logits.grad, expected.exp() - torch.nn.functional.one_hot(labels, 3))


def test_inplace_backward_leaves_the_neighbourhood_alone(backend):
    """Vector stores at an odd row start must not touch what lies between the rows."""
    for dtype in (torch.float32, torch.bfloat16):
        buffer = torch.randn(5, 141).to(dtype)
        before = buffer.clone()
        view = buffer[1:4, 5:136]
        holder = view.detach().requires_grad_()
        qk.token_stats(holder, torch.tensor([1, 2, 3]), inplace_backward=True).nll.sum().backward()
        outside = torch.ones_like(buffer, dtype=torch.bool)
        outside[1:4, 5:136] = False
        assert torch.equal(buffer[outside], before[outside])
        assert not torch.equal(buffer, before)


def test_row_offset_over_32_bits(backend, monkeypatch):
    """N·V > 2³¹ (Liger #803): a 32-bit offset of the second row wraps around. The rows lie 2³¹ + 8 elements
    apart in memory that is never touched in between."""
    apart, vocabulary = 2**31 + 8, 64
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    buffer = torch.empty(apart + vocabulary, dtype=torch.bfloat16)
    view = buffer.as_strided((2, vocabulary), (apart, 1))
    values = torch.randn(2, vocabulary).bfloat16()
    labels = torch.tensor([3, 5])
    values = rounded_confident(values, labels).bfloat16()
    view.copy_(values)
    holder = view.detach().requires_grad_()
    stats = qk.token_stats(holder, labels, inplace_backward=True)
    assert_stats([s.detach() for s in stats], values, labels)
    upstream = [torch.tensor([1.0, 2.0]).double(), torch.zeros(2).double(), torch.zeros(2).double()]
    truth.objective(stats, upstream).backward()
    assert_grad(backend, view.clone(), values, labels, upstream)


def test_int32_labels_and_other_ignore_index(backend):
    logits, labels = make(torch.float32, 100)
    labels[labels == -100] = 7
    stats = qk.token_stats(logits, labels.int(), ignore_index=7)
    expected = truth.stats(logits.double(), labels, ignore_index=7)
    assert (labels == 7).any()
    for s, e in zip(stats, expected, strict=True):
        torch.testing.assert_close(s.double(), e, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("scaling", [{}, {"softcap": 3.0, "logit_scale": 0.5}], ids=str)
def test_gradcheck(backend, scaling):
    logits, labels = make(torch.float64, 7, shape=(2, 3))
    logits.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: qk.token_stats(x, labels, **scaling), logits)


@pytest.mark.parametrize("inplace", [False, True])
def test_compiles_to_one_graph(inplace):
    """The compiler sees the dispatcher's operators, whatever backend serves them."""
    logits, labels = make(torch.float32, 50)

    def loss(x):
        stats = qk.token_stats(x * 2, labels, inplace_backward=inplace)
        return stats.nll.sum() + 0.5 * stats.entropy.sum() + stats.lse.sum()

    eager, compiled = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    loss(eager).backward()
    torch.compile(loss, fullgraph=True, backend="aot_eager")(compiled).backward()
    torch.testing.assert_close(compiled.grad, eager.grad)


def test_operators_obey_their_schemas(backend):
    """opcheck: mutation, aliasing, and fakes that agree with what comes out."""
    logits, labels = make(torch.float32, 50)
    scaling = (-100, 1.0, None)
    ops = torch.ops.qtuning_kernels
    utilities = ("test_schema", "test_faketensor")
    torch.library.opcheck(ops.token_stats, (logits, labels, *scaling), test_utils=utilities)
    _, *stats = ops.token_stats(logits, labels, *scaling)
    g = torch.randn(labels.shape)
    for operator in (ops.token_stats_backward, ops.token_stats_backward_):
        torch.library.opcheck(operator, (logits, labels, *stats, g, None, g, *scaling), test_utils=utilities)


def test_impossible_label_below_the_check(backend):
    """The operator itself, as torch.compile calls it, answers NaN rather than read out of bounds."""
    logits = torch.randn(1, 3, 50)
    labels = torch.tensor([[50, -7, 4]])
    nll, *stats = torch.ops.qtuning_kernels.token_stats(logits, labels, -100, 1.0, None)
    assert torch.isnan(nll).tolist() == [[True, True, False]]
    ones = torch.ones(1, 3)
    grad = torch.ops.qtuning_kernels.token_stats_backward(logits, labels, *stats, ones, None, None, -100, 1.0, None)
    assert torch.isnan(grad[0, :2]).all()
    assert torch.isfinite(grad[0, 2]).all()
