"""The scoring pass over a whole data set, with a progress bar; `score` and `select` start from it."""

from typing import Any

from qtuning_kernels.commands.terminal import log
from qtuning_kernels.config import QTuningConfig

_CHUNK = 64  # samples between two updates of the progress bar


def score_data_set(model: Any, samples: Any, config: QTuningConfig, console: Any) -> Any:
    """`scoring.Scores` of all samples, in their order, on the CPU."""
    import torch
    from rich.progress import track

    from qtuning_kernels.data.samples import to_sample
    from qtuning_kernels.models.causal_lm import CausalLM
    from qtuning_kernels.models.matmul import choose_precision
    from qtuning_kernels.models.scoring import Scorer, Scores

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model.to(device).requires_grad_(False)  # so that a copy in another precision is made once
    causal_lm = CausalLM(model)
    precision = choose_precision(causal_lm.base, matmul=config.matmul, score_dtype=config.score_dtype)
    log(console, precision)
    scorer = Scorer(model, causal_lm, precision, batch_tokens=config.score_batch_tokens)
    # samples of about one length together, so that little of a batch is padding
    order = sorted(range(len(samples)), key=lambda i: len(samples[i]["input_ids"]), reverse=True)
    chunks = [order[i : i + _CHUNK] for i in range(0, len(order), _CHUNK)]
    nll: list[Any] = [None] * len(order)
    entropy: list[Any] = [None] * len(order)
    for chunk in track(chunks, description="scoring", console=console):
        rows = (samples[i] for i in chunk)
        scores = scorer.score([to_sample(row["input_ids"], row["labels"], row["sample_id"]) for row in rows], device)
        lengths = scores.cu_seqlens.diff().tolist()
        parts = zip(scores.nll.cpu().split(lengths), scores.entropy.cpu().split(lengths), strict=True)
        for i, (nll_part, entropy_part) in zip(chunk, parts, strict=True):
            nll[i], entropy[i] = nll_part, entropy_part
    ends = torch.tensor([0, *map(len, nll)]).cumsum(0)
    return Scores(torch.cat(nll), torch.cat(entropy), ends.to(torch.int32))
