"""The numbers and tables of a report, computed from a record and nothing else."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from qtuning_kernels.run_record.reader import Record
from qtuning_kernels.run_record.schema import LOSS_STEPS, PHASES, QUADRANTS

MAX_BINS = 300  # points of a curve over the run
LEAST_WINDOW = 5  # points of a curve that a rolling mean is of, or a tenth of the run where that is more


Values = dict[str, float | int | None]  # None where the record does not hold what it takes


@dataclass(frozen=True)
class Number:
    """One number of the report, and how it is shown."""

    value: float | int | None
    text: str


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


# by the beginning of a number's key; all others are counts
_FORMATS = {
    "share_": lambda value: f"{100 * value:.1f} %",
    "seconds_": _seconds,
    "flops_": _flops,
    "loss_": lambda value: f"{value:#.4g}",
}


def _numbers(values: Values) -> dict[str, Number]:
    def text(key: str, value: float | int | None) -> str:
        if value is None:
            return "not recorded"
        prefix = next(filter(key.startswith, _FORMATS), None)
        return _FORMATS[prefix](value) if prefix else f"{value:,.0f}"

    return {key: Number(value, text(key, value)) for key, value in values.items()}


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


def plane_values(samples: pd.DataFrame) -> Values:
    """Counts and shares of the quadrants, and what was kept of each, over all rows of `samples`."""
    in_quadrant = {quadrant: samples[samples.quadrant == quadrant] for quadrant in QUADRANTS}
    counts = {quadrant: len(rows) for quadrant, rows in in_quadrant.items()}
    return {
        "not_on_plane": len(samples) - _count(on_plane(samples)),
        **{f"count_q{quadrant}": count for quadrant, count in counts.items()},
        **{f"share_q{quadrant}": _ratio(count, len(samples)) for quadrant, count in counts.items()},
        **{f"kept_q{quadrant}": _count(rows.keep) for quadrant, rows in in_quadrant.items()},
        **{f"supplemented_q{quadrant}": _count(rows.supplemented) for quadrant, rows in in_quadrant.items()},
    }


def selection_values(samples: pd.DataFrame) -> Values:
    """What was seen and what was kept, in samples and in answer tokens."""
    kept, supplemented = _count(samples.keep), _count(samples.supplemented)
    seen_tokens, kept_tokens = _total(samples.num_tokens), _total(samples.kept_tokens)
    return {
        "samples_seen": len(samples),
        "samples_distinct": samples.id.nunique(),
        "samples_kept": kept,
        "share_samples_kept": _ratio(kept, len(samples)),
        "samples_supplemented": supplemented,
        "share_supplemented": _ratio(supplemented, kept),
        "tokens_seen": seen_tokens,
        "tokens_kept": kept_tokens,
        "share_tokens_kept": _ratio(kept_tokens, seen_tokens),
    }


def cost_values(steps: pd.DataFrame, tokens_seen: float | None) -> Values:
    """Where time and FLOPs went, and what was saved against full data."""
    seconds = {phase: _total(steps[f"seconds_{phase}"]) for phase in PHASES}
    known = [value for value in seconds.values() if value is not None]
    total = sum(known) if known else None
    spent, full = _total(steps.flops_spent), _total(steps.flops_full)
    ratio = _ratio(spent, full)
    loss = steps.loss.dropna()
    return {
        "steps": len(steps),
        "loss_first": loss.head(LOSS_STEPS).mean() if len(loss) else None,
        "loss_last": loss.tail(LOSS_STEPS).mean() if len(loss) else None,
        "seconds_total": total,
        "seconds_per_step": _ratio(total, len(steps)),
        "tokens_per_second": _ratio(tokens_seen, total),
        "tokens_scored": _total(steps.tokens_scored),
        "flops_spent": spent,
        "flops_full": full,
        "share_flops_saved": None if ratio is None else 1 - ratio,
        **{f"seconds_{phase}": value for phase, value in seconds.items()},
        **{f"share_seconds_{phase}": _ratio(value, total) for phase, value in seconds.items()},
    }


def sample_history(samples: pd.DataFrame) -> pd.DataFrame:
    """One row per sample: times ``seen``, ``kept``, ``supplemented``; last ``ppl``, ``entropy``, ``quadrant``."""
    flags = {name: truth(samples[name]) for name in ("keep", "supplemented")}
    groups = samples.assign(**flags).groupby("id", sort=False)
    table = groups[["ppl", "entropy", "quadrant"]].last()
    table["seen"], table["kept"], table["supplemented"] = groups.size(), groups.keep.sum(), groups.supplemented.sum()
    return table.reset_index()


def history_values(history: pd.DataFrame) -> Values:
    """How many distinct samples were kept never, always, and at times."""
    never, always = int((history.kept == 0).sum()), int((history.kept == history.seen).sum())
    counts = {"never_kept": never, "always_kept": always, "sometimes_kept": len(history) - never - always}
    return counts | {f"share_{key}": _ratio(count, len(history)) for key, count in counts.items()}


def run_numbers(record: Record, history: pd.DataFrame) -> dict[str, Number]:
    """Every number that a run's report shows, by key."""
    selection = selection_values(record.samples)
    cost = cost_values(record.steps, selection["tokens_seen"])
    evaluations = [row["eval_loss"] for row in record.run["evaluations"] if "eval_loss" in row] or [None]
    evaluated = {"loss_eval_first": evaluations[0], "loss_eval_last": evaluations[-1]}
    return _numbers(selection | plane_values(record.samples) | cost | evaluated | history_values(history))


