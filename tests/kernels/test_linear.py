"""`linear_token_stats` and `linear_cross_entropy` on every backend, against float64."""

import pytest
import torch
from torch.nn.functional import linear

import qtuning_kernels as qk
from qtuning_kernels.kernels import linear_chunks

from . import truth
from .test_token_stats import HALF, truncates, upstreams

DTYPES = (torch.float32, torch.float64, *HALF)
# rows, hidden size and vocabulary: one column, odd, and GPT-2's; test_token_stats.py has others for the row operators
SHAPES = ((5, 16, 1), (33, 64, 1001), (3, 40, 50257))


def make(dtype, rows, size, vocabulary, bias=False):
    hidden = torch.randn(rows, size, dtype=torch.float64).to(dtype)
    weight = (torch.randn(vocabulary, size, dtype=torch.float64) * 2 / size**0.5).to(dtype)
    labels = torch.randint(0, vocabulary, (rows,))
    labels[1] = -100
    return hidden, weight, torch.randn(vocabulary, dtype=torch.float64).to(dtype) if bias else None, labels


def make_confident(dtype, rows, size, vocabulary, bias=False):
    """Hidden states along the rows of their labels, by logits of 18, until the median p(label) is over 0.999."""
    _, weight, bias, _ = make(torch.float64, rows, size, vocabulary, bias)
    labels = torch.randint(0, vocabulary, (rows,))
    hidden = 18 * weight[labels] / weight[labels].square().sum(-1, keepdim=True) + torch.randn(rows, size).double() / 8
    hidden, weight, bias = (x if x is None else x.to(dtype) for x in (hidden, weight, bias))
    assert truth.p_label(linear(hidden, weight, bias), labels).median() > 0.999
    labels[1] = -100
    return hidden, weight, bias, labels


def loss_scale(dtype):
    """float16 is trained under one: without it p under 6e-8 is lost, and which of two results is nearer is luck."""
    return 1024.0 if dtype == torch.float16 else 1.0


def torch_stats(labels, **scaling):
    """PyTorch at the same dtype: logits of the operands' dtype, then float32 statistics of them."""

    def stats(hidden, weight, bias=None):
        logits = linear(hidden, weight, bias)
        return truth.stats(logits.float() if logits.dtype in HALF else logits, labels, **scaling)

    return stats


def assert_half(backend, dtype, name, actual, same, expected, scale):
    """Half precision rounds the logits, and so does PyTorch: which of the two has the larger maximum is a matter of
    luck, since products of more rows, or in more threads, sum in another order. Epsilon is therefore half a unit in
    the last place of the scale, that of the logits (a whole one where the interpreter truncates)."""
    epsilon = torch.finfo(dtype).eps * (1.0 if truncates(backend) else 0.5)
    scale = scale.clamp(min=1e-12)
    ours = ((actual.double() - expected).abs().max() / scale).item()
    theirs = ((same.double() - expected).abs().max() / scale).item()
    assert ours <= theirs + epsilon, f"{name}: error {ours:.3g}, PyTorch's {theirs:.3g} + {epsilon:.3g}"


def assert_stats(backend, actual, hidden, weight, bias, labels, **scaling):
    doubles = [x if x is None else x.double() for x in (hidden, weight, bias)]
    expected = torch_stats(labels, **scaling)(*doubles)
    same = torch_stats(labels, **scaling)(hidden, weight, bias)
    scale = linear(*doubles).abs().max()
    for name, a, s, e in zip(qk.TokenStats._fields, actual, same, expected, strict=True):
        assert a.shape == labels.shape
        if hidden.dtype in HALF:
            assert_half(backend, hidden.dtype, name, a, s, e, scale)
        else:
            truth.assert_no_worse(name, a, s, e)


def assert_grads(backend, actual, operands, expected, same, labels, upstream, **scaling):
    """Half precision by rows, since the logits and their gradient are rounded, PyTorch's too; else by entries."""
    three = [*operands, None][:3]  # a bias or none
    half = operands[0].dtype in HALF
    measure = (truth.row_scales if half else truth.linear_terms)(*three, labels, upstream, **scaling)
    for name, a, x, s, e, m in zip(
        ("hidden", "weight", "bias"), actual, operands, same, expected, measure, strict=False
    ):
        assert a.dtype == x.dtype
        assert a.shape == x.shape
        if half:
            truth.assert_rows_no_worse(name, a, s, e, m, 2.0 if truncates(backend) else 1.0)
        else:
            truth.assert_grad_no_worse(name, a, s, e, m)


