"""Paired comparisons of the quality benchmark's runs: differences with intervals over seeds and held-out samples."""

from collections import Counter
from math import inf, sqrt
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from benchmarks.quality_grid import Setting, setting_of

Floats = NDArray[np.float64]
# the 97.5 % point of Student's distribution with 1, 2, ... degrees of freedom; beyond, the last is a little too wide
STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
NORMAL = 1.960


class Difference(NamedTuple):
    """Of two policies: the mean over seeds, its 95 % interval, and each seed's own."""

    mean: float
    low: float
    high: float
    by_seed: tuple[float, ...]

    @property
    def shown(self) -> bool:
        """Whether the interval leaves 0 out and all seeds agree, of which there are at least 3."""
        signs = {np.sign(value) for value in self.by_seed}
        return len(self.by_seed) > 2 and len(signs) == 1 and (self.low > 0 or self.high < 0)


def paired_difference(first: Floats, second: Floats, weight: Floats) -> Difference:
    """The difference first − second of weighted means over samples, with an interval over seeds and samples.

    The policies of a seed saw the same pools, and all seeds are measured on the same samples. The squared half-width
    is the sum of two: the standard error over the seeds' differences by Student's distribution, since of few seeds a
    bootstrap reaches no further than the outermost, and that over samples of the mean over seeds, a ratio of sums
    (linearised). Of one seed the interval is everything.

    Args:
        first, second: ``[seeds, samples]``, sums over a sample's tokens (or 0 and 1).
        weight: ``[samples]``, what each sample counts (its tokens, or 1).

    Raises:
        ValueError: the shapes differ.
    """
    if first.shape != second.shape or first.shape[1:] != weight.shape:
        raise ValueError(f"shapes are {first.shape}, {second.shape} and {weight.shape}; accepted: [S, B] twice and [B]")
    difference = first - second
    by_seed = difference.sum(1) / weight.sum()
    mean, (seeds, samples) = by_seed.mean(), difference.shape
    if seeds == 1:
        return Difference(float(mean), -inf, inf, (float(mean),))
    over_seeds = STUDENT[min(seeds, len(STUDENT) + 1) - 2] * by_seed.std(ddof=1) / sqrt(seeds)
    residual = difference.mean(0) - mean * weight
    over_samples = NORMAL * sqrt(samples / max(1, samples - 1) * (residual**2).sum()) / weight.sum()
    half = np.hypot(over_seeds, over_samples)
    return Difference(float(mean), float(mean - half), float(mean + half), tuple(map(float, by_seed)))


class Curve(NamedTuple):
    """What a run measured: ``steps``, ``cpu_seconds`` [P], and per held-out sample ``nll`` [P, B] (sums),
    ``correct`` [P, B] and ``tokens`` [B]."""

    setting: Setting
    steps: Floats
    cpu_seconds: Floats
    nll: Floats
    tokens: Floats
    correct: Floats
    rows: list[dict[str, str]]

    def mean_nll(self) -> Floats:
        """``[P]``: nats per token."""
        return self.nll.sum(1) / self.tokens.sum()

    def place(self, step: float) -> int:
        """Of the last point after at most that many steps."""
        return int(np.flatnonzero(self.steps <= step)[-1])

    @property
    def machine(self) -> str:
        """That made the run."""
        return self.rows[-1]["machine"]

    def at_seconds(self, seconds: float) -> Floats:
        """``[B]``: the nll of each sample at that time, on the line between the points around it."""
        return np.array([np.interp(seconds, self.cpu_seconds, column) for column in self.nll.T])


def on_machine(curve: Curve, machine: str, seeds: list[Curve]) -> Curve:
    """The curve with the least seconds that a step of the same policy took there, over its seeds: what other processes
    do makes a step longer, never shorter. One of the seeds must have been run there."""
    there = [seed.cpu_seconds[-1] / seed.steps[-1] for seed in seeds if seed.machine == machine]
    return curve._replace(cpu_seconds=curve.steps * min(there))


def curves(rows: list[dict[str, str]], samples: list[dict[str, str]]) -> list[Curve]:
    """The runs of the two CSV files. A run's first point is the model as it was, where that was measured."""
    lists = {(row["run"], int(row["step"])): row for row in samples}
    by_run: dict[str, list[dict[str, str]]] = {}
    for row in rows:
        by_run.setdefault(row["run"], []).append(row)
    starts = {}
    for own in by_run.values():
        setting = setting_of(own[0])
        if not setting.steps:
            starts[setting.data, setting.held_out] = own[0]
    found = []
    for own in by_run.values():
        setting = setting_of(own[0])
        if not setting.steps:
            continue
        start = starts.get((setting.data, setting.held_out))
        points = ([start] if start else []) + sorted(own, key=lambda row: int(row["step"]))
        each = [lists[row["run"], int(row["step"])] for row in points]
        found.append(
            Curve(
                setting,
                np.array([float(row["step"]) for row in points]),
                np.array([float(row["cpu_seconds"]) for row in points]),
                np.array([[float(x) for x in row["sample_nll"].split()] for row in each]),
                np.array([float(x) for x in each[0]["sample_tokens"].split()]),
                np.array([[float(x) for x in row["sample_correct"]] for row in each]),
                points,
            )
        )
    return found


def at_equal_steps(first: list[Curve], second: list[Curve], what: str = "nll") -> Difference | None:
    """The difference at the last step that both have, over the seeds that both have."""
    pairs = _pairs(first, second)
    if not pairs:
        return None
    last = min(float(min(a.steps[-1], b.steps[-1])) for a, b in pairs)
    left, right = (np.stack([getattr(pair[side], what)[pair[side].place(last)] for pair in pairs]) for side in (0, 1))
    weight = pairs[0][0].tokens if what == "nll" else np.ones(left.shape[1])
    return paired_difference(left, right, weight) if left.size else None


def at_equal_time(first: list[Curve], second: list[Curve]) -> Difference | None:
    """The difference in nll when the first of the two has used up its time, in seconds of the processor that made most
    of the runs of both; None where no processor has run both."""
    runs = Counter(curve.machine for curve in first + second)
    both = {curve.machine for curve in first} & {curve.machine for curve in second}
    pairs = _pairs(first, second)
    if not both or not pairs:
        return None
    machine = max(sorted(both), key=runs.__getitem__)
    left, right = (
        [on_machine(pair[side], machine, seeds) for pair in pairs] for side, seeds in enumerate((first, second))
    )
    times = [min(a.cpu_seconds[-1], b.cpu_seconds[-1]) for a, b in zip(left, right, strict=True)]
    nll = [np.stack([curve.at_seconds(t) for curve, t in zip(side, times, strict=True)]) for side in (left, right)]
    return paired_difference(*nll, pairs[0][0].tokens)


def _pairs(first: list[Curve], second: list[Curve]) -> list[tuple[Curve, Curve]]:
    others = {curve.setting.seed: curve for curve in second}
    return [(curve, others[curve.setting.seed]) for curve in first if curve.setting.seed in others]
