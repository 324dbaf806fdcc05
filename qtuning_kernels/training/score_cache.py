"""Scores of earlier epochs: of runs that score only every n-th one, and what a sample scored when it was first met."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from qtuning_kernels.data.samples import Sample, cu_seqlens_of
from qtuning_kernels.files import write_atomic
from qtuning_kernels.models.collectives import gather
from qtuning_kernels.models.scoring import Scores


class ScoreCache:
    """Per-token scores by sample id, used for `rescore_every` epochs before a sample is scored again.

    Costs 12 bytes per trainable token of the data set on the host; nothing with ``rescore_every=1``. With
    `always_score` the scorer is called even where no sample needs it, for the sake of the other processes. All is on
    the host.
    """

    def __init__(self, rescore_every: int = 1, *, always_score: bool = False) -> None:
        self.rescore_every, self.always_score = rescore_every, always_score
        self._entries: dict[int | str, tuple[int, Tensor]] = {}  # id -> epoch, [3, T(x)]
        self._first: dict[int | str, float] = {}  # id -> mean nll

    def score(
        self, samples: Sequence[Sample], epoch: int, fresh: Callable[[Sequence[Sample]], Scores]
    ) -> tuple[Scores, float]:
        """Scores of `samples`, and their mean age in epochs; `fresh` is called for those not at hand."""
        if self.rescore_every == 1:
            return fresh(samples), 0.0
        stale = [s for s in samples if not self._holds(s, epoch)]
        if stale or self.always_score:
            scores = fresh(stale)
            sizes = scores.cu_seqlens.diff().tolist()
            for sample, stats in zip(stale, torch.stack(scores[:3]).split(sizes, dim=1), strict=True):
                self._entries[sample.sample_id] = (epoch, stats.clone())
        entries = [self._entries[s.sample_id] for s in samples]
        nll, entropy, lse = torch.cat([stats for _, stats in entries], dim=1)
        age = sum(epoch - scored for scored, _ in entries) / len(entries)
        return Scores(nll, entropy, lse, cu_seqlens_of(samples)), age

    def first_nll(self, samples: Sequence[Sample], mean_nll: Tensor) -> Tensor:
        """float32 ``[B]``: the mean nll of each sample when any process first scored it; `mean_nll` if that is now.

        Every process calls it as often, and all remember the same.
        """
        for part in gather(list(zip((s.sample_id for s in samples), mean_nll.tolist(), strict=True))):
            for sample_id, mean in part:
                self._first.setdefault(sample_id, mean)
        return torch.tensor([self._first[s.sample_id] for s in samples], dtype=torch.float32)

    def _holds(self, sample: Sample, epoch: int) -> bool:
        entry = self._entries.get(sample.sample_id)
        if entry is None or entry[1].shape[1] != len(sample.label_positions):
            return False
        return epoch - entry[0] < self.rescore_every

    def save(self, path: Path | None, metadata: dict[str, str]) -> None:
        """Writes the newest entries of all processes, and `metadata`, as one safetensors file.

        Every process calls it; those without a path write nothing. What a resumed run deals to a process another one
        may have scored.
        """
        entries: dict[int | str, tuple[int, Tensor]] = {}
        for part in gather(self._entries):
            entries |= {i: entry for i, entry in part.items() if i not in entries or entries[i][0] < entry[0]}
        if path is None:
            return
        ids = list(entries)
        stats = [entries[i][1] for i in ids]
        tensors = {
            "epoch": torch.tensor([entries[i][0] for i in ids], dtype=torch.int64),
            "length": torch.tensor([s.shape[1] for s in stats], dtype=torch.int64),
            "stats": torch.cat([torch.zeros(3, 0), *stats], dim=1),
            "first_nll": torch.tensor(list(self._first.values()), dtype=torch.float64),
        }
        with write_atomic(path) as temporary:
            save_file(
                tensors,
                temporary,
                metadata={**metadata, "ids": json.dumps(ids), "first_ids": json.dumps(list(self._first))},
            )

    def load(self, path: Path) -> None:
        with safe_open(path, framework="pt") as file:
            ids, first = (json.loads(file.metadata()[name]) for name in ("ids", "first_ids"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
        parts = tensors["stats"].split(tensors["length"].tolist(), dim=1)
        rows = zip(ids, tensors["epoch"].tolist(), parts, strict=True)
        self._first = dict(zip(first, tensors["first_nll"].tolist(), strict=True))
        self._entries = {sample_id: (epoch, stats.clone()) for sample_id, epoch, stats in rows}
