"""The tables and pictures of docs/quality.md, from the CSV files alone."""

import json
import re
from collections import Counter
from collections.abc import Callable, Iterable
from math import isinf
from pathlib import Path

import numpy as np

from benchmarks.common import RESULTS, ROOT, beside, fill, markdown, read_rows, stored_rows
from benchmarks.quality_data import CONDITIONS, KINDS
from benchmarks.quality_grid import RECORDS
from benchmarks.quality_statistics import (
    Curve,
    Difference,
    at_equal_steps,
    at_equal_time,
    curves,
    on_machine,
    paired_difference,
)

BASELINE = "random"
SMALLEST = 0.125
STEPS = 60  # after which the tables of measures take their numbers, or at the end of a shorter run
WHOLE = "qtuning, whole samples"
PUBLISHED, KEEP_HIGH, DROP = "qtuning, keep_low", "qtuning, keep_high", "qtuning, keep_low, drop"
RESIDUAL = "qtuning_residual, keep_low"
# the questions of docs/quality.md, first against second
QUESTIONS = (
    (1, PUBLISHED, BASELINE), (2, WHOLE, BASELINE), (3, PUBLISHED, WHOLE), (4, RESIDUAL, PUBLISHED),
    (5, "longest", BASELINE), (5, "entropy", BASELINE), (6, BASELINE, "full"), (7, "infobatch", "full"),
    (7, "dft", "full"), (7, "eaft", "full"), (8, KEEP_HIGH, PUBLISHED), (8, KEEP_HIGH, WHOLE), (9, DROP, PUBLISHED),
    (10, f"{WHOLE}, rescore_every=2", WHOLE), (10, f"{WHOLE}, rescore_every=4", WHOLE),
    (11, f"{WHOLE}, float32", WHOLE), (12, KEEP_HIGH, BASELINE),
)  # fmt: skip
PAGE = ROOT / "docs" / "quality.md"
# a colour for each, the same in every picture
COLORS = {
    "full": "#000000", "random": "#999999", "longest": "#56B4E9", "entropy": "#0072B2", "infobatch": "#F0E442",
    "dft": "#CC79A7", "eaft": "#882255", PUBLISHED: "#D55E00", WHOLE: "#E69F00", RESIDUAL: "#009E73",
    KEEP_HIGH: "#8C564B", DROP: "#17BECF",
}  # fmt: skip


def label(curve: Curve) -> str:
    """A policy as the tables name it, with its options; those that are words stand by their values."""
    setting = curve.setting
    whole = ["whole samples"] if setting.policy.startswith("qtuning") and setting.token_ratio == 1 else []
    options = json.loads(setting.options).items()
    named = [value if isinstance(value, str) else f"{name}={value}" for name, value in options]
    return ", ".join([setting.policy, *whole, *named])


def data_of(curve: Curve) -> str:
    """The data as the tables name it, with the number of records where it is not the usual one."""
    setting = curve.setting
    return setting.data if setting.records == RECORDS else f"{setting.data}, {setting.records} records"


def budget(curve: Curve) -> float:
    """The share of the samples, under which a policy stands; full data and what weighs it belong to the smallest."""
    return curve.setting.sample_ratio if curve.setting.sample_ratio < 1 else SMALLEST


def shown(difference: Difference | None, digits: int = 3) -> str:
    """The difference and its interval; bold where the interval supports it."""
    if difference is None:
        return ""
    if isinf(difference.low):
        return f"{difference.mean:+.{digits}f}, one seed"
    text = f"{difference.mean:+.{digits}f} [{difference.low:+.{digits}f}, {difference.high:+.{digits}f}]"
    return f"**{text}**" if difference.shown else text


def mean_of(group: list[Curve], column: str, digits: int, step: float = np.inf) -> str:
    """Of a column at each run's last point up to `step`, over seeds."""
    values = [curve.rows[curve.place(step)][column] for curve in group]
    return f"{np.mean([float(value) for value in values]):.{digits}f}" if all(values) else ""


def share_kept(rows: Iterable[dict[str, str]], kind: str) -> tuple[float, float]:
    """Of the kept samples, and of all that were seen, the share of a kind."""
    kept, seen, all_kept, all_seen = 0, 0, 0, 0
    for row in rows:
        kept, seen = kept + int(row[f"kept_{kind}"]), seen + int(row[f"seen_{kind}"])
        all_kept += sum(int(row[f"kept_{each}"]) for each in KINDS)
        all_seen += sum(int(row[f"seen_{each}"]) for each in KINDS)
    return kept / max(1, all_kept), seen / max(1, all_seen)


