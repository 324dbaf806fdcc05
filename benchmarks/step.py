"""Whole optimiser steps, side by side: the analogue of the paper's table 6 on one machine.

    python -m benchmarks.step --data gsm8k.jsonl --prompt-field question --completion-field answer

Every variant takes the same pools of samples in the same process, in turn (A B C A B C …), on one model and
one AdamW: only the step differs. A child process runs each combination of precision and allocator, another
each measurement of peak memory. Rows go to benchmarks/results/step.csv, the plot is drawn from them alone
(``--plot``).

Variants of a group:
    full data        transformers.Trainer.training_step on the whole padded pool
    full data, TRL   the same with trl.SFTTrainer
    eager Q-Tuning   Q-Tuning as one writes it first: full logits, log_softmax, a Python loop over samples
    ours 1×1         this package's step with both ratios 1: micro-batches without pruning
    ours             this package's step at the ratios, as it comes: library and scoring precision measured at start
    ours over TRL    the mixin over trl.SFTTrainer, as it comes
    ours, default|onednn, model|bfloat16   the same with each choice forced

Everything but the forced variants multiplies float32 matrices with the library that "ours" chose.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

from benchmarks.common import RESULTS, ROOT, environment, fill, markdown, peak, read_rows, write_rows

TUNED = "glibc.malloc.hugetlb=1:glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=17179869184"
RANDOM = ("1.7B", "tiny")  # of step_variants.py, which imports much
# options that a child process is given as they are
OF_A_CHILD = ("model", "random", "device", "data", "prompt_field", "completion_field", "pool", "sample_ratio",
              "token_ratio", "repeats")  # fmt: skip
GROUPS = ("float32", "autocast", "lora")
PHASES = ("score", "select", "compact", "train", "optimizer")
VARIANTS = ("full data", "full data, TRL", "eager Q-Tuning", "ours 1×1", "ours", "ours over TRL",
            "ours, default, model",
            "ours, default, bfloat16", "ours, onednn, model", "ours, onednn, bfloat16")  # fmt: skip


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="model folder (default: the embedded one, qtuning fetch)")
    parser.add_argument("--random", choices=RANDOM, help="random weights in this size, in the place of the model's")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--profile", type=Path, metavar="FILE", help='only a trace of one step of "ours", .json.gz')
    parser.add_argument("--data", help="data file (default: the embedded word problems)")
    parser.add_argument("--prompt-field", default="question")
    parser.add_argument("--completion-field", default="answer")
    parser.add_argument("--groups", nargs="+", choices=GROUPS, default=list(GROUPS))
    parser.add_argument("--allocators", nargs="+", choices=("default", "tuned"), default=["default", "tuned"])
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS), help="only these")
    parser.add_argument("--pool", type=int, default=16)
    parser.add_argument("--sample-ratio", type=float, default=0.125)
    parser.add_argument("--token-ratio", type=float, default=0.5)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--sweep", action="store_true", help="ours, scored in bfloat16, and full data, over budgets")
    parser.add_argument("--memory", action="store_true", help="peak memory instead of time")
    parser.add_argument("--plot", action="store_true", help="only draw the plot from the CSV")
    parser.add_argument("--output", type=Path, default=RESULTS / "step.csv")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    return parser.parse_args()


def child(options: argparse.Namespace) -> None:
    """Measures one group in this process and prints a JSON line per step."""
    import torch

    from benchmarks.step_variants import Bench

    bench = Bench(options, options.groups[0])
    if options.child == "memory":
        step = bench.variant(options.variants[0])
        step(1)  # the optimiser's state and a copy of the weights are there before and after
        print(json.dumps({"variant": options.variants[0], "peak_mib": peak(lambda: step(0))[0]}))
        return
    if options.child == "profile":
        step = bench.variant("ours")
        step(0)
        with torch.profiler.profile() as profile:  # of whatever is there: the host, and the device where there is one
            step(1)
        profile.export_chrome_trace(str(options.profile))
        print(profile.key_averages().table(sort_by=f"self_{options.device}_time_total", row_limit=15))
        return
    if options.child == "sweep":
        budgets = [(r, t) for r in (0.125, 0.25, 0.5) for t in (0.5, 0.7, 1.0)]
        steps = {name: bench.variant(name) for name in options.variants if name == "full data"}  # much memory
        steps |= {f"ours {r:.1%} × {t:.0%}": bench.ours(r, t, "bfloat16") for r, t in budgets}
    else:
        steps = {}
        for name in options.variants:
            try:
                steps[name] = bench.variant(name)
            except ImportError as error:  # a peer that could not be installed
                print(f"{name}: left out ({error})", file=sys.stderr)
    for index in range(-1, options.repeats):  # the first round warms up
        for name, step in steps.items():
            seconds = step(index % (options.repeats + 1))
            if index >= 0:
                print(json.dumps({"variant": name, "seconds": seconds}), flush=True)


def run_child(options: argparse.Namespace, kind: str, group: str, allocator: str, variants: list[str]) -> list[dict]:
    environ = {name: value for name, value in os.environ.items() if name != "GLIBC_TUNABLES"}
    if allocator == "tuned":
        environ["GLIBC_TUNABLES"] = TUNED
    command = [sys.executable, "-m", "benchmarks.step", "--child", kind, "--groups", group, "--variants", *variants]
    for name in OF_A_CHILD:
        if (value := getattr(options, name)) is not None:
            command += [f"--{name.replace('_', '-')}", str(value)]
    lines = []
    with subprocess.Popen(command, cwd=ROOT, env=environ, stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            if line.startswith("{"):
                lines.append(json.loads(line))
                print(line, end="", file=sys.stderr)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {process.returncode}")
    return lines


def summarise(lines: list[dict]) -> list[dict]:
    """Medians and quartiles per variant, and its speed-up over full data, step by step."""
    steps: dict[str, list[dict]] = {}
    for line in lines:
        steps.setdefault(line["variant"], []).append(line["seconds"])
    totals = {name: [sum(s.values()) for s in own] for name, own in steps.items()}
    rows = []
    for name, seconds in totals.items():
        low, median, high = quartiles(seconds)
        row = {"variant": name, "repeats": len(seconds), "median_s": median, "q1_s": low, "q3_s": high}
        row |= {f"{p}_s": statistics.median(s.get(p, 0.0) for s in steps[name]) for p in PHASES}
        for baseline in ("full data", "full data, TRL", "eager Q-Tuning", "ours 1×1"):
            if baseline in totals:  # of the same pool, so that what slows both cancels
                ratios = [b / own for b, own in zip(totals[baseline], seconds, strict=True)]
                low, median, high = quartiles(ratios)
                label = baseline.replace(",", "").replace(" ", "_").replace("×", "x")
                row |= {f"vs_{label}": median, f"vs_{label}_q1": low, f"vs_{label}_q3": high}
        rows.append({k: f"{v:.4g}" if isinstance(v, float) else v for k, v in row.items()})
    return rows


def quartiles(values: list[float]) -> list[float]:
    return statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3


def gpu_name(device: str) -> str:
    import torch

    return torch.cuda.get_device_name() if device == "cuda" else ""


def append(path: Path, rows: list[dict]) -> None:
    write_rows(path, [*(read_rows(path) if path.exists() else []), *rows])


def plot(path: Path) -> None:
    """Seconds per step by phase, one panel per group, from the CSV's latest default-allocator rows."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    latest = {}
    for row in read_rows(path):
        if row["kind"] == "time" and row["allocator"] == "default":
            latest[row["group"], row["variant"]] = row
    groups = [g for g in GROUPS if any(group == g for group, _ in latest)]
    figure, axes = plt.subplots(1, len(groups), figsize=(4.6 * len(groups), 3.4), squeeze=False, sharey=True)
    colors = ("#0072B2", "#CC79A7", "#F0E442", "#E69F00", "#999999")
    for axis, group in zip(axes[0], groups, strict=True):
        names = [v for v in VARIANTS if (group, v) in latest][::-1]
        left = [0.0] * len(names)
        for phase, color in zip(PHASES, colors, strict=True):
            widths = [float(latest[group, name][f"{phase}_s"]) for name in names]
            axis.barh(names, widths, left=left, color=color, label=phase)
            left = [a + b for a, b in zip(left, widths, strict=True)]
        for name, end in zip(names, left, strict=True):  # panels share the axis of names, and may lack some
            axis.text(end, name, f" {float(latest[group, name]['vs_full_data']):.1f}×", va="center", fontsize=8)
        axis.set(title=group, xlabel="seconds per optimiser step", xlim=(0, max(left) * 1.15))
        axis.spines[["top", "right"]].set_visible(False)
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(PHASES), frameon=False, fontsize=8)
    figure.tight_layout(rect=(0, 0.08, 1, 1))
    figure.savefig(path.with_suffix(".png"), dpi=150)