def of_loss(token_weight, scale=0.7):
    """The upstream gradients of nll, entropy and lse that a weighted sum of nll hands down."""
    return scale * token_weight.double(), *(torch.zeros(2, *token_weight.shape, dtype=torch.float64))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("bias", [False, True])
def test_stats(backend, dtype, shape, bias):
    hidden, weight, bias, labels = make(dtype, *shape, bias=bias)
    stats = qk.linear_token_stats(hidden, weight, labels, bias=bias)
    assert_stats(backend, stats, hidden, weight, bias, labels)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scaling", [{}, {"logit_scale": 0.3, "softcap": 4.0}], ids=str)
@pytest.mark.parametrize("construct", [make, make_confident])
def test_stats_backward(backend, dtype, scaling, construct):
    *operands, labels = construct(dtype, 33, 64, 1000, bias=True)
    upstream = [loss_scale(dtype) * g for g in upstreams(labels.shape)]

    def ours(hidden, weight, bias):
        return qk.linear_token_stats(hidden, weight, labels, bias=bias, **scaling)

    actual = truth.grads(ours, operands, upstream)
    expected = truth.grads(torch_stats(labels, **scaling), [x.double() for x in operands], upstream)
    same = truth.grads(torch_stats(labels, **scaling), operands, upstream)
    assert_grads(backend, actual, operands, expected, same, labels, upstream, **scaling)


def torch_loss(labels, token_weight, **scaling):
    def loss(hidden, weight, bias=None):
        nll = torch_stats(labels, **scaling)(hidden, weight, bias)[0]
        return (nll * token_weight.to(nll.dtype)).sum(), torch.zeros(())

    return loss


LOSS_UPSTREAM = [torch.tensor(0.7, dtype=torch.float64), torch.zeros(())]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("construct", "shape", "scaling"),
    [
        *((make, shape, scaling) for shape in SHAPES for scaling in ({}, {"logit_scale": 0.3, "softcap": 4.0})),
        (make_confident, SHAPES[1], {}),
    ],
    ids=lambda x: getattr(x, "__name__", str(x)),
)
def test_cross_entropy(backend, dtype, construct, shape, scaling):
    """Non-uniform weights, one of them 0 and one negative, and an upstream gradient that is not 1, but a power of two:
    bfloat16's gradients are computed before it is known, and any other would round them once more than PyTorch does."""
    upstream = [torch.tensor(0.5, dtype=torch.float64), torch.zeros(())]
    *operands, labels = construct(dtype, *shape, bias=True)
    token_weight = torch.rand(labels.shape[0]) * (loss_scale(dtype) if construct is make_confident else 1.0)
    token_weight[0], token_weight[2] = 0.0, -0.5

    def ours(hidden, weight, bias):
        loss = qk.linear_cross_entropy(hidden, weight, labels, bias=bias, token_weight=token_weight, **scaling)
        assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        return loss, torch.zeros(())

    reference = torch_loss(labels, token_weight, **scaling)
    doubles = [x.double() for x in operands]
    actual, expected = ours(*operands)[0], reference(*doubles)[0]
    same = reference(*operands)[0]
    (
        assert_half(backend, dtype, "loss", actual, same, expected, expected.abs())
        if dtype in HALF
        else truth.assert_no_worse("loss", actual, same, expected)
    )
    # a product of one row sums in another order than one of several, with ten times the error on some processors
    active = (token_weight != 0) & (labels != -100)
    of_active = torch_loss(labels[active], token_weight[active], **scaling)
    assert_grads(
        backend,
        truth.grads(ours, operands, upstream),
        operands,
        truth.grads(reference, doubles, upstream),
        truth.grads(lambda hidden, *others: of_active(hidden[active], *others), operands, upstream),
        labels,
        of_loss(token_weight, 0.5),
        **scaling,
    )


