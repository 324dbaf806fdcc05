"""The numbers and tables of a report, computed from a record and nothing else."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import pandas as pd

from qtuning_kernels.run_record.reader import Record
from qtuning_kernels.run_record.schema import PHASES, QUADRANTS

MAX_BINS = 300  # points of a curve over the run


@dataclass(frozen=True)
class Number:
    """One number of the report. `value` is None where the record does not hold what it takes."""

    key: str
    label: str
    value: float | int | None
    kind: str = "count"  # count | share | seconds | flops | plain

    @property
    def text(self) -> str:
        if self.value is None:
            return "not recorded"
        return _FORMATS[self.kind](self.value)


def _seconds(value: float) -> str:
    if value < 100:
        return f"{value:.3g} s"
    minutes, seconds = divmod(round(value), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {seconds:02} s"


def _flops(value: float) -> str:
    for scale, prefix in ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M")):
        if abs(value) >= scale:
            return f"{value / scale:.3g} {prefix}FLOP"
    return f"{value:.3g} FLOP"


_FORMATS = {
    "count": lambda value: f"{value:,.0f}",
    "share": lambda value: f"{100 * value:.1f} %",
    "seconds": _seconds,
    "flops": _flops,
    "plain": lambda value: f"{value:.4g}",
}


def _total(column: pd.Series) -> float | None:
    """The sum of a column, None if it has no value at all."""
    return None if column.notna().sum() == 0 else float(column.sum())


def _ratio(part: float | None, whole: float | None) -> float | None:
    return None if part is None or not whole else part / whole


def truth(column: pd.Series) -> pd.Series:
    """A column of true and false, where what is missing is false."""
    return column.eq(True)


def _count(mask: pd.Series) -> int:
    return int(truth(mask).sum())


def on_plane(samples: pd.DataFrame) -> pd.Series:
    """True where a sample has a place on the plane: finite perplexity and entropy."""
    return pd.Series(
        np.isfinite(samples.ppl.to_numpy(float)) & np.isfinite(samples.entropy.to_numpy(float)),
        index=samples.index,
    )


def plane_numbers(samples: pd.DataFrame) -> list[Number]:
    """Counts and shares of the quadrants, over all rows of `samples`."""
    total = len(samples)
    numbers = [Number("not_on_plane", "with no place on the plane", total - _count(on_plane(samples)))]
    for quadrant, name in QUADRANTS.items():
        count = _count(samples.quadrant == quadrant)
        numbers.append(Number(f"count_q{quadrant}", name, count))
        numbers.append(Number(f"share_q{quadrant}", name, _ratio(count, total), "share"))
    return numbers


def selection_numbers(samples: pd.DataFrame) -> list[Number]:
    """What was seen and what was kept, in samples and in answer tokens."""
    kept = _count(samples.keep)
    supplemented = _count(samples.supplemented)
    seen_tokens, kept_tokens = _total(samples.num_tokens), _total(samples.kept_tokens)
    return [
        Number("samples_seen", "samples seen", len(samples)),
        Number("samples_distinct", "distinct samples", samples.id.nunique()),
        Number("samples_kept", "samples kept", kept),
        Number("share_samples_kept", "of the samples seen", _ratio(kept, len(samples)), "share"),
        Number("samples_supplemented", "supplemented samples", supplemented),
        Number("share_supplemented", "of the kept samples", _ratio(supplemented, kept), "share"),
        Number("tokens_seen", "answer tokens seen", seen_tokens),
        Number("tokens_kept", "answer tokens trained on", kept_tokens),
        Number("share_tokens_kept", "of the answer tokens", _ratio(kept_tokens, seen_tokens), "share"),
    ]


def cost_numbers(steps: pd.DataFrame, tokens_seen: float | None) -> list[Number]:
    """Where time and FLOPs went, and what was saved against full data."""
    seconds = {phase: _total(steps[f"seconds_{phase}"]) for phase in PHASES}
    known = [value for value in seconds.values() if value is not None]
    total = sum(known) if known else None
    spent, full = _total(steps.flops_spent), _total(steps.flops_full)
    loss = steps.loss.dropna()
    numbers = [
        Number("steps", "optimiser steps", len(steps)),
        Number("loss_first", "loss, first step", float(loss.iloc[0]) if len(loss) else None, "plain"),
        Number("loss_last", "loss, last step", float(loss.iloc[-1]) if len(loss) else None, "plain"),
        Number("seconds_total", "time in the steps", total, "seconds"),
        Number("seconds_per_step", "per step", _ratio(total, len(steps)), "seconds"),
        Number("tokens_per_second", "answer tokens seen per second", _ratio(tokens_seen, total)),
        Number("tokens_scored", "positions scored, padding included", _total(steps.tokens_scored)),
        Number("flops_spent", "FLOPs spent", spent, "flops"),
        Number("flops_full", "FLOPs on full data", full, "flops"),
        Number(
            "share_flops_saved",
            "FLOPs saved against full data",
            None if (ratio := _ratio(spent, full)) is None else 1 - ratio,
            "share",
        ),
    ]
    for phase, name in PHASES.items():
        numbers.append(Number(f"seconds_{phase}", name, seconds[phase], "seconds"))
        numbers.append(Number(f"share_seconds_{phase}", name, _ratio(seconds[phase], total), "share"))
    return numbers


def sample_history(samples: pd.DataFrame) -> pd.DataFrame:
    """One row per distinct sample: times ``seen`` and ``kept``, last ``ppl``, ``entropy``, ``quadrant``."""
    keep = truth(samples.keep)
    groups = samples.assign(keep=keep).groupby("id", sort=False)
    table = groups[["ppl", "entropy", "quadrant"]].last()
    table["seen"], table["kept"] = groups.size(), groups.keep.sum()
    return table.reset_index()


def history_numbers(table: pd.DataFrame) -> list[Number]:
    never, always = int((table.kept == 0).sum()), int((table.kept == table.seen).sum())
    numbers = []
    for key, label, count in (
        ("never_kept", "never kept", never),
        ("always_kept", "always kept", always),
        ("sometimes_kept", "kept at times", len(table) - never - always),
    ):
        numbers.append(Number(key, label, count))
        share = _ratio(count, len(table))
        numbers.append(Number(f"share_{key}", "of the distinct samples", share, "share"))
    return numbers


def run_numbers(record: Record, history: pd.DataFrame) -> dict[str, Number]:
    """Every number that a run's report shows, by key."""
    selection = selection_numbers(record.samples)
    tokens_seen = next(number.value for number in selection if number.key == "tokens_seen")
    return _by_key(
        [
            *selection,
            *plane_numbers(record.samples),
            *cost_numbers(record.steps, tokens_seen),
            *history_numbers(history),
        ]
    )


