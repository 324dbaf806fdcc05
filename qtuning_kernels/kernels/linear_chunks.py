"""Statistics, loss and gradients from hidden states: chunks of the library's products and the row operators.

One path for every device and backend. A chunk of logits ``hidden @ weight.T + bias`` lies in a fixed workspace, in the
dtype of its operands, as `torch.nn.functional.linear` would round it; the row operators read it, and turn it into its
gradient in place, which two more products read. So statistics and gradient see the same numbers, whatever the dtype.

Products: 2NHV to score; 6NHV for loss and gradients, 4NHV with a frozen head, both 2NHV more in float16, where N counts
the rows that take part.
"""

import threading
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from qtuning_kernels.kernels.contract import RowStats, Scaling, Upstream, stats_dtype
from qtuning_kernels.kernels.dispatch import SCALING, STATS, UPSTREAM, register, row_operators

# Logits held at a time, in bytes, by device; more rows at a time are fewer passes over the head and its gradient.
_WORKSPACE = {"cpu": 56 << 20}
_WORKSPACE_ELSEWHERE = 256 << 20
_KEPT = threading.local()


class _Head(NamedTuple):
    """What every chunk needs: ``hidden [N, H]``, ``weight [V, H]``, ``bias [V]`` or None, ``labels [N]``."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    labels: Tensor
    ignore_index: int
    scaling: Scaling

    @property
    def vocabulary(self) -> int:
        return self.weight.shape[0]

    def elements(self) -> int:
        """Logits that the workspace holds."""
        size = _WORKSPACE.get(self.hidden.device.type, _WORKSPACE_ELSEWHERE)
        return size // self.hidden.element_size()

    def workspace(self, elements: int) -> Tensor:
        """Memory for so many logits. On a CPU a thread keeps it: its pages would be faulted in at every call."""
        size = _WORKSPACE.get(self.hidden.device.type, 0)
        if elements * self.hidden.element_size() > size:
            return self.hidden.new_empty(elements)
        if getattr(_KEPT, "memory", None) is None or _KEPT.memory.numel() != size:
            with torch.inference_mode(False):  # or it could not be written outside of that mode
                _KEPT.memory = torch.empty(size, dtype=torch.uint8, device="cpu")
        return _KEPT.memory.view(self.hidden.dtype)[:elements]

    def logits(self, hidden: Tensor, workspace: Tensor, start: int = 0, end: int | None = None) -> Tensor:
        """Columns [start, end) of the logits of `hidden`, in the workspace."""
        weight = self.weight[start:end]
        out = workspace[: hidden.shape[0] * weight.shape[0]].view(hidden.shape[0], -1)
        if self.bias is None:
            return torch.mm(hidden, weight.T, out=out)
        return torch.addmm(self.bias[start:end], hidden, weight.T, out=out)

    def stats(self, logits: Tensor, labels: Tensor) -> tuple[Tensor, RowStats]:
        nll, stats = row_operators.token_stats(logits[None], labels[None], self.ignore_index, self.scaling)
        return nll[0], RowStats(*(x[0] for x in stats))

    def differentiate(self, logits: Tensor, labels: Tensor, stats: RowStats, upstream: Upstream) -> None:
        """Turns the logits into their gradient."""
        row_operators.token_stats_backward_(
            logits[None],
            labels[None],
            RowStats(*(x[None] for x in stats)),
            Upstream(*(None if x is None else x[None] for x in upstream)),
            self.ignore_index,
            self.scaling,
        )


class _Rows:
    """The rows that take part, a chunk at a time."""

    def __init__(self, head: _Head, active: Tensor | None) -> None:
        """`active`: bool ``[N]``, the rows that take part, whose indices are read; None: all of them."""
        self.head = head
        self.index = None if active is None else active.nonzero().squeeze(1)  # the one wait for the device
        self.count = len(head.labels) if self.index is None else len(self.index)
        if self.count == len(head.labels):
            self.index = None
        size = max(1, head.elements() // head.vocabulary)
        chunks = -(-self.count // size)
        self.size = -(-self.count // chunks) if chunks else 0  # chunks of even size

    def slices(self) -> Iterator[slice]:
        for start in range(0, self.count, self.size or 1):
            yield slice(start, min(start + self.size, self.count))

    def of(self, tensor: Tensor, chunk: slice) -> Tensor:
        """The active rows of ``tensor [N, ..]``."""
        return tensor[chunk] if self.index is None else tensor[self.index[chunk]]

    def hidden(self, chunk: slice) -> Tensor:
        """The chunk's hidden states; 0 where the label is ignored, so that 0·NaN enters no product."""
        hidden = self.of(self.head.hidden, chunk)
        if self.index is not None or self.head.hidden.device.type == "cpu":
            return hidden
        return hidden.masked_fill((self.head.labels[chunk] == self.head.ignore_index)[:, None], 0)

    def put(self, tensor: Tensor, chunk: slice, values: Tensor) -> None:
        if self.index is None:
            tensor[chunk] = values
        else:
            tensor[self.index[chunk]] = values