@pytest.mark.parametrize("needs", [(1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 0), (0, 0, 0)])
def test_only_the_gradients_that_are_needed(backend, needs):
    """A frozen head (LoRA), a frozen body, a trained bias alone; and none at all."""
    *operands, labels = make(torch.float64, 9, 8, 30, bias=True)
    full = [x.clone().requires_grad_() for x in operands]
    some = [x.clone().requires_grad_(bool(need)) for x, need in zip(operands, needs, strict=True)]
    for function in (qk.linear_cross_entropy, lambda *a, **k: qk.linear_token_stats(*a, **k).nll.sum()):
        for leaves in (full, some):
            for leaf in leaves:
                leaf.grad = None
            loss = function(leaves[0], leaves[1], labels, bias=leaves[2])
            assert loss.requires_grad == any(leaf.requires_grad for leaf in leaves)
            if loss.requires_grad:
                loss.backward()
        for need, a, e in zip(needs, some, full, strict=True):
            if need:
                torch.testing.assert_close(a.grad, e.grad, rtol=1e-12, atol=1e-14)
            else:
                assert a.grad is None


def test_zero_weight_rows_hold_anything(backend):
    """Pruned and ignored rows take no part, even where their hidden states are NaN or infinite."""
    hidden, weight, _, labels = make(torch.float32, 6, 8, 40)
    labels[:] = torch.arange(6)
    labels[4] = -100
    poisoned = hidden.clone()
    poisoned[2], poisoned[4] = torch.nan, torch.inf
    token_weight = torch.tensor([1.0, 0.5, 0.0, 2.0, 1.0, -0.0])
    results = []
    for h in (hidden, poisoned):
        h, w = h.clone().requires_grad_(), weight.clone().requires_grad_()
        loss = qk.linear_cross_entropy(h, w, labels, token_weight=token_weight)
        loss.backward()
        results.append((loss.detach(), h.grad, w.grad))
    assert all(torch.isfinite(x).all() for x in results[1])
    for clean, other in zip(*results, strict=True):
        torch.testing.assert_close(clean, other)
    assert (results[1][1][[2, 4, 5]] == 0).all()

    h, w = poisoned.clone().requires_grad_(), weight.clone().requires_grad_()
    qk.linear_token_stats(h, w, labels).nll.backward(token_weight)
    assert (h.grad[[2, 4, 5]] == 0).all()
    torch.testing.assert_close(w.grad, results[0][2])


def test_nothing_to_learn(backend):
    """All rows ignored or none at all: loss 0, zero gradients, and a graph that still holds the parameters
    (without it a data-parallel run waits for a gradient that never comes)."""
    for rows in (0, 4):
        hidden = torch.randn(rows, 8, requires_grad=True)
        weight = torch.randn(30, 8, requires_grad=True)
        labels = torch.full((rows,), -100)
        loss = qk.linear_cross_entropy(hidden, weight, labels)
        loss.backward()
        assert loss.item() == 0
        assert torch.equal(hidden.grad, torch.zeros_like(hidden))
        assert torch.equal(weight.grad, torch.zeros_like(weight))


def test_head_gradient_accumulates_in_float32(backend):
    """Low-precision accumulation of the head's gradient (Liger #512, #827). 4096 equal rows of weight 2⁻¹²
    add up to one row's gradient; summed chunk by chunk in bfloat16, additions below half a unit in the last
    place are lost, and the sum stalls near 2⁻⁴ of it."""
    hidden = torch.ones(4096, 8, dtype=torch.bfloat16)
    weight = torch.zeros(16, 8, dtype=torch.bfloat16, requires_grad=True)
    labels = torch.zeros(4096, dtype=torch.long)
    qk.linear_cross_entropy(hidden, weight, labels, token_weight=torch.full((4096,), 2.0**-12)).backward()
    expected = torch.full((16, 8), 1 / 16)
    expected[0] -= 1
    torch.testing.assert_close(weight.grad.float(), expected, rtol=2**-8, atol=0)


@pytest.fixture
def rows_at_a_time(monkeypatch):
    """Limits the workspace of logits to so many rows."""

    def limit(rows, vocabulary, dtype):
        size = rows * vocabulary * dtype.itemsize
        monkeypatch.setitem(linear_chunks._WORKSPACE, "cpu", size)
        monkeypatch.setattr(linear_chunks, "_WORKSPACE_ELSEWHERE", size)

    return limit


