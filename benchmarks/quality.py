"""What pruning does to the model: policy × budget × seed × condition of the data, trained through the package.

    python -m benchmarks.quality --quick                                 three policies, two seeds, a picture
    python -m benchmarks.quality --jobs 2 --budget-minutes 120           generated tasks, flaws planted
    python -m benchmarks.quality --data gsm8k.jsonl --result-mark '####' the same on a file of prompts and completions
    python -m benchmarks.quality --plan                                  what is missing
    python -m benchmarks.quality --figures                               tables and pictures of docs/quality.md

docs/quality.md has the protocol. A finished run appends a row per point of evaluation to benchmarks/results/quality.csv
and what it measured of each held-out record to quality_samples.csv, accuracies of `--tasks` to quality_harness.csv;
what is there is not run again. Each run is a process with one thread.
"""

import argparse
import csv
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from math import inf, isinf
from pathlib import Path

from benchmarks import quality_grid as grids
from benchmarks.common import RESULTS, ROOT, beside, machine_name, stored_rows
from benchmarks.quality_grid import Inputs, Setting

SAMPLE_COLUMNS = ("sample_nll", "sample_tokens", "sample_correct")  # lists: a file of their own
QUICK_OUTPUT = ROOT / "runs" / "quality_quick.csv"


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plan", action="store_true", help="only print the missing runs, worst value for time last")
    parser.add_argument("--figures", action="store_true", help="only draw pictures and tables from the CSV")
    parser.add_argument("--quick", action="store_true", help="a small grid on small data, into runs/")
    parser.add_argument("--jobs", type=int, default=2, help="runs side by side, a thread each (default: 2)")
    parser.add_argument("--budget-minutes", type=float, help="begin no run that would not end by then")
    parser.add_argument("--model", help="model folder (default: the embedded one, qtuning fetch)")
    parser.add_argument("--data", help="a file (default: generated tasks)")
    parser.add_argument("--prompt-field", default="question")
    parser.add_argument("--completion-field", default="answer")
    parser.add_argument("--result-mark", default="", help="what stands before the final result of an answer")
    parser.add_argument("--other", help="text file of another domain, for what is forgotten (default: a story)")
    parser.add_argument(
        "--tasks",
        nargs="+",
        default=[],
        metavar="FILE",
        help="YAML files of lm-evaluation-harness, measured once in each run that is made",
    )
    parser.add_argument("--output", type=Path, help="default: benchmarks/results/quality.csv")
    options = parser.parse_args(arguments)
    if options.jobs < 1:
        parser.error(f"argument --jobs: is {options.jobs}; accepted: 1 or more")
    options.output = options.output or (QUICK_OUTPUT if options.quick else RESULTS / "quality.csv")
    return options


def inputs_of(options: argparse.Namespace) -> Inputs:
    from qtuning_kernels.demo.assets import MODEL, asset_folder, fetch, is_fetched
    from qtuning_kernels.files import require

    if options.model is None and not options.plan and not is_fetched(MODEL):
        fetch(MODEL)
    if options.tasks:
        require("--tasks", "eval", "lm_eval")
        if missing := [file for file in options.tasks if not Path(file).is_file()]:
            raise SystemExit(f"--tasks {missing[0]}: no such file")
    model = options.model or str(asset_folder(MODEL))
    fields = ("data", "prompt_field", "completion_field", "result_mark", "other")
    inputs = {name: getattr(options, name) for name in fields}
    for name in ("data", "other"):
        if inputs[name] is not None:
            inputs[name] = str(Path(inputs[name]).resolve())
    return Inputs(model, **inputs, tasks=tuple(str(Path(file).resolve()) for file in options.tasks))


def base_setting(options: argparse.Namespace, inputs: Inputs) -> Setting:
    data = grids.GENERATED if inputs.data is None else Path(inputs.data).parent.name + "/" + Path(inputs.data).stem
    steps = grids.FULL.steps if inputs.data is None else grids.FULL_OF_FILE.steps
    sizes = {"records": 512, "held_out": 64} if options.quick else {}
    return Setting(data, "clean", "full", 1.0, 1.0, 0, 0.0, steps, **sizes)


def append(path: Path, setting: Setting, points: list[dict]) -> None:
    """A row per point in the CSV, one in that of the samples beside it, and one per task in that of the harness; whole,
    or not at all."""
    append_tasks(path, setting, points)
    rows = [{"run": setting.run, **asdict(setting), **point} for point in points]
    lists = [
        {"run": setting.run, "step": row["step"], **{name: packed(row.pop(name)) for name in SAMPLE_COLUMNS}}
        for row in rows
    ]
    rows = [{name: f"{x:.6g}" if isinstance(x, float) else x for name, x in row.items()} for row in rows]
    append_rows(beside(path, "samples"), lists)
    append_rows(path, rows)  # a run counts as finished by these


def append_tasks(path: Path, setting: Setting, points: list[dict]) -> None:
    """Takes what the harness measured out of the points, into the CSV of its own."""
    rows = [
        {"run": setting.run, "step": point["step"], **task, "correct": packed(task["correct"])}
        for point in points
        for task in point.pop("harness", [])
    ]
    append_rows(beside(path, "harness"), rows)