def _scored(head: _Head) -> _Rows:
    """The rows that have a label. Only a CPU's are counted: elsewhere the host would wait."""
    return _Rows(head, head.labels != head.ignore_index if head.hidden.device.type == "cpu" else None)


def _stats(head: _Head) -> tuple[Tensor, ...]:
    rows = _scored(head)
    result = [head.hidden.new_zeros(len(head.labels), dtype=stats_dtype(head.hidden.dtype)) for _ in range(4)]
    workspace = head.workspace(rows.size * head.vocabulary)
    for chunk in rows.slices():
        nll, stats = head.stats(head.logits(rows.hidden(chunk), workspace), rows.of(head.labels, chunk))
        for tensor, values in zip(result, (nll, *stats), strict=True):
            rows.put(tensor, chunk, values)
    return tuple(result)


class _Gradients:
    """Sums of the gradients of hidden, weight and bias over chunks; an empty tensor for each that is not asked for."""

    def __init__(self, head: _Head, rows: _Rows, output_mask: list[bool]) -> None:
        self.head, self.rows = head, rows
        self.needs_hidden, self.needs_weight, needs_bias = output_mask
        self.needs_bias = needs_bias and head.bias is not None
        several = rows.size < rows.count
        low = several and head.hidden.element_size() < 4
        self.in_float32 = low and _multiplies_into_float32(head.hidden)
        # a sum of rounded products would lose what each of them lost: the columns take a pass of their own
        self.by_columns = self.needs_weight and low and not self.in_float32
        self.hidden, self.weight, self.bias = (head.hidden.new_empty(0) for _ in range(3))
        if self.needs_hidden:
            self.hidden = (torch.empty_like if rows.index is None else torch.zeros_like)(head.hidden)
        if self.needs_weight:
            make = torch.empty_like if rows.count else torch.zeros_like
            self.weight = make(head.weight, dtype=torch.float32 if self.in_float32 else None)
        if self.needs_bias:
            self.bias = head.hidden.new_zeros(head.vocabulary, dtype=stats_dtype(head.hidden.dtype))

    def add(self, chunk: slice, hidden: Tensor, grad: Tensor) -> None:
        """One chunk's, from its hidden states and the gradient of its logits."""
        if self.needs_hidden and self.rows.index is None:
            torch.mm(grad, self.head.weight, out=self.hidden[chunk])
        elif self.needs_hidden:
            self.rows.put(self.hidden, chunk, grad @ self.head.weight)
        if self.needs_weight and not self.by_columns:
            beta = 0 if chunk.start == 0 else 1
            if self.in_float32:
                torch.addmm(self.weight, grad.T, hidden, torch.float32, beta=beta, out=self.weight)
            else:
                self.weight.addmm_(grad.T, hidden, beta=beta)
        if self.needs_bias:
            self.bias += grad.sum(0, dtype=self.bias.dtype)

    def add_columns(self, workspace: Tensor, stats: RowStats, upstream: Upstream) -> None:
        """The head's gradient, a block of columns of all active rows at a time, so that each sum is rounded once.

        The label lies in one block of columns. There the gradient of nll is p − 1[y], elsewhere p, as that of lse.
        """
        head, everything = self.head, slice(0, self.rows.count)
        hidden, labels = self.rows.hidden(everything), self.rows.of(head.labels, everything)
        zero = torch.zeros_like(stats.entropy)
        grad_nll, grad_lse = (zero if g is None else g for g in (upstream.nll, upstream.lse))
        width = max(2, workspace.numel() // self.rows.count)
        for start in range(0, head.vocabulary, width):
            start = min(start, head.vocabulary - 2)  # a row of one logit has no gradient of nll
            end = min(start + width, head.vocabulary)
            inside = (labels >= start) & (labels < end)
            here = torch.where(inside, labels - start, torch.where(labels == head.ignore_index, labels, 0))
            split = Upstream(
                torch.where(inside, grad_nll, 0), upstream.entropy, torch.where(inside, grad_lse, grad_nll + grad_lse)
            )
            block = head.logits(hidden, workspace, start, end)
            head.differentiate(block, here, stats, split)
            torch.mm(block.T, hidden, out=self.weight[start:end])

    def tuple(self) -> tuple[Tensor, Tensor, Tensor]:
        """In the dtypes of what they are gradients of."""
        dtype = self.head.hidden.dtype
        return self.hidden, self.weight.to(dtype), self.bias.to(dtype)


_INTO_FLOAT32: dict[tuple[torch.device, torch.dtype], bool] = {}


def _multiplies_into_float32(like: Tensor) -> bool:
    """Whether the device adds a product of low-precision matrices to a float32 one, asked by doing it."""
    key = like.device, like.dtype
    if key not in _INTO_FLOAT32:
        try:
            matrix = torch.ones(16, 16, dtype=like.dtype, device=like.device)
            sums = torch.ones(16, 16, dtype=torch.float32, device=like.device)
            torch.addmm(sums, matrix, matrix, torch.float32, out=sums)
            _INTO_FLOAT32[key] = True
        except (RuntimeError, NotImplementedError):
            _INTO_FLOAT32[key] = False
    return _INTO_FLOAT32[key]


def _linear_token_stats(hidden, weight, bias, labels, ignore_index, logit_scale, softcap):
    return _stats(_Head(hidden, weight, bias, labels, ignore_index, Scaling(logit_scale, softcap)))


def _linear_token_stats_backward(hidden, weight, bias, labels, *rest):
    *values, ignore_index, logit_scale, softcap, output_mask = rest
    head = _Head(hidden, weight, bias, labels, ignore_index, Scaling(logit_scale, softcap))
    grads = [g for g in values[3:] if g is not None]
    active = labels != ignore_index
    if grads:
        active &= torch.stack([g != 0 for g in grads]).any(0)
    rows = _Rows(head, active)
    gradients = _Gradients(head, rows, output_mask)
    values = [x if x is None else rows.of(x, slice(0, rows.count)) for x in values]
    workspace = head.workspace(rows.size * head.vocabulary)
    for chunk in rows.slices():
        hidden = rows.hidden(chunk)
        logits = head.logits(hidden, workspace)
        stats, upstream = _tuples(values, chunk)
        head.differentiate(logits, rows.of(labels, chunk), stats, upstream)
        gradients.add(chunk, hidden, logits)
    if gradients.by_columns:
        gradients.add_columns(workspace, *_tuples(values, slice(0, rows.count)))
    return gradients.tuple()


def _tuples(values: list[Any], chunk: slice) -> tuple[RowStats, Upstream]:
    """The rows of a chunk, from the fields of `RowStats` and then those of `Upstream`."""
    parts: list[Any] = [x if x is None else x[chunk] for x in values]
    return RowStats(*parts[:3]), Upstream(*parts[3:])


def _linear_cross_entropy(hidden, weight, bias, labels, token_weight, *rest):
    ignore_index, logit_scale, softcap, output_mask = rest
    head = _Head(hidden, weight, bias, labels, ignore_index, Scaling(logit_scale, softcap))
    dtype = stats_dtype(hidden.dtype)
    if token_weight is None:
        rows = _scored(head)
    else:
        rows = _Rows(head, (labels != ignore_index) & (token_weight != 0))
    needed = slice(0, rows.count)
    weights = torch.ones_like(labels, dtype=dtype) if token_weight is None else token_weight
    weights = rows.of(weights, needed)
    gradients = _Gradients(head, rows, output_mask)
    results = [hidden.new_empty(rows.count, dtype=dtype) for _ in range(4)]
    workspace = head.workspace(rows.size * head.vocabulary)
    for chunk in rows.slices():
        chunk_hidden, chunk_labels = rows.hidden(chunk), rows.of(labels, chunk)
        logits = head.logits(chunk_hidden, workspace)
        nll, stats = head.stats(logits, chunk_labels)
        for tensor, values in zip(results, (nll, *stats), strict=True):
            tensor[chunk] = values
        if any(output_mask):
            head.differentiate(logits, chunk_labels, stats, Upstream(nll=weights[chunk]))
            gradients.add(chunk, chunk_hidden, logits)
    if gradients.by_columns:
        gradients.add_columns(workspace, RowStats(*results[1:]), Upstream(nll=weights))
    return (weights * results[0]).sum(), *gradients.tuple()


def _fake_stats(hidden, weight, bias, labels, *_):
    return tuple(hidden.new_empty(labels.shape, dtype=stats_dtype(hidden.dtype)) for _ in range(4))


def _fake_gradients(hidden, weight, bias, *rest):
    operands = zip((hidden, weight, bias), rest[-1], strict=True)
    return tuple(torch.empty_like(x) if needed and x is not None else hidden.new_empty(0) for x, needed in operands)


def _fake_cross_entropy(hidden, *rest):
    return hidden.new_empty((), dtype=stats_dtype(hidden.dtype)), *_fake_gradients(hidden, *rest)


_OPERANDS = "Tensor hidden, Tensor weight, Tensor? bias, Tensor labels"
# hidden [N, H], weight [V, H], bias [V], per-token tensors [N]. A gradient that output_mask (of hidden, weight and
# bias) leaves out has no elements.
SCHEMAS = {
    # -> nll, entropy, row_max, log_sum
    "linear_token_stats": f"({_OPERANDS}, {SCALING}) -> (Tensor, Tensor, Tensor, Tensor)",
    "linear_token_stats_backward": f"({_OPERANDS}, {STATS}, {UPSTREAM}, {SCALING}, bool[3] output_mask)"
    " -> (Tensor, Tensor, Tensor)",
    # -> Σ token_weight·nll, and its gradients
    "linear_cross_entropy": f"({_OPERANDS}, Tensor? token_weight, {SCALING}, bool[3] output_mask)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
}
register("linear_token_stats", SCHEMAS, _linear_token_stats, _fake_stats)
register("linear_token_stats_backward", SCHEMAS, _linear_token_stats_backward, _fake_gradients)
register("linear_cross_entropy", SCHEMAS, _linear_cross_entropy, _fake_cross_entropy)