def tag_counts(samples: pd.DataFrame, texts: pd.DataFrame) -> pd.DataFrame:
    """By tag of the data: how many rows of `samples` were in each quadrant, in ``all`` and ``kept``; maybe empty."""
    tags = samples.id.map(texts.drop_duplicates("id").set_index("id").tag).rename("tag")
    table = pd.crosstab(tags, samples.quadrant).reindex(columns=list(QUADRANTS), fill_value=0)
    return table.assign(all=tags.value_counts(), kept=truth(samples.keep).groupby(tags).sum())


def plane_file_numbers(samples: pd.DataFrame) -> dict[str, Number]:
    """Every number that the report of a scored data set shows, by key."""
    selection = selection_values(samples)
    keys = ("samples_seen", "samples_kept", "share_samples_kept", "tokens_seen", "samples_supplemented")
    return _numbers({key: selection[key] for key in keys} | plane_values(samples))


def over_time(record: Record) -> pd.DataFrame:
    """Curves over the run, at most `MAX_BINS` rows: shares, means, loss, seconds, by ``step``.

    A bin of several steps is named by its last one. Shares and seconds are over the `window` of bins around each, the
    ``supplemented`` of the kept samples. Means and medians are over the bin's samples with a place on the plane; they
    and the loss have a rolling mean beside them, ``…_smooth``.
    """
    steps = np.sort(record.steps.step.unique())
    if not len(steps):
        return pd.DataFrame()
    count = min(len(steps), MAX_BINS)
    bin_of_step = pd.Series(np.arange(len(steps)) * count // len(steps), index=steps)
    curves = pd.DataFrame({"step": bin_of_step.index.to_series().groupby(bin_of_step.to_numpy()).max()})

    samples = record.samples
    sample_bin = samples.step.map(bin_of_step)
    counted = {f"q{quadrant}": samples.quadrant == quadrant for quadrant in QUADRANTS}
    counted |= {"size": samples.id.notna(), "kept": truth(samples.keep), "supplemented": truth(samples.supplemented)}
    counted |= {"num_tokens": samples.num_tokens, "kept_tokens": samples.kept_tokens}
    sums = _rolling(pd.DataFrame(counted).astype(float).groupby(sample_bin).sum().reindex(curves.index)).sum()
    for quadrant in QUADRANTS:
        curves[f"q{quadrant}"] = sums[f"q{quadrant}"] / sums["size"]
    curves["samples_kept"], curves["tokens_kept"] = sums.kept / sums["size"], sums.kept_tokens / sums.num_tokens
    curves["supplemented"] = sums.supplemented / sums.kept.where(sums.kept > 0)

    placed = samples[on_plane(samples)]
    for name in ("ppl", "entropy"):
        groups = placed[name].groupby(sample_bin[placed.index])
        curves[f"{name}_mean"], curves[f"{name}_median"] = groups.mean(), groups.median()
    groups = record.steps.set_index("step").groupby(bin_of_step)
    curves["loss"] = groups.loss.mean()
    smoothed = ("loss", "ppl_mean", "ppl_median", "entropy_mean", "entropy_median")
    curves = curves.assign(**{f"{name}_smooth": _rolling(curves[name]).mean() for name in smoothed})
    seconds = [f"seconds_{phase}" for phase in PHASES]
    return curves.join(_rolling(groups[seconds].mean()).mean())


def window(bins: int) -> int:
    """How many points of a curve of `bins` points its rolling means are of; odd, so that the mean is centred."""
    return 2 * (max(LEAST_WINDOW, bins // 10) // 2) + 1


def _rolling(values: Any) -> Any:
    return values.rolling(window(len(values)), min_periods=1, center=True)
