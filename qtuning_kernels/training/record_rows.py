"""A planned step as rows of the run's record; `run_record/schema.py` has the columns."""

from collections.abc import Sequence
from typing import Any

import torch

from qtuning_kernels.config import QTuningConfig
from qtuning_kernels.pruning import eu_plane
from qtuning_kernels.pruning.tokens import MAX_NLL, neighbor_scores
from qtuning_kernels.training.planner import StepPlan

PROMPT_TOKENS = 512  # the end of the prompt that the token view shows


def sample_rows(plan: StepPlan) -> list[dict[str, Any]]:
    """One row per sample of the step's pools, in their order; what a policy has no use for is null."""
    rows = []
    for index, pool in enumerate(plan.pools):
        selection = plan.selections[index] if plan.selections else None
        plane = selection.plane if selection else None
        if plane is None and plan.scores:
            scores = plan.scores[index]
            plane = eu_plane(scores.nll, scores.entropy, scores.cu_seqlens)
        for i, sample in enumerate(pool):
            tokens = len(sample.label_positions)
            row: dict[str, Any] = {"id": sample.sample_id, "num_tokens": tokens}
            if selection is None:
                row |= {"keep": tokens > 0, "kept_tokens": tokens}
            else:
                row |= {"keep": bool(selection.keep[i]), "kept_tokens": int(selection.keep_of(i).sum())}
            if plane is not None:
                row |= {"ppl": float(plane.ppl[i]), "entropy": float(plane.entropy[i])}
            if selection is not None and (triage := selection.triage) is not None:
                names = ("quadrant", "role", "supplemented")
                row |= {name: getattr(triage, name)[i].item() for name in names}
            rows.append(row)
    return rows


def step_row(plan: StepPlan) -> dict[str, Any]:
    totals = plan.totals
    alphas = [float(selection.triage.alpha) for selection in plan.selections if selection.triage]
    return {
        "loss": totals.loss_last,
        "alpha": sum(alphas) / len(alphas) if alphas else None,
        "tokens_seen": totals.tokens_seen,
        "tokens_kept": totals.tokens_kept,
        "tokens_scored": totals.tokens_scored,
        "seconds": totals.seconds,
        "flops_spent": totals.flops_spent,
        "flops_full": totals.flops_full,
        "score_age_epochs": plan.score_age,
    }


def evaluation_rows(log_history: Sequence[dict[str, float]]) -> list[dict[str, float]]:
    """``step`` and losses of each evaluation; of several sets, each loss has its set's name in its own."""
    losses = [{k: v for k, v in row.items() if k.startswith("eval_") and k.endswith("_loss")} for row in log_history]
    return [{"step": row["step"]} | found for row, found in zip(log_history, losses, strict=True) if found]


def token_rows(plan: StepPlan, chosen: Sequence[int], tokenizer: Any, config: QTuningConfig) -> list[dict[str, Any]]:
    """The tokens of the samples at the positions `chosen`: text, nll and neighbour score, kept or pruned."""
    if tokenizer is None or not plan.scores:
        return []
    rows = []
    samples = [(pool, i) for pool, samples in enumerate(plan.pools) for i in range(len(samples))]
    for pool, i in (samples[position] for position in chosen):
        sample, selection, scores = plan.pools[pool][i], plan.selections[pool], plan.scores[pool]
        start, end = scores.cu_seqlens[i : i + 2].tolist()
        nll = scores.nll[start:end]
        pruned = selection.triage is not None and int(selection.triage.role[i]) == 2
        score = neighbor_scores(
            nll.clamp(max=MAX_NLL).exp(),
            torch.tensor([0, end - start], dtype=torch.int32),
            config.neighbor_weight,
            config.neighbor_reduction == "mean",
        )
        prompt = sample.input_ids[: int(sample.label_positions[0])][-PROMPT_TOKENS:].tolist()
        labels = sample.labels.tolist()
        rows.append(
            {
                "id": sample.sample_id,
                "token_ids": labels,
                "tokens": [tokenizer.decode([token]) for token in labels],
                "nll": nll.tolist(),
                "score": score.tolist() if pruned else None,
                "keep": selection.keep_of(i).tolist(),
                "prompt": tokenizer.decode(prompt),
            }
        )
    return rows