def versus(row: dict, baseline: str) -> str:
    """Median and quartiles of the speed-up over a baseline, if it was measured."""
    value, low, high = (row.get(f"vs_{baseline}{edge}") for edge in ("", "_q1", "_q3"))
    return f"{float(value):.2f}× ({float(low):.2f}–{float(high):.2f})" if value else ""


def tables(path: Path) -> dict[str, str]:
    """The tables of docs/benchmarks.md: the latest row of each group, allocator and variant."""
    stored = read_rows(path)
    latest = {(r["kind"], r["group"], r["allocator"], r["variant"]): r for r in stored}
    parts = {"sweep": sweep_table([r for r in stored if r["kind"] == "sweep"])}
    choice = {r["variant"]: r for r in stored if r["kind"] == "choice"}
    fastest = min((float(row["median_s"]) for row in choice.values()), default=0.0)
    lines = [
        [name, *(row[field] for field in ("median_s", "q1_s", "q3_s")), f"{float(row['median_s']) / fastest:.2f}"]
        for name, row in choice.items()
    ]
    parts["choice"] = markdown(["step", "median s", "lower quartile", "upper quartile", "over the fastest"], lines)
    for group in GROUPS:
        rows = []
        for (kind, of, allocator, variant), row in latest.items():
            if kind != "time" or of != group:
                continue
            resident = latest.get(("memory", of, allocator, variant), {}).get("peak_mib", "")
            ratios = [versus(row, b) for b in ("full_data", "eager_Q-Tuning", "ours_1x1")]
            seconds = [f"{float(row[f'{phase}_s']):.2f}" for phase in ("score", "select", "train", "optimizer")]
            resident = f"{float(resident):.0f}" if resident else ""
            rows.append([variant, allocator, f"{float(row['median_s']):.2f}", *ratios, *seconds, resident])
        head = ["step", "allocator", "median s", "vs full data", "vs eager Q-Tuning", "vs ours 1×1"]
        parts[group] = markdown([*head, "score s", "select s", "train s", "optimizer s", "peak MiB"], rows)
    return parts


