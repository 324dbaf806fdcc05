"""What the quality benchmark measures of a model: nll of held-out answers, exact matches, nll of other text."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence

from qtuning_kernels.data.samples import Sample, to_sample

OTHER_SAMPLES, OTHER_TOKENS = 12, 128
BATCH = 16  # sequences of similar length


def result_tokens(labels: list[int], tokenizer: Any, mark: str) -> list[bool]:
    """Which tokens of an answer follow the last `mark`: those of its final result. None without a mark."""
    places = range(len(labels))
    begins = [i for i in places if mark and mark in tokenizer.decode(labels[i:])]
    if not begins:
        return [False for _ in places]
    end = next(i for i in places if i >= begins[-1] and mark in tokenizer.decode(labels[begins[-1] : i + 1]))
    return [i > end for i in places]


class Evaluation:
    """Measures a model on held-out records, always in float32 and with PyTorch's own loss.

    Args:
        tokenizer: of the model.
        samples: the tokens of the held-out records.
        other: text of another domain.
        result_mark: what stands before the final result of an answer; empty: answers are results as a whole.
    """

    def __init__(self, tokenizer: Any, samples: Any, other: str, result_mark: str) -> None:
        self.samples = [to_sample(s["input_ids"], s["labels"], s["sample_id"]) for s in samples]
        marks = [result_tokens(sample.labels.tolist(), tokenizer, result_mark) for sample in self.samples]
        self.results = torch.tensor([mark for sample in marks for mark in sample])
        tokens = tokenizer(other, add_special_tokens=False).input_ids
        step = max(OTHER_TOKENS, len(tokens) // OTHER_SAMPLES)
        parts = [tokens[start : start + OTHER_TOKENS] for start in range(0, len(tokens), step)][:OTHER_SAMPLES]
        self.other = [to_sample(part, part) for part in parts if len(part) > 1]

    def __call__(self, model: torch.nn.Module) -> dict[str, Any]:
        """The measures, and per held-out record ``sample_nll`` [B] (sum, nats), ``sample_tokens`` [B] and
        ``sample_correct`` [B]: whether its answer is the one that greedy generation gives."""
        nll, greedy = token_measures(model, self.samples)
        other, _ = token_measures(model, self.other)
        correct = [bool(each.all()) for each in greedy]
        return {
            "nll": float(torch.cat(nll).mean()),
            "nll_result": float(torch.cat(nll)[self.results].mean()) if self.results.any() else "",
            "nll_other": float(torch.cat(other).mean()),
            "accuracy": sum(correct) / len(correct),
            "sample_nll": [float(each.sum()) for each in nll],
            "sample_tokens": [len(each) for each in nll],
            "sample_correct": correct,
        }


@torch.no_grad()
def token_measures(model: torch.nn.Module, samples: Sequence[Sample]) -> tuple[list[Tensor], list[Tensor]]:
    """Per sample, nll [T] of its labels and whether each is the most likely token after those before it [T]: greedy
    generation gives the labels where all are."""
    nll: list[Tensor] = [torch.empty(0)] * len(samples)
    greedy = list(nll)
    training = model.training
    model.eval()
    order = sorted(range(len(samples)), key=lambda place: len(samples[place].input_ids))
    for start in range(0, len(order), BATCH):
        places = order[start : start + BATCH]
        ids = [samples[place].input_ids for place in places]
        mask = pad_sequence([torch.ones_like(row) for row in ids], batch_first=True)
        logits = model(input_ids=pad_sequence(ids, batch_first=True), attention_mask=mask).logits
        for place, rows in zip(places, logits, strict=True):
            rows = rows[samples[place].label_positions - 1].float()
            labels = samples[place].labels
            nll[place] = cross_entropy(rows, labels, reduction="none")
            greedy[place] = rows.argmax(-1) == labels
    model.train(training)
    return nll, greedy
