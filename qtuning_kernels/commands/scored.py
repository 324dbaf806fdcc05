"""A whole data set as one selection pool, with a progress bar; `score` and `select` start from it."""

from typing import TYPE_CHECKING, Any

from qtuning_kernels.commands.inputs import Inputs
from qtuning_kernels.commands.terminal import log
from qtuning_kernels.config import QTuningConfig

if TYPE_CHECKING:
    from qtuning_kernels.models.scoring import Scores
    from qtuning_kernels.training.reference import ReferenceScores
    from qtuning_kernels.training.selection import Selection

_CHUNK = 64  # samples between two updates of the progress bar


def select_from_all(
    inputs: Inputs, config: QTuningConfig, console: Any, *, seed: int = 0, reference: "ReferenceScores | None" = None
) -> "tuple[Selection, Scores | None]":
    """The selection of all samples, in their order, and their scores, if the policy needs any.

    Raises:
        ValueError: the policy weighs tokens, or needs what only a run of training has.
    """
    import torch

    from qtuning_kernels.data.samples import cu_seqlens_of, to_sample
    from qtuning_kernels.pruning.policies import PoolStats, make_policy
    from qtuning_kernels.pruning.policies.protocol import SCORED
    from qtuning_kernels.training.selection import select

    policy = make_policy(config)
    if policy.weighted or "first_nll" in policy.needs:
        raise ValueError(f"policy {policy!r} is one of training; accepted: one that keeps or prunes by one scoring")
    samples = [to_sample(row["input_ids"], row["labels"], row["sample_id"]) for row in inputs.samples]
    scores = _score(inputs, samples, config, console) if policy.needs & SCORED else None
    given = dict(scores._asdict()) if scores else {}
    if reference is not None:
        given["reference_nll"] = reference.nll(samples)
    if missing := policy.needs - set(given):
        raise ValueError(f"policy {policy!r} needs {missing}; accepted: --reference-model or --reference-scores")
    ids = [sample.sample_id for sample in samples]
    generator = torch.Generator().manual_seed(seed)
    pool = PoolStats(cu_seqlens_of(samples), ids, generator=generator, **{name: given[name] for name in policy.needs})
    return select(pool, policy), scores


def _score(inputs: Inputs, samples: list[Any], config: QTuningConfig, console: Any) -> "Scores":
    import torch
    from rich.progress import track

    from qtuning_kernels.data.samples import cu_seqlens_of
    from qtuning_kernels.models.causal_lm import CausalLM
    from qtuning_kernels.models.matmul import choose_precision
    from qtuning_kernels.models.scoring import Scorer, Scores
    from qtuning_kernels.training.planner import refuse_nan

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = inputs.model.to(device).requires_grad_(False)  # so that a copy in another precision is made once
    causal_lm = CausalLM(model)
    causal_lm.check()
    precision = choose_precision(causal_lm.base, matmul=config.matmul, score_dtype=config.score_dtype)
    log(console, precision)
    scorer = Scorer(model, causal_lm, precision, batch_tokens=config.score_batch_tokens)
    # samples of about one length together, so that little of a batch is padding
    order = sorted(range(len(samples)), key=lambda i: len(samples[i].input_ids), reverse=True)
    chunks = [order[i : i + _CHUNK] for i in range(0, len(order), _CHUNK)]
    stats: dict[int, Any] = {}  # [3, T(x)]
    for chunk in track(chunks, description="scoring", console=console):
        scores = scorer.score([samples[i] for i in chunk], device).cpu()
        parts = torch.stack(scores[:3]).split(scores.cu_seqlens.diff().tolist(), dim=1)
        stats |= zip(chunk, parts, strict=True)
    nll, entropy, lse = torch.cat([stats[i] for i in range(len(samples))], dim=1)
    scores = Scores(nll, entropy, lse, cu_seqlens_of(samples))
    refuse_nan(scores, samples)
    return scores