def sweep_table(rows: list[dict]) -> str:
    """The latest row of each group, pool size and budget."""
    latest = {(r["group"], int(r["pool"]), r["variant"]): r for r in rows}
    lines = [
        [group, pool, variant, f"{float(row['median_s']):.2f}", versus(row, "full_data")]
        + [f"{float(row[f'{phase}_s']):.4f}" if phase == "select" else f"{float(row[f'{phase}_s']):.2f}"
           for phase in PHASES if phase != "compact"]
        for (group, pool, variant), row in sorted(latest.items())
    ]  # fmt: skip
    head = ["", "pool", "step", "median s", "vs full data", "score s", "select s", "train s", "optimizer s"]
    return markdown(head, lines)


def main() -> None:
    options = parse()
    if options.profile and not options.child:
        options.child, options.repeats = "profile", 1
    if options.child:
        child(options)
        return
    timed = "time" if "full data" in options.variants else "choice"  # of library and precision, with no baseline
    kind = "memory" if options.memory else "sweep" if options.sweep else timed
    for group in () if options.plot else options.groups:
        for allocator in options.allocators:
            common = environment() | {"kind": kind, "group": group, "allocator": allocator}
            common |= {"model": options.random or options.model or "135M", "gpu": gpu_name(options.device)}
            common |= {"data": Path(options.data).name if options.data else "word-problems", "pool": options.pool}
            common |= {"sample_ratio": options.sample_ratio, "token_ratio": options.token_ratio}
            common["glibc_tunables"] = TUNED if allocator == "tuned" else ""
            if kind == "memory":
                rows = [run_child(options, kind, group, allocator, [name])[0] for name in options.variants]
            else:
                rows = summarise(run_child(options, kind, group, allocator, options.variants))
            append(options.output, [common | row for row in rows])
            for row in rows:
                print(group, allocator, row)
    if options.device == "cpu":
        plot(options.output)
    if options.output == RESULTS / "step.csv":
        fill(ROOT / "docs" / "benchmarks.md", tables(options.output))


if __name__ == "__main__":
    main()
