"""The scoring pass: nll and entropy of every trainable token of a pool, gradient-free and cheap."""

import copy
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from qtuning_kernels.data.micro_batches import MicroBatch, micro_batches, nothing
from qtuning_kernels.data.samples import Sample, cu_seqlens_of, to_sample
from qtuning_kernels.kernels.functional import TokenStats
from qtuning_kernels.kernels.linear import linear_token_stats
from qtuning_kernels.models.causal_lm import CausalLM, backbone, evaluation, head_parameters
from qtuning_kernels.models.collectives import largest
from qtuning_kernels.models.matmul import Precision, choose_precision, float32_matmul


class Scores(NamedTuple):
    """nll, entropy and lse, float32 ``[T]`` in nats, sample by sample, and int32 ``cu_seqlens [B+1]``."""

    nll: Tensor
    entropy: Tensor
    lse: Tensor
    cu_seqlens: Tensor

    def cpu(self) -> "Scores":
        """On the host, in one copy, the one for which a step waits before it decides."""
        nll, entropy, lse = torch.stack(self[:3]).cpu()
        return Scores(nll, entropy, lse, self.cu_seqlens.cpu())


GOES_ON = 0.1  # of what a sample is off by as the end of a long one: far above rounding, far below wrong positions


def choose_layout(causal_lm: CausalLM, sharded: bool = False) -> str:
    """How samples share a forward: ``"grouped"``, ``"padded"`` or ``"packed"`` (`micro_batches`).

    Variable-length attention skips what lies between packed samples, where the model keeps them apart, which is tried.
    Dense attention would compute and mask it. A CPU takes many small forwards of similar lengths, any other device as
    few as the budget allows.

    Args:
        sharded: parameters are gathered within the forwards of a wrapper, so that nothing can be tried.
    """
    attention = getattr(causal_lm.base.config, "_attn_implementation", None) or ""
    if "flash" in attention and not sharded and keeps_samples_apart(causal_lm):
        return "packed"
    return "grouped" if next(causal_lm.base.parameters()).device.type == "cpu" else "padded"


@torch.no_grad()
def keeps_samples_apart(causal_lm: CausalLM) -> bool:
    """Whether the second of two packed samples has the hidden states that it has alone, whatever the first one is.

    Recurrent and hybrid models carry their state on, and some architectures take no position ids. What does not see
    the first sample has the same bits with another one; where positions go on, a sample is as in one long sequence.
    """
    device = next(causal_lm.base.parameters()).device
    vocabulary = causal_lm.base.config.get_text_config().vocab_size
    first, second = torch.arange(8, device=device), torch.arange(5, device=device)
    positions = torch.cat((first, second))[None]

    def states(*samples: Tensor, positions: Tensor | None = None) -> Tensor:
        tokens = torch.cat(samples)[None] % vocabulary
        return backbone(causal_lm.decoder, tokens, positions)[0, -len(second) :].float()

    with evaluation(causal_lm.base):
        packed, other = (states(x, second, positions=positions) for x in (first, first.flip(0)))
        alone, one = states(second), states(first, second)
    return torch.equal(packed, other) and bool((packed - alone).norm() < GOES_ON * (one - alone).norm())


