"""What the quality benchmark measures of a model: nll of held-out answers, exact matches, nll of other text."""

from typing import Any

import torch
from torch import Tensor

from qtuning_kernels.data.samples import cu_seqlens_of, to_sample
from qtuning_kernels.models.scoring import score_samples

OTHER_SAMPLES, OTHER_TOKENS = 12, 128
GENERATION_BATCH = 64


def result_tokens(labels: list[int], tokenizer: Any, mark: str) -> list[bool]:
    """Which tokens of an answer follow the last `mark`: those of its final result. None without a mark."""
    places = range(len(labels))
    begins = [i for i in places if mark and mark in tokenizer.decode(labels[i:])]
    if not begins:
        return [False for _ in places]
    end = next(i for i in places if i >= begins[-1] and mark in tokenizer.decode(labels[begins[-1] : i + 1]))
    return [i > end for i in places]


class Evaluation:
    """Measures a model on held-out records, always in float32.

    Args:
        tokenizer: with the chat template of training.
        records, samples: the held-out ones and their tokens.
        other: text of another domain.
        result_mark: what stands before the final result of an answer; empty: answers are results as a whole.
        generate: how many of the records are answered by greedy generation; 0: none.
        most_new_tokens: where a generated answer ends at the latest.
    """

    def __init__(
        self,
        tokenizer: Any,
        records: list[dict],
        samples: Any,
        other: str,
        result_mark: str,
        generate: int,
        most_new_tokens: int,
    ) -> None:
        self.tokenizer, self.records, self.most_new_tokens = tokenizer, records, most_new_tokens
        self.samples = [to_sample(s["input_ids"], s["labels"], s["sample_id"]) for s in samples]
        self.cu_seqlens = cu_seqlens_of(self.samples)
        marks = [result_tokens(sample.labels.tolist(), tokenizer, result_mark) for sample in self.samples]
        self.results = torch.tensor([mark for sample in marks for mark in sample])
        self.generate = generate
        tokens = tokenizer(other, add_special_tokens=False).input_ids
        step = max(OTHER_TOKENS, len(tokens) // OTHER_SAMPLES)
        parts = [tokens[start : start + OTHER_TOKENS] for start in range(0, len(tokens), step)][:OTHER_SAMPLES]
        self.other = [to_sample(part, part) for part in parts if len(part) > 1]

    def __call__(self, model: torch.nn.Module) -> dict[str, Any]:
        """The measures, and per held-out record ``sample_nll`` [B] (sum, nats), ``sample_tokens`` [B] and, of those
        that were answered, ``sample_correct``."""
        nll = self._nll(model, self.samples)
        counts = self.cu_seqlens.diff()
        sums = torch.stack([part.sum() for part in nll.split(counts.tolist())])
        measured = {
            "nll": float(nll.mean()),
            "nll_result": float(nll[self.results].mean()) if self.results.any() else "",
            "nll_other": float(self._nll(model, self.other).mean()),
            "sample_nll": sums.tolist(),
            "sample_tokens": counts.tolist(),
            "sample_correct": self.exact_matches(model),
        }
        correct = measured["sample_correct"]
        return measured | {"accuracy": sum(correct) / len(correct) if correct else ""}

    @staticmethod
    def _nll(model: torch.nn.Module, samples: list) -> Tensor:
        return score_samples(model, samples, score_dtype="float32", matmul="default").nll

    @torch.no_grad()
    def exact_matches(self, model: torch.nn.Module) -> list[bool]:
        """Of the first `generate` records, whether the greedy answer is the record's, white space at its ends aside."""
        correct: list[bool] = []
        training = model.training
        model.eval()
        for start in range(0, self.generate, GENERATION_BATCH):
            records = self.records[start : min(start + GENERATION_BATCH, self.generate)]
            prompts = [
                self.tokenizer.apply_chat_template(
                    [{"role": "user", "content": record["question"]}], add_generation_prompt=True, tokenize=False
                )
                for record in records
            ]
            batch = self.tokenizer(
                prompts, padding=True, padding_side="left", add_special_tokens=False, return_tensors="pt"
            )
            length = batch.input_ids.shape[1]
            made = model.generate(
                input_ids=batch.input_ids,
                attention_mask=batch.attention_mask,
                max_new_tokens=self.most_new_tokens,
                do_sample=False,
                eos_token_id=self.tokenizer.eos_token_id,
                pad_token_id=self.tokenizer.pad_token_id,
            )
            answers = self.tokenizer.batch_decode(made[:, length:], skip_special_tokens=True)
            pairs = zip(answers, records, strict=True)
            correct += [answer.strip() == record["answer"].strip() for answer, record in pairs]
        model.train(training)
        return correct