def selects(group: list[Curve]) -> bool:
    """Whether any sample was left out."""
    return any(row[f"kept_{kind}"] != row[f"seen_{kind}"] for curve in group for row in curve.rows for kind in KINDS)


Groups = dict[tuple[str, float, str], dict[str, list[Curve]]]


def grouped(found: list[Curve]) -> Groups:
    """By data, share of the samples and condition, then by policy: its seeds. Runs at the rate of most, only."""
    groups: Groups = {}
    for curve in found:
        key = data_of(curve), budget(curve), curve.setting.condition
        groups.setdefault(key, {}).setdefault(label(curve), []).append(curve)
    return dict(sorted(groups.items(), key=lambda item: (item[0][:2], list(CONDITIONS).index(item[0][2]))))


def on_one_machine(policies: dict[str, list[Curve]]) -> dict[str, list[Curve]]:
    """With the seconds of the machine that made the most of the runs; without policies of which it made none."""
    machine = Counter(curve.machine for group in policies.values() for curve in group).most_common(1)[0][0]
    there = {name: group for name, group in policies.items() if any(curve.machine == machine for curve in group)}
    return {name: [on_machine(curve, machine, group) for curve in group] for name, group in there.items()}


def at_chosen_rate(found: list[Curve]) -> list[Curve]:
    """Without the runs of full data at the rates that were not chosen."""
    rates: dict[str, float] = {}
    for curve in found:
        own = [c for c in found if c.setting.data == curve.setting.data and c.setting.policy == "full"]
        own = [c for c in own if c.setting.condition == "clean" and c.setting.seed == 0]
        others = {c.setting.learning_rate for c in found if c.setting.policy != "full"}
        if own:
            best = min(own, key=lambda c: c.mean_nll()[-1]).setting.learning_rate
        rates[curve.setting.data] = best if own else min(others)
    return [curve for curve in found if curve.setting.learning_rate == rates[curve.setting.data]]


def rate_table(found: list[Curve]) -> str:
    """What has been trained at each rate, on clean data at the smallest budget."""
    groups: dict[tuple[str, str, float], list[Curve]] = {}
    for curve in found:
        if curve.setting.condition == "clean" and budget(curve) == SMALLEST:
            groups.setdefault((curve.setting.data, label(curve), curve.setting.learning_rate), []).append(curve)
    tried = Counter(key[:2] for key in groups)
    rows = [
        [data, name, f"{rate:g}", len(group), mean_of(group, "nll", 3, STEPS), mean_of(group, "accuracy", 2, STEPS)]
        for (data, name, rate), group in sorted(groups.items())
        if tried[data, name] > 1
    ]
    return markdown(["data", "policy", "learning rate", "seeds", "nll", "exact match"], rows)


def answer_table(groups: Groups) -> str:
    """The questions of the page, condition by condition."""
    rows = []
    for number, first, second in QUESTIONS:
        for (data, ratio, condition), policies in groups.items():
            if first in policies and second in policies:
                pair = policies[first], policies[second]
                differences = at_equal_steps(*pair), at_equal_time(*pair), at_equal_steps(*pair, "correct")
                if differences[0]:
                    row = [number, f"{first} − {second}", data, f"{ratio:.1%}", condition, len(differences[0].by_seed)]
                    rows.append([*row, *map(shown, differences[:2]), shown(differences[2], 2)])
    head = ["question", "difference", "data", "samples", "condition", "seeds", "nll, equal steps", "nll, equal time"]
    return markdown([*head, "exact match"], rows)


def measure_table(groups: Groups) -> str:
    """What each policy came to after `STEPS` steps, the mean over its seeds."""
    columns = {"nll": 3, "nll_result": 3, "accuracy": 2, "nll_other": 3, "tokens_kept": 0, "peak_mib": 0}
    rows = []
    for (data, ratio, condition), policies in groups.items():
        timed = on_one_machine(policies)
        for name, group in policies.items():
            step = min(STEPS, *(curve.steps[-1] for curve in group))
            numbers = [mean_of(group, column, digits, step) for column, digits in columns.items()]
            seconds = [curve.cpu_seconds[curve.place(step)] for curve in timed.get(name, [])]
            numbers.insert(4, f"{np.mean(seconds):.0f}" if seconds else "")
            rows.append([data, f"{ratio:.1%}", condition, name, len(group), int(step), *numbers])
    head = ["data", "samples", "condition", "policy", "seeds", "steps", "nll", "nll of the result", "exact match"]
    return markdown([*head, "nll of other text", "seconds", "tokens trained", "peak MiB"], rows)


