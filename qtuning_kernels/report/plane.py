"""The error-uncertainty plane over a run, cut into frames for the report's slider."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pandas as pd

from qtuning_kernels.report.summary import on_plane, truth
from qtuning_kernels.run_record.schema import QUADRANTS

MAX_FRAMES = 24  # positions of the slider, beside the whole run
MAX_POINTS = 60_000  # of one frame
MAX_POINTS_TOTAL = 240_000  # of all stretches together: about 8 MB
DENSE = 5000  # points of a frame, above which they are smaller and more transparent
THRESHOLDS = ("ppl_low", "ppl_high", "entropy_low", "entropy_high")


@dataclass(frozen=True)
class Frame:
    """What the plane shows at one position of the slider.

    Attributes:
        label: the steps that it covers.
        points: one row per sample, at its last scores within these steps.
        total: how many samples there were before thinning.
        thresholds: the medians of the steps' thresholds; without those that are unknown.
        steps: how many steps the thresholds are of.
        quadrants: whether the run's policy has quadrants.
    """

    label: str
    points: pd.DataFrame
    total: int
    thresholds: dict[str, float]
    steps: int
    quadrants: bool = True

    def groups(self) -> Iterator[tuple[int, bool, str, pd.DataFrame]]:
        """(quadrant, kept, name, points), in the order of drawing: kept on top of dropped, the middle first."""
        kept = truth(self.points.keep)
        if not self.quadrants:
            yield 0, False, "dropped", self.points[~kept]
            yield 2, True, "kept", self.points[kept]
            return
        for keep in (False, True):
            for quadrant in (0, 3, 1, 2, 4):
                name = f"{QUADRANTS[quadrant]}, {'kept' if keep else 'dropped'}"
                yield quadrant, keep, name, self.points[(self.points.quadrant == quadrant) & (kept == keep)]


def has_quadrants(samples: pd.DataFrame) -> bool:
    """Whether any sample has a quadrant, as those of a policy with a plane have."""
    return bool(samples.quadrant.notna().any())


def quantile(values: np.ndarray, gamma: float) -> float:
    """`Q_γ`: the smallest value with at least a fraction `gamma` of the values at or below it."""
    rank = max(1, math.ceil(gamma * len(values) - 1e-9))  # 0.3·10 is 3 and not 3.0000000000000004
    return float(np.partition(values, rank - 1)[rank - 1])


def step_thresholds(samples: pd.DataFrame, steps: pd.DataFrame) -> pd.DataFrame:
    """The thresholds of each step: as recorded, else the quantiles of its samples at the recorded `alpha`."""
    table = steps.set_index("step")[[*THRESHOLDS, "alpha"]].astype(float)
    unknown = table[list(THRESHOLDS)].isna().any(axis=1) & table.alpha.notna()
    placed = samples[on_plane(samples) & samples.step.isin(table.index[unknown])]
    for step, pool in placed.groupby("step"):
        alpha = table.at[step, "alpha"]
        for axis in ("ppl", "entropy"):
            values = pool[axis].to_numpy(float)
            for name, gamma in ((f"{axis}_low", alpha), (f"{axis}_high", 1 - alpha)):
                if math.isnan(table.at[step, name]):
                    table.at[step, name] = quantile(values, gamma)
    return table[list(THRESHOLDS)]


def _frame(label: str, rows: pd.DataFrame, thresholds: pd.DataFrame, limit: int, quadrants: bool) -> Frame:
    latest = rows[on_plane(rows)].drop_duplicates("id", keep="last")
    points = latest if len(latest) <= limit else latest.sample(limit, random_state=0).sort_index()
    medians = thresholds.median().dropna().to_dict()
    return Frame(label, points, len(latest), medians, len(thresholds.dropna(how="all")), quadrants)


def frames(samples: pd.DataFrame, steps: pd.DataFrame) -> list[Frame]:
    """The whole run first, then up to `MAX_FRAMES` stretches of equally many steps."""
    if samples.empty:
        return []
    numbers = np.sort(steps.step.unique())
    thresholds = step_thresholds(samples, steps)
    whole = _label("all steps", numbers) if len(numbers) else "all samples"
    quadrants = has_quadrants(samples)
    result = [_frame(whole, samples, thresholds, MAX_POINTS, quadrants)]
    if len(numbers) < 2:
        return result
    limit = MAX_POINTS if len(samples) <= MAX_POINTS_TOTAL else MAX_POINTS_TOTAL // MAX_FRAMES
    for stretch in np.array_split(numbers, min(MAX_FRAMES, len(numbers))):
        rows = samples[samples.step.between(stretch[0], stretch[-1])]
        label = _label("step" if len(stretch) == 1 else "steps", stretch)
        result.append(_frame(label, rows, thresholds.loc[stretch[0] : stretch[-1]], limit, quadrants))
    return result


def _label(prefix: str, numbers: np.ndarray) -> str:
    span = f"{numbers[0]}" if len(numbers) == 1 else f"{numbers[0]}–{numbers[-1]}"
    return f"{prefix} {span}"
