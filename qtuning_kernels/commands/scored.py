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
    from rich.progress import track

    from qtuning_kernels.data.samples import to_sample
    from qtuning_kernels.models.scoring import Scores
    from qtuning_kernels.pruning.policies import PoolStats, make_policy
    from qtuning_kernels.pruning.policies.protocol import SCORED
    from qtuning_kernels.training.planner import refuse_nan
    from qtuning_kernels.training.selection import select

    policy = make_policy(config)
    if policy.weighted or "first_nll" in policy.needs:
        raise ValueError(f"policy {policy!r} is one of training; accepted: one that keeps or prunes by one scoring")
    rows, ids = inputs.samples, inputs.samples["sample_id"][:]
    scorer, device = _scorer(inputs, config, console) if policy.needs & SCORED else (None, "cpu")
    # samples of about one length together, so that little of a batch is padding
    order = sorted(range(len(ids)), key=lambda i: len(rows[i]["input_ids"]), reverse=True)
    chunks = [order[i : i + _CHUNK] for i in range(0, len(order), _CHUNK)]
    read = policy.needs and track(chunks, description="scoring", console=console)
    found: dict[str, dict[int, Any]] = {}  # by name and sample, [T(x)]
    for chunk in read or chunks:
        samples = [to_sample(rows[i]["input_ids"], rows[i]["labels"], ids[i]) for i in chunk]
        given = scorer.score(samples, device).cpu()._asdict() if scorer else {}
        given["labels"] = torch.cat([sample.labels for sample in samples])
        if reference is not None:
            given["reference_nll"] = reference.nll(samples)
        given.pop("cu_seqlens", None)
        lengths = [len(sample.labels) for sample in samples]
        for name, values in given.items():
            found.setdefault(name, {}).update(zip(chunk, values.split(lengths), strict=True))
    lengths = [len(found["labels"][i]) for i in range(len(ids))]
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    stats: dict[str, Any] = {name: torch.cat([parts[i] for i in range(len(ids))]) for name, parts in found.items()}
    scores = Scores(stats["nll"], stats["entropy"], stats["lse"], cu_seqlens) if scorer else None
    if scores:
        refuse_nan(scores, ids)
    generator = torch.Generator().manual_seed(seed)
    pool = PoolStats(cu_seqlens, ids, generator=generator, **{name: stats[name] for name in policy.needs})
    return select([pool], policy)[0], scores


def _scorer(inputs: Inputs, config: QTuningConfig, console: Any) -> tuple[Any, str]:
    """What scores with the model, and where."""
    import torch

    from qtuning_kernels.models.causal_lm import CausalLM
    from qtuning_kernels.models.matmul import choose_precision
    from qtuning_kernels.models.scoring import Scorer

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = inputs.model.to(device).requires_grad_(False)  # so that a copy in another precision is made once
    causal_lm = CausalLM(model)
    causal_lm.check()
    precision = choose_precision(causal_lm.base, matmul=config.matmul, score_dtype=config.score_dtype)
    log(console, precision)
    return Scorer(model, causal_lm, precision, batch_tokens=config.score_batch_tokens), device
