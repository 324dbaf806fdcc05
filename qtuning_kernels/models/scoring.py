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
        """On the host, in one copy."""
        nll, entropy, lse = torch.stack(self[:3]).cpu()
        return Scores(nll, entropy, lse, self.cu_seqlens.cpu())


def layout_for(model: nn.Module) -> str:
    """How samples share a forward: ``"packed"`` where attention has variable lengths, else ``"padded"``.

    Variable-length attention skips what lies between samples. Dense attention on a packed row computes and
    masks it, and models that know no position ids would let samples see each other; groups of similar length
    need neither (benchmarks/scoring.py times both).
    """
    config = getattr(model, "config", None)
    attention = getattr(config, "_attn_implementation", None) or ""
    return "packed" if "flash" in attention else "padded"


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
        self.tokens_scored = 0  # positions that the forwards read, padding included
        self._copy: tuple[nn.Module, nn.Linear] | None = None

    def score(self, samples: Sequence[Sample], device: torch.device | str, autocast: Any = nullcontext) -> Scores:
        """Scores of all trainable tokens, in the order of `samples`, on `device`.

        Args:
            samples: at least one.
            device: where the model is.
            autocast: makes the context manager of a forward, if the run computes under one.
        """
        cu_seqlens = cu_seqlens_of(samples)
        stats = torch.zeros(3, int(cu_seqlens[-1]), device=device)
        batches = micro_batches(samples, self.batch_tokens, layout_for(self.causal_lm.base))
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
        return Scores(nll, entropy, lse, cu_seqlens.to(device))

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
    return scorer.score(ready, next(causal_lm.base.parameters()).device)