def append_rows(file: Path, rows: list[dict]) -> None:
    """Under the columns of those before them."""
    if not rows:
        return
    file.parent.mkdir(parents=True, exist_ok=True)
    stored = stored_rows(file)
    with file.open("a", newline="") as stream:
        writer = csv.DictWriter(stream, list(stored[0] if stored else rows[0]), lineterminator="\n")
        if not stored:
            writer.writeheader()
        writer.writerows(rows)


def packed(values: list) -> str:
    """Numbers with four digits between spaces; truths as one digit each."""
    if values and isinstance(values[0], bool):
        return "".join("01"[value] for value in values)
    return " ".join(f"{value:.4g}" for value in values)


def start(setting: Setting, inputs: Inputs, timeout: float | None) -> list[dict]:
    """Runs one in a process of its own; its points. Raises RuntimeError, or TimeoutExpired after `timeout` seconds."""
    arguments = json.dumps({"setting": asdict(setting), "inputs": asdict(inputs)})
    environ = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "benchmarks.quality_run", arguments]
    done = subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True, timeout=timeout)
    if done.returncode:
        raise RuntimeError(f"{setting}:\n{done.stderr[-2000:]}")
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


class Runner:
    """Makes the missing ones of a list of runs, some side by side.

    Args:
        output: the CSV.
        jobs: how many side by side.
        deadline: of `clock`, seconds; a run that would end later by the time of its like is not begun. One of which
            nothing is known is begun, and stopped at the deadline.
        make: makes a run in so many seconds, or raises TimeoutExpired.
    """

    def __init__(
        self,
        output: Path,
        jobs: int,
        deadline: float,
        make: Callable[[Setting, float | None], list[dict]],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.output, self.jobs, self.deadline, self.make, self.clock = output, jobs, deadline, make, clock
        self.left_out: list[Setting] = []
        self.failed: list[Setting] = []
        self._lock = threading.Lock()

    def __call__(self, settings: list[Setting]) -> None:
        queue = grids.missing(settings, stored_rows(self.output))
        threads = [threading.Thread(target=self._work, args=(queue,)) for _ in range(self.jobs)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def _work(self, queue: list[Setting]) -> None:
        while (setting := self._next(queue)) is not None:
            print(f"begin  {setting}", flush=True)
            try:
                points = self.make(setting, None if isinf(self.deadline) else self.deadline - self.clock())
            except subprocess.TimeoutExpired:
                print(f"stopped at the end of the budget: {setting}", flush=True)
                self.left_out.append(setting)
                continue
            except RuntimeError as error:
                print(f"failed {error}", file=sys.stderr, flush=True)
                self.failed.append(setting)
                continue
            with self._lock:
                append(self.output, setting, points)
            last = points[-1]
            print(f"end    {setting}: nll {last['nll']:.4f}, {last['run_minutes']:.1f} minutes of work", flush=True)

    def _next(self, queue: list[Setting]) -> Setting | None:
        """The next run that ends in time; those before it that do not are left out."""
        with self._lock:
            while queue:
                setting = queue.pop(0)
                known = grids.minutes(setting, stored_rows(self.output), machine_name())
                if self.clock() + 60 * (known or 0.0) <= self.deadline:
                    return setting
                self.left_out.append(setting)
        return None


def phases(options: argparse.Namespace, base: Setting) -> tuple[list[Setting], Callable[[float], list[Setting]]]:
    """The runs that choose the learning rate, and those at the rate that was chosen."""
    if options.quick:
        full = grids.grid(replace(base, learning_rate=1e-4), grids.QUICK_STAGES)
        return [grids.rate_runs(base)[0]], lambda rate: full
    stages = grids.GENERATED_STAGES if options.data is None else grids.FILE_STAGES
    return grids.rate_runs(base), lambda rate: grids.grid(replace(base, learning_rate=rate), stages)


def main() -> None:
    options = parse()
    if options.figures:
        from benchmarks.quality_pages import draw

        draw(options.output)
        return
    inputs = inputs_of(options)
    base = base_setting(options, inputs)
    first, second = phases(options, base)

    def rate() -> float | None:
        return 1e-4 if options.quick else grids.chosen_rate(base, stored_rows(options.output))

    if options.plan:
        rows = stored_rows(options.output)
        settings = grids.missing(first + (second(rate() or grids.RATES[0])), rows)
        for line in grids.plan_lines(settings, rows, machine_name(), options.jobs):
            print(line)
        if rate() is None:
            print(f"all but those on full data will be at one of the rates {grids.RATES}, whichever these choose")
        return
    measured = {row["run"] for row in stored_rows(beside(options.output, "harness"))}
    if inputs.tasks and first[0].run not in measured and not grids.missing(first[:1], stored_rows(options.output)):
        append_tasks(options.output, first[0], start(first[0], inputs, None))  # the model as it is, run without tasks
    deadline = time.monotonic() + 60 * options.budget_minutes if options.budget_minutes else inf
    runner = Runner(options.output, options.jobs, deadline, lambda setting, timeout: start(setting, inputs, timeout))
    runner(first)
    if (chosen := rate()) is not None:
        runner(second(chosen))
    if runner.left_out:
        print(f"{len(runner.left_out)} runs left out: they do not end within {options.budget_minutes:g} minutes")
    if options.quick:
        from benchmarks.quality_pages import draw

        draw(options.output)
    if runner.failed:
        raise SystemExit(f"{len(runner.failed)} runs failed")


if __name__ == "__main__":
    main()