def check_loss(backend, hidden, weight, labels, token_weight, scale):
    """Gradients of the weighted loss under that upstream gradient, against float64 and PyTorch in the same dtype."""

    def ours(hidden, weight):
        return qk.linear_cross_entropy(hidden, weight, labels, token_weight=token_weight), torch.zeros(())

    reference, upstream = torch_loss(labels, token_weight), [torch.tensor(scale, dtype=torch.float64), torch.zeros(())]
    actual = truth.grads(ours, [hidden, weight], upstream)
    expected = truth.grads(reference, [hidden.double(), weight.double()], upstream)
    same = truth.grads(reference, [hidden, weight], upstream)
    assert_grads(backend, actual, [hidden, weight], expected, same, labels, of_loss(token_weight, scale))


@pytest.mark.parametrize("construct", [make, make_confident])
@pytest.mark.parametrize("dtype", DTYPES)
def test_many_chunks(backend, dtype, construct, rows_at_a_time):
    """More rows than one workspace holds: every chunk lands in its own rows, and sums run over all. Low precision
    takes a pass of its own over the head's columns."""
    hidden, weight, _, labels = construct(dtype, 100, 64, 1001)
    rows_at_a_time(16, 1001, dtype)
    check_loss(backend, hidden, weight, labels, torch.rand(100) * loss_scale(dtype), 0.7)
    stats = qk.linear_token_stats(hidden, weight, labels)
    assert_stats(backend, stats, hidden, weight, None, labels)


@pytest.mark.parametrize("vocabulary", [7, 8, 13])
def test_a_last_block_of_one_column(backend, vocabulary, rows_at_a_time):
    """The pass over columns takes two at least, since a row of one logit has no gradient of nll: of 7 and 13 columns
    the last block begins one earlier, in blocks of 3 and 6."""
    hidden, weight, _, labels = make(torch.bfloat16, 9, 8, vocabulary)
    rows_at_a_time(4, vocabulary, torch.bfloat16)
    check_loss(backend, hidden, weight, labels, torch.ones(9), 0.7)


# a mean over 4096 tokens, and the same under the loss scale with which float16 is trained
@pytest.mark.parametrize("scale", [1.0, 2.0**16])
@pytest.mark.parametrize("construct", [make, make_confident])
@pytest.mark.parametrize("rows", [24, 6])
def test_small_weights_in_float16(backend, scale, construct, rows, rows_at_a_time):
    """A gradient of weight 2⁻¹² that was computed before the loss scale is known had lost what is under 6e-8, where
    PyTorch multiplies first: that of confident hidden states was off by 1,670 units in the last place, PyTorch's 9."""
    hidden, weight, _, labels = construct(torch.float16, 24, 64, 1000)
    rows_at_a_time(rows, 1000, torch.float16)
    check_loss(backend, hidden, weight, labels, torch.full((24,), 2.0**-12), scale)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_criteria_of_gradients_can_fail(dtype):
    """A bound by the tensor's scale passes this: the smallest row of the head's gradient, off by a hundredth."""
    hidden, weight, _, labels = make_confident(dtype, 33, 64, 1000)
    token_weight = torch.full((33,), 16.0)
    reference = torch_loss(labels, token_weight)
    expected = truth.grads(reference, [hidden.double(), weight.double()], LOSS_UPSTREAM)
    same = truth.grads(reference, [hidden, weight], LOSS_UPSTREAM)
    arguments = [hidden, weight], expected, same, labels, of_loss(token_weight)
    assert_grads("reference", same, *arguments)
    rows = expected[1].abs().amax(-1)
    row = rows.argmin()
    assert rows[row] < 1e-4 * rows.max()
    off = 0.5 if dtype in HALF else 0.01  # the logits are rounded by several hundredths there
    wrong = same[1].clone()
    wrong[row] = (expected[1][row] * (1 + off)).to(dtype)
    with pytest.raises(AssertionError, match="weight"):
        assert_grads("reference", [same[0], wrong], *arguments)