def planted_table(groups: Groups) -> str:
    rows = []
    for (data, ratio, condition), policies in groups.items():
        for kind in KINDS[1:]:
            for name, group in policies.items():
                kept, base = share_kept([curve.rows[-1] for curve in group], kind)
                if base and selects(group):
                    rows.append([data, f"{ratio:.1%}", condition, kind, name, f"{kept:.1%}", f"{base:.1%}"])
    head = ["data", "samples", "condition", "flaw", "policy", "share of the kept", "share of all"]
    return markdown(head, rows)


def harness_table(groups: Groups, untrained: list[dict[str, str]], tasks: list[dict[str, str]]) -> str:
    """Accuracies of lm-evaluation-harness: the mean over seeds, the mean of their standard errors over questions, and
    the paired difference from chance. `untrained` are the rows of runs of no step, `tasks` those of the harness."""
    stored = {(row["run"], row["task"]): row for row in tasks}

    def measured(group: list[Curve], task: str) -> dict[int, dict[str, str]]:
        runs = {curve.setting.seed: (curve.setting.run, task) for curve in group}
        return {seed: stored[run] for seed, run in runs.items() if run in stored}

    lines = []
    for task in dict.fromkeys(row["task"] for row in tasks):
        found = [((row["data"], "", "before training"), [stored.get((row["run"], task))], "") for row in untrained]
        for (data, _, condition), policies in groups.items():
            chance = measured(policies.get(BASELINE, []), task)
            for name, group in policies.items():
                own = measured(group, task)
                pairs = [(own[seed]["correct"], chance[seed]["correct"]) for seed in own if seed in chance]
                difference = ""
                if pairs and name != BASELINE:
                    first, second = (np.array([list(map(float, pair[side])) for pair in pairs]) for side in (0, 1))
                    difference = shown(paired_difference(first, second, np.ones(first.shape[1])), 2)
                found.append(((data, condition, name), list(own.values()), difference))
        for of, rows, difference in found:
            rows = [row for row in rows if row]
            if rows:
                accuracy, error = (np.mean([float(row[name]) for row in rows]) for name in ("accuracy", "stderr"))
                size = len(rows[0]["correct"])
                lines.append([task, size, *of, len(rows), rows[0]["step"], f"{accuracy:.3f} ± {error:.3f}", difference])
    head = ["task", "questions", "data", "condition", "policy", "seeds", "steps", "accuracy ± standard error"]
    return markdown([*head, f"difference from {BASELINE}"], lines)


def plot_over_seconds(groups: Groups, path: Path) -> bool:
    """Held-out nll, and exact matches where there are any, over seconds of training: a panel per condition."""
    plt = _pyplot()
    measures: list[tuple[str, Callable[[Curve], np.ndarray]]] = [("held-out nll, nats per token", Curve.mean_nll)]
    if any(c.correct.any() for policies in groups.values() for own in policies.values() for c in own):
        measures.append(("exact match", lambda curve: curve.correct.mean(1)))
    shape = {"nrows": len(groups), "ncols": len(measures), "figsize": (4.6 * len(measures), 2.5 * len(groups) + 0.7)}
    figure, axes = plt.subplots(**shape, squeeze=False, sharey="col", layout="constrained")
    for (key, policies), panels in zip(groups.items(), axes, strict=True):
        for axis, (title, measure) in zip(panels, measures, strict=True):
            for name, group in on_one_machine(policies).items():
                least = min(len(curve.steps) for curve in group)
                seconds = np.mean([curve.cpu_seconds[:least] for curve in group], 0)
                values = np.stack([measure(curve)[:least] for curve in group])
                color = COLORS.get(name)
                (line,) = axis.plot(seconds, values.mean(0), marker=".", color=color, label=name, linewidth=1.2)
                axis.fill_between(
                    seconds, values.min(0), values.max(0), color=line.get_color(), alpha=0.15, linewidth=0
                )
            axis.spines[["top", "right"]].set_visible(False)
            axis.set_title(f"{key[0]}, {key[1]:.1%} of the samples, {key[2]}", fontsize=9)
            axis.set_ylabel(title)
    for axis in axes[-1]:
        axis.set_xlabel("seconds of training, one thread")
    lines = {line.get_label(): line for axis in axes[:, 0] for line in axis.get_lines()}
    figure.legend(
        lines.values(), lines.keys(), loc="outside lower center", ncols=2 * len(measures), frameon=False, fontsize=8
    )
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return True