def plane_file_numbers(samples: pd.DataFrame) -> dict[str, Number]:
    """Every number that the report of a scored data set shows, by key."""
    keys = {"samples_seen", "samples_kept", "share_samples_kept", "tokens_seen"}
    selection = [number for number in selection_numbers(samples) if number.key in keys]
    return _by_key([*selection, *plane_numbers(samples)])


def _by_key(numbers: Iterable[Number]) -> dict[str, Number]:
    return {number.key: number for number in numbers}


def over_time(record: Record) -> pd.DataFrame:
    """Curves over the run, at most `MAX_BINS` rows: shares, means, loss, seconds, by ``step``.

    A bin of several steps is named by its last one. Shares are of the bin's samples, ``supplemented`` of its
    kept samples; means and medians are over the bin's samples with a place on the plane.
    """
    steps = np.sort(record.steps.step.unique())
    if not len(steps):
        return pd.DataFrame()
    count = min(len(steps), MAX_BINS)
    bin_of_step = pd.Series(np.arange(len(steps)) * count // len(steps), index=steps)
    curves = pd.DataFrame({"step": bin_of_step.index.to_series().groupby(bin_of_step.to_numpy()).max()})

    samples = record.samples
    sample_bin = samples.step.map(bin_of_step)
    size = samples.groupby(sample_bin).size()
    for quadrant in QUADRANTS:
        curves[f"q{quadrant}"] = (samples.quadrant == quadrant).groupby(sample_bin).sum() / size
    kept = truth(samples.keep).groupby(sample_bin).sum()
    supplemented = truth(samples.supplemented).groupby(sample_bin).sum()
    curves["supplemented"] = supplemented / kept.where(kept > 0)

    placed = samples[on_plane(samples)]
    for name in ("ppl", "entropy"):
        groups = placed[name].groupby(sample_bin[placed.index])
        curves[f"{name}_mean"], curves[f"{name}_median"] = groups.mean(), groups.median()

    groups = record.steps.set_index("step").groupby(bin_of_step)
    for name in ("loss", *(f"seconds_{phase}" for phase in PHASES)):
        curves[name] = groups[name].mean()
    return curves
