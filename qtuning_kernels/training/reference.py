"""The nll of a reference model, for policies that compare with it."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qtuning_kernels.data.samples import Sample
from qtuning_kernels.models.causal_lm import CausalLM
from qtuning_kernels.models.matmul import choose_precision
from qtuning_kernels.models.scoring import Scorer


class ReferenceScores:
    """nll of every trainable token under a reference model, by sample id; each sample is scored once.

    Args:
        model: scores what `nll` does not hold, where it is, whole in every process.
        nll: by sample id, ``[T(x)]`` in nats; or a Parquet file with the columns ``sample_id`` and ``nll``, as
            ``qtuning score --output`` writes it.

    Raises:
        ValueError: neither is given, the model is not supported, or the file lacks a column.
    """

    def __init__(self, model: nn.Module | None = None, nll: Mapping[int | str, Any] | str | Path | None = None) -> None:
        if model is None and nll is None:
            raise ValueError("reference_model and reference_nll are None; accepted: one of the two")
        self._scorer: Scorer | None = None
        if model is not None:
            causal_lm = CausalLM(model.requires_grad_(False))
            causal_lm.check()
            precision = choose_precision(causal_lm.base, matmul="auto", score_dtype="model")
            self._scorer = Scorer(model, causal_lm, precision)
        known = _read(Path(nll)) if isinstance(nll, (str, Path)) else nll or {}
        self._known = {i: torch.as_tensor(values, dtype=torch.float32) for i, values in known.items()}

    def nll(self, samples: Sequence[Sample]) -> Tensor:
        """float32 ``[T]``, nats, on the host.

        Raises:
            ValueError: a sample without a score, or with as many as it has no trainable tokens.
        """
        missing = [s for s in samples if s.sample_id not in self._known]
        if missing and self._scorer is None:
            raise ValueError(
                f"reference_nll has no sample {missing[0].sample_id!r}; accepted: every sample of the data"
            )
        if missing and self._scorer is not None:
            scores = self._scorer.score(missing, next(self._scorer.model.parameters()).device).cpu()
            parts = scores.nll.split(scores.cu_seqlens.diff().tolist())
            self._known |= {s.sample_id: part for s, part in zip(missing, parts, strict=True)}
        for sample in samples:
            got, expected = len(self._known[sample.sample_id]), len(sample.label_positions)
            if got != expected:
                raise ValueError(
                    f"reference_nll of sample {sample.sample_id!r} has {got} entries; accepted: {expected}, one for "
                    "each trainable token"
                )
        return torch.cat([self._known[s.sample_id] for s in samples])


def _read(path: Path) -> dict[int | str, Any]:
    import pyarrow.parquet as pq

    table = pq.read_table(path)
    if missing := {"sample_id", "nll"} - set(table.column_names):
        raise ValueError(f"{path} has no column {sorted(missing)}; accepted: a file of qtuning score --output")
    return dict(zip(table["sample_id"].to_pylist(), table["nll"].to_pylist(), strict=True))
