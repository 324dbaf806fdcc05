"""Paired comparisons of the quality benchmark's runs: differences with intervals over seeds and held-out samples."""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from benchmarks.quality_grid import Setting, setting_of

DRAWS = 4000
Floats = NDArray[np.float64]


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


def paired_difference(first: Floats, second: Floats, weight: Floats, draws: int = DRAWS) -> Difference:
    """The difference first − second of weighted means over samples, with a bootstrap over seeds and samples.

    The policies of a seed saw the same pools, and all seeds are measured on the same samples: one draw takes seeds
    and, of all seeds alike, samples. Of n it takes n − 1 with replacement, since n would give the variance of a mean
    by the factor (n − 1) / n too small (Rao and Wu, 1988), which is ⅔ for three seeds.

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
    seeds, samples = difference.shape
    rng = np.random.default_rng(0)
    # how often each seed and each sample is drawn
    of_seed = rng.multinomial(max(1, seeds - 1), np.full(seeds, 1 / seeds), draws)
    of_sample = rng.multinomial(max(1, samples - 1), np.full(samples, 1 / samples), draws)
    drawn = np.einsum("ds,sb,db->d", of_seed, difference, of_sample, optimize=True)
    means = drawn / (of_seed.sum(1) * (of_sample @ weight))
    low, high = np.quantile(means, (0.025, 0.975))
    return Difference(float(by_seed.mean()), float(low), float(high), tuple(map(float, by_seed)))


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

    def on_machine(self, machine: str, seeds: list["Curve"]) -> "Curve | None":
        """The curve with the seconds a step took other seeds of the same policy on that machine; None without one."""
        if self.machine == machine:
            return self
        there = [curve.cpu_seconds[-1] / curve.steps[-1] for curve in seeds if curve.machine == machine]
        if not there:
            return None
        return self._replace(cpu_seconds=self.cpu_seconds * np.mean(there) * self.steps[-1] / self.cpu_seconds[-1])

    def at_seconds(self, seconds: float) -> Floats:
        """``[B]``: the nll of each sample at that time, on the line between the points around it."""
        return np.array([np.interp(seconds, self.cpu_seconds, column) for column in self.nll.T])


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
    """The difference in nll when the first of the two has used up its time, seed by seed, in seconds of one processor.
    A seed whose two runs cannot be had on one is left out."""
    pairs = [_on_one_machine(*pair, first, second) for pair in _pairs(first, second)]
    pairs = [pair for pair in pairs if pair is not None]
    if not pairs:
        return None
    times = [min(a.cpu_seconds[-1], b.cpu_seconds[-1]) for a, b in pairs]
    left = np.stack([a.at_seconds(t) for (a, _), t in zip(pairs, times, strict=True)])
    right = np.stack([b.at_seconds(t) for (_, b), t in zip(pairs, times, strict=True)])
    return paired_difference(left, right, pairs[0][0].tokens)


def _on_one_machine(a: Curve, b: Curve, first: list[Curve], second: list[Curve]) -> tuple[Curve, Curve] | None:
    """The two in seconds of one machine: a run that another made takes those of the same policy's other seeds."""
    for machine in dict.fromkeys((a.machine, b.machine)):
        pair = a.on_machine(machine, first), b.on_machine(machine, second)
        if pair[0] is not None and pair[1] is not None:
            return pair[0], pair[1]
    return None


def _pairs(first: list[Curve], second: list[Curve]) -> list[tuple[Curve, Curve]]:
    others = {curve.setting.seed: curve for curve in second}
    return [(curve, others[curve.setting.seed]) for curve in first if curve.setting.seed in others]