def plot_planted(groups: Groups, path: Path) -> bool:
    """The share of planted flaws among the kept samples, over that among all; 1 is what chance keeps."""
    panels = [(key, kind) for key in groups for kind in KINDS[1:] if CONDITIONS[key[2]].get(kind)]
    names = list(dict.fromkeys(name for key, _ in panels for name, group in groups[key].items() if selects(group)))
    if not names:
        return False
    plt = _pyplot()
    columns = min(3, len(panels))
    lines = -(-len(panels) // columns)
    size = (2.6 * columns + 1.8, (0.25 * len(names) + 0.9) * lines)
    figure, axes = plt.subplots(lines, columns, figsize=size, squeeze=False, sharey=True, layout="constrained")
    for axis in axes.flat[len(panels) :]:
        axis.set_axis_off()
    for axis, (key, kind) in zip(axes.flat, panels, strict=False):
        for place, name in enumerate(names):
            shares = [share_kept([curve.rows[-1]], kind) for curve in groups[key].get(name, [])]
            ratios = [kept / base for kept, base in shares if base]
            if ratios:
                axis.barh(place, np.mean(ratios), color=COLORS.get(name, "#BBBBBB"))
                axis.plot(ratios, [place] * len(ratios), "k.", markersize=4)
        axis.set_yticks(range(len(names)), names)
        axis.axvline(1, color="black", linewidth=0.8)
        axis.set_title(f"{key[2]}: {kind}", fontsize=9)
        axis.spines[["top", "right"]].set_visible(False)
    figure.supxlabel("share of the kept samples over share of all; dots are seeds", fontsize=9)
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return True


def _pyplot():
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    return plt


def draw(path: Path) -> None:
    """Pictures beside the CSV, for each data set and budget; the text into docs/quality.md, if the CSV is its own, else
    to the screen."""
    samples = beside(path, "samples")
    if not path.exists() or not samples.exists():
        raise SystemExit(f"{path} or {samples.name} is not there: no run has finished")
    rows = read_rows(path)
    found = curves(rows, read_rows(samples))
    groups = grouped(at_chosen_rate(found))
    pictures = []
    for data, ratio in dict.fromkeys(key[:2] for key in groups):
        own = {key: policies for key, policies in groups.items() if key[:2] == (data, ratio)}
        for what, plot in {"seconds": plot_over_seconds, "planted": plot_planted}.items():
            name = re.sub(r"\W+", "_", data)
            picture = path.with_name(f"{path.stem}_{name}_{1000 * ratio:.0f}_{what}.png")
            if plot(own, picture):
                pictures.append(picture)
    print("drawn", *pictures)
    parts = {
        "Learning rates": rate_table(found),
        "Answers": answer_table(groups),
        "Quality over time, planted flaws kept": "\n\n".join(
            f"![{picture.stem}](../benchmarks/results/{picture.name})" for picture in pictures
        ),
        "Measures": measure_table(groups),
        "Tasks of lm-evaluation-harness": harness_table(
            groups, [row for row in rows if row["steps"] == "0"], stored_rows(beside(path, "harness"))
        ),
        "Planted flaws": planted_table(groups),
    }
    filled = {title: part for title, part in parts.items() if part.count("\n") > 1 or part.startswith("!")}
    seeds = max((len(group) for policies in groups.values() for group in policies.values()), default=0)
    state = (
        f"{len(found)} runs have been made, of at most {seeds} seed{'s'[: seeds != 1]} each; `--plan` prints "
        "those that are missing. A question with fewer than three seeds is open, whatever its interval.\n\n"
    )
    text = state + "\n\n".join(f"## {title}\n\n{part}" for title, part in filled.items())
    if path == RESULTS / "quality.csv":
        fill(PAGE, {"results": text})
    else:
        print(text)