class Scorer:
    """Scores samples with a model, in its own precision or through a copy of its weights in another.

    Args:
        model: the causal language model, possibly wrapped.
        causal_lm: its `CausalLM`.
        precision: how it multiplies.
        batch_tokens: most tokens in one forward, padding included.
        sharded: parameters are gathered within the forwards, so that every process makes as many, and there is no
            copy in another precision: that becomes autocast.
    """

    def __init__(
        self,
        model: nn.Module,
        causal_lm: CausalLM,
        precision: Precision,
        *,
        batch_tokens: int = 8192,
        sharded: bool = False,
    ) -> None:
        self.model, self.causal_lm, self.batch_tokens, self.sharded = model, causal_lm, batch_tokens, sharded
        self.matmul = precision.matmul
        # that the weights are converted to; None: they are taken as they are
        wanted = {"float32": torch.float32, "bfloat16": torch.bfloat16}.get(precision.score_dtype)
        self.dtype = None if wanted == next(causal_lm.base.parameters()).dtype else wanted
        self.layout = choose_layout(causal_lm, sharded)
        self.tokens_scored = 0  # positions that the forwards read, padding included
        self._copy: tuple[nn.Module, nn.Linear] | None = None

    def score(self, samples: Sequence[Sample], device: torch.device | str, autocast: Any = nullcontext) -> Scores:
        """Scores of all trainable tokens, in the order of `samples`, on `device`; cu_seqlens on the host.

        Args:
            samples: at least one.
            device: where the model is.
            autocast: makes the context manager of a forward, if the run computes under one.
        """
        cu_seqlens = cu_seqlens_of(samples)
        stats = torch.zeros(3, int(cu_seqlens[-1]), device=device)
        batches = micro_batches(samples, self.batch_tokens, self.layout)
        if self.sharded:
            batches += [nothing()] * (largest(len(batches)) - len(batches))
            if self.dtype:
                autocast = partial(torch.autocast, torch.device(device).type, self.dtype)
        elif self.dtype:
            self._refresh_copy()
            autocast = nullcontext
        # dropout would make the scores random; one context of autocast, which casts each weight once
        with evaluation(self.causal_lm.base), torch.no_grad(), autocast(), float32_matmul(self.matmul):
            for batch in batches:
                self.tokens_scored += batch.input_ids.numel()
                batch = batch.to(device)
                result = self._forward(batch)
                for row, values in zip(stats, (result.nll, result.entropy, result.lse), strict=True):
                    row[batch.token_index] = values.to(stats.dtype)
        nll, entropy, lse = stats
        return Scores(nll, entropy, lse, cu_seqlens)

    def _forward(self, batch: MicroBatch) -> TokenStats:
        def stats_of(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> TokenStats:
            return linear_token_stats(hidden, weight, batch.labels, bias=bias, **self.causal_lm.scaling())

        if self._copy is None:
            return self.causal_lm.forward(self.model, batch.input_ids, batch.position_ids, batch.rows, stats_of)
        decoder, head = self._copy
        hidden = backbone(decoder, batch.input_ids, batch.position_ids).flatten(0, 1)[batch.rows]
        return stats_of(hidden, *head_parameters(head))

    @torch.no_grad()
    def _refresh_copy(self) -> None:
        """Brings the copy up to date. Frozen weights were converted once, for good."""
        own = (self.causal_lm.decoder, self.causal_lm.head)
        if self._copy is None:
            head_parameters(self.causal_lm.head)  # a sharded model cannot be copied
            # one call, so that a head tied to the embedding stays tied
            self._copy = copy.deepcopy(own)
            for module in self._copy:
                module.eval()
                for parameter in module.parameters():  # buffers (rotary frequencies) keep their precision
                    parameter.data = parameter.data.to(self.dtype)
                    parameter.grad = None
                for inner in module.modules():
                    if type(inner).__name__ == "BufferDict":  # matrices that adapters of PEFT share
                        inner.to(self.dtype)
        for copied, source in zip(self._copy, own, strict=True):
            for target, parameter in zip(copied.parameters(), source.parameters(), strict=True):
                if parameter.requires_grad:
                    target.copy_(parameter)


def score_samples(
    model: nn.Module,
    samples: Sequence[Mapping[str, Any] | Sample],
    *,
    score_batch_tokens: int = 8192,
    score_dtype: str = "auto",
    matmul: str = "auto",
) -> Scores:
    """nll, entropy and lse of every trainable token of `samples` under `model`, in nats.

    Args:
        model: a `transformers` causal language model or a PEFT model around one.
        samples: mappings with ``input_ids``, ``labels`` (−100 outside the answer) and, optionally,
            ``sample_id``; or `Sample`.
        score_batch_tokens: most tokens in one forward, padding included.
        score_dtype, matmul: as in `QTuningConfig`.

    Returns:
        `Scores`: nll, entropy and lse ``[T]``, cu_seqlens ``[B+1]``, on the model's device.

    Raises:
        ValueError: an unsupported model (see `CausalLM` and its `check`), or a malformed sample.
    """
    causal_lm = CausalLM(model)
    causal_lm.check()
    ready = [
        s if isinstance(s, Sample) else to_sample(s["input_ids"], s["labels"], s.get("sample_id")) for s in samples
    ]
    precision = choose_precision(causal_lm.base, matmul=matmul, score_dtype=score_dtype)
    scorer = Scorer(model, causal_lm, precision, batch_tokens=score_batch_tokens)
    scores = scorer.score(ready, next(causal_lm.base.parameters()).device)
    return scores._replace(cu_seqlens=scores.cu_seqlens.to(scores.nll.device))