def test_a_chunk_left_out_shows(backend, monkeypatch, rows_at_a_time):
    """Memory is NaN before each use in these tests (conftest.py). Zeros would pass for rows that are pruned."""
    hidden, weight, _, labels = make(torch.float32, 12, 8, 40)
    labels[1] = 3
    rows_at_a_time(4, 40, torch.float32)
    slices = linear_chunks._Rows.slices
    monkeypatch.setattr(linear_chunks._Rows, "slices", lambda rows: list(slices(rows))[:-1])
    hidden.requires_grad_()
    loss = qk.linear_cross_entropy(hidden, weight, labels)
    loss.backward()
    assert loss.isnan()
    assert hidden.grad[8:].isnan().all()
    assert hidden.grad[:8].isfinite().all()


def test_gradcheck(backend):
    *operands, labels = make(torch.float64, 5, 4, 7, bias=True)
    operands = [x.requires_grad_() for x in operands]
    token_weight = torch.rand(5, dtype=torch.float64)

    def stats(hidden, weight, bias):
        return qk.linear_token_stats(hidden, weight, labels, bias=bias, softcap=3.0, logit_scale=0.5)

    def loss(hidden, weight, bias):
        return qk.linear_cross_entropy(hidden, weight, labels, bias=bias, token_weight=token_weight, softcap=3.0)

    assert torch.autograd.gradcheck(stats, operands)
    assert torch.autograd.gradcheck(loss, operands)


def test_leading_dimensions_and_non_contiguous_operands(backend):
    hidden = torch.randn(2, 5, 8).transpose(0, 1)
    weight = torch.randn(8, 30).T
    labels = torch.randint(0, 30, (2, 5)).T
    stats = qk.linear_token_stats(hidden, weight, labels)
    assert_stats(backend, stats, hidden, weight, None, labels)
    loss = qk.linear_cross_entropy(hidden, weight, labels)
    torch.testing.assert_close(loss, stats.nll.sum())


def test_autocast_casts_like_linear(backend):
    hidden = torch.randn(6, 8, requires_grad=True)
    weight = torch.randn(30, 8, requires_grad=True)
    labels = torch.randint(0, 30, (6,))
    with torch.autocast("cpu", torch.bfloat16):
        loss = qk.linear_cross_entropy(hidden, weight, labels)
        stats = qk.linear_token_stats(hidden, weight, labels)
    loss.backward()
    assert weight.grad.dtype == torch.float32
    halves = qk.linear_token_stats(hidden.bfloat16(), weight.bfloat16(), labels)
    assert torch.equal(stats.nll, halves.nll)
    torch.testing.assert_close(loss, halves.nll.sum())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_compiles_to_one_graph(dtype):
    """The compiler sees the dispatcher's operators, whatever backend serves them."""
    hidden, weight, _, labels = make(dtype, 6, 8, 40)

    def loss(hidden, weight):
        stats = qk.linear_token_stats(hidden * 2, weight, labels)
        return 0.7 * qk.linear_cross_entropy(hidden, weight, labels) + stats.entropy.sum()

    eager, compiled = ([x.clone().requires_grad_() for x in (hidden, weight)] for _ in range(2))
    loss(*eager).backward()
    torch.compile(loss, fullgraph=True, backend="aot_eager")(*compiled).backward()
    for a, e in zip(compiled, eager, strict=True):
        torch.testing.assert_close(a.grad, e.grad)


def test_operators_obey_their_schemas(backend):
    hidden, weight, bias, labels = make(torch.float32, 6, 8, 40, bias=True)
    scaling = (-100, 1.0, None)
    utilities = ("test_schema", "test_faketensor")
    ops = torch.ops.qtuning_kernels
    operands = (hidden, weight, bias, labels)
    torch.library.opcheck(ops.linear_token_stats, (*operands, *scaling), test_utils=utilities)
    _, *stats = ops.linear_token_stats(*operands, *scaling)
    g = torch.randn(6)
    for needs in ([True, True, True], [True, False, False], [False, False, False]):
        torch.library.opcheck(
            ops.linear_token_stats_backward,
            (*operands, *stats, g, g, None, *scaling, needs),
            test_utils=utilities,
        )
        torch.library.opcheck(ops.linear_cross_entropy, (*operands, g.abs(), *scaling, needs), test_utils=utilities)
