"""A whole data set as one selection pool, with a progress bar; `score` and `select` start from it."""

from typing import Any

from qtuning_kernels.commands.inputs import Inputs
from qtuning_kernels.commands.terminal import log
from qtuning_kernels.config import QTuningConfig

_CHUNK = 64  # samples between two updates of the progress bar


def select_from_all(inputs: Inputs, config: QTuningConfig, console: Any) -> Any:
    """The `training.selection.Selection` of all samples, in their order."""
    import torch
    from rich.progress import track

    from qtuning_kernels.data.samples import to_sample
    from qtuning_kernels.models.causal_lm import CausalLM
    from qtuning_kernels.models.matmul import choose_precision
    from qtuning_kernels.models.scoring import Scorer, Scores
    from qtuning_kernels.training.selection import select

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = inputs.model.to(device).requires_grad_(False)  # so that a copy in another precision is made once
    causal_lm = CausalLM(model)
    precision = choose_precision(causal_lm.base, matmul=config.matmul, score_dtype=config.score_dtype)
    log(console, precision)
    scorer = Scorer(model, causal_lm, precision, batch_tokens=config.score_batch_tokens)
    samples = inputs.samples
    # samples of about one length together, so that little of a batch is padding
    order = sorted(range(len(samples)), key=lambda i: len(samples[i]["input_ids"]), reverse=True)
    chunks = [order[i : i + _CHUNK] for i in range(0, len(order), _CHUNK)]
    stats: dict[int, Any] = {}  # [2, T(x)]
    for chunk in track(chunks, description="scoring", console=console):
        rows = (samples[i] for i in chunk)
        scores = scorer.score([to_sample(row["input_ids"], row["labels"], row["sample_id"]) for row in rows], device)
        stacked = torch.stack([scores.nll, scores.entropy]).cpu()
        stats |= zip(chunk, stacked.split(scores.cu_seqlens.diff().tolist(), dim=1), strict=True)
    nll, entropy = torch.cat([stats[i] for i in range(len(samples))], dim=1)
    ends = torch.tensor([0, *(stats[i].shape[1] for i in range(len(samples)))]).cumsum(0)
    return select(Scores(nll, entropy, ends.to(torch.int32)), config)
