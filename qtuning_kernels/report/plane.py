"""The samples on the error-uncertainty plane, as the page's script draws them: all together, and step by step."""

import math
from dataclasses import dataclass

import numpy as np
import pandas as pd

from qtuning_kernels.report.summary import on_plane

MAX_POINTS = 60_000  # samples of the whole run
MAX_ROWS = 240_000  # of all steps together: about 9 MB
THRESHOLDS = ("ppl_low", "ppl_high", "entropy_low", "entropy_high")


@dataclass(frozen=True)
class Plane:
    """What the plane can show.

    Attributes:
        rows: a sample at one scoring each, in the record's order; ``last`` where it is the sample's last one.
        frames: the positions of the slider, the whole run first: ``step`` (None: each sample's last scoring),
            ``label``, ``total`` (samples before thinning), ``alpha``, ``thresholds`` (of a single step).
    """

    rows: pd.DataFrame
    frames: list[dict]


def has_quadrants(samples: pd.DataFrame) -> bool:
    """Whether any sample has a quadrant, as those of a policy with a plane have."""
    return bool(samples.quadrant.notna().any())


def quantile(values: np.ndarray, gamma: float) -> float:
    """`Q_γ`: the smallest value with at least a fraction `gamma`, known to float32, of the values at or below it."""
    rank = max(1, math.ceil((gamma - 1e-7) * len(values)))  # 0.3·10 is 3 and not 3.0000001
    return float(np.partition(values, rank - 1)[rank - 1])


def step_thresholds(samples: pd.DataFrame, steps: pd.DataFrame) -> pd.DataFrame:
    """The thresholds of each step: as recorded, else the quantiles of its samples at the recorded `alpha`.

    NaN in a step whose quadrants they do not part: those of several pools, each with its own, or of tied values.
    """
    table = steps.set_index("step")[[*THRESHOLDS, "alpha"]].astype(float)
    unknown = table[list(THRESHOLDS)].isna().any(axis=1) & table.alpha.notna()
    placed = samples[on_plane(samples) & samples.step.isin(table.index)]
    for step, pool in placed[placed.step.isin(table.index[unknown])].groupby("step"):
        alpha = table.at[step, "alpha"]
        for axis in ("ppl", "entropy"):
            values = pool[axis].to_numpy(float)
            for name, gamma in ((f"{axis}_low", alpha), (f"{axis}_high", 1 - alpha)):
                if math.isnan(table.at[step, name]):
                    table.at[step, name] = quantile(values, gamma)
    borders = {name: table[name].reindex(placed.step).to_numpy() for name in THRESHOLDS}
    wrong, unsure = (placed[axis].to_numpy(float) >= borders[f"{axis}_high"] for axis in ("ppl", "entropy"))
    right, sure = (placed[axis].to_numpy(float) <= borders[f"{axis}_low"] for axis in ("ppl", "entropy"))
    corners = [wrong & unsure, wrong & sure & ~unsure, right & ~wrong & sure & ~unsure, right & ~wrong & unsure]
    agrees = np.select(corners, [1, 2, 3, 4], 0) == placed.quadrant.to_numpy(float)
    table.loc[~table.index.isin(placed.step) | table.index.isin(placed.step[~agrees]), list(THRESHOLDS)] = math.nan
    return table


def make_plane(samples: pd.DataFrame, steps: pd.DataFrame) -> Plane:
    """The whole run, each sample where it was scored last, and every step, or every n-th to the last."""
    placed = samples[on_plane(samples)]
    latest = placed.drop_duplicates("id", keep="last")
    shown = latest if len(latest) <= MAX_POINTS else latest.sample(MAX_POINTS, random_state=0)
    numbers = np.sort(steps.step.unique())
    table = step_thresholds(samples, steps.drop_duplicates("step", keep="last"))
    chosen = numbers[:: -math.ceil(max(1, len(placed) / MAX_ROWS))][::-1]
    in_steps = shown if len(chosen) < 2 else placed[placed.step.isin(chosen)]
    rows = placed.loc[in_steps.index.union(shown.index)]
    totals = placed.groupby("step").size()

    def of_step(step: int) -> dict:
        borders = table.loc[step].dropna().to_dict()
        return {"alpha": borders.pop("alpha", None), "thresholds": borders, "total": int(totals.get(step, 0))}

    frames: list[dict] = []
    if len(numbers) == 1:
        frames = [{"step": None, "label": f"step {numbers[0]}" if numbers[0] else "all samples"} | of_step(numbers[0])]
    elif len(numbers):
        label = f"all steps {numbers[0]}–{numbers[-1]}"
        frames = [{"step": None, "label": label, "total": len(latest), "alpha": None, "thresholds": {}}]
        frames += [{"step": int(step), "label": f"step {step}"} | of_step(step) for step in chosen]
    return Plane(rows.assign(last=rows.index.isin(shown.index)), frames if len(rows) else [])
