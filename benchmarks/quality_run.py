"""One run of the quality benchmark: a model trained through the package, measured on the way.

``python -m benchmarks.quality_run JSON`` prints one JSON line per point of evaluation: `benchmarks.quality` starts it.
"""

import json
import sys
import tempfile
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.common import environment, peak_mib, reset_peak
from benchmarks.quality_data import CHAT_TEMPLATE, KINDS, file_split, generated_split, other_text, plant, tokenized
from benchmarks.quality_grid import Inputs, Setting

POINTS = (15, 30, 60, 120, 240)  # steps after which a run is measured; and after its last
HARNESS_STEP = 60  # after which tasks of lm-evaluation-harness are run; or after the last
WARM_UP_STEPS = 6


def qtuning_config(setting: Setting) -> Any:
    from qtuning_kernels import QTuningConfig

    options = json.loads(setting.options)
    fields = {name: options.pop(name) for name in list(options) if name in QTuningConfig.__dataclass_fields__}
    return QTuningConfig(
        policy=setting.policy,
        policy_options=options,
        sample_ratio=setting.sample_ratio,
        token_ratio=setting.token_ratio,
        record_tokens=0,
        **fields,
    )


def training_arguments(setting: Setting, folder: str) -> Any:
    """A constant rate: a run that is stopped at a point of evaluation is the run of as many steps."""
    from transformers import TrainingArguments

    return TrainingArguments(
        folder,
        per_device_train_batch_size=setting.pool,
        max_steps=setting.steps,
        learning_rate=setting.learning_rate,
        lr_scheduler_type="constant_with_warmup",
        warmup_steps=WARM_UP_STEPS,
        seed=setting.seed,  # of the order of the pools, too
        save_strategy="no",
        logging_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        dataloader_pin_memory=False,
        remove_unused_columns=False,
    )


def counts_until(rows: list[dict], planted: list[str], step: int) -> dict[str, int]:
    """What was seen and kept in the first `step` steps, from the rows of the run's record, by the mark of the plant."""
    counts = {f"{what}_{kind}": 0 for what in ("seen", "kept") for kind in KINDS}
    counts |= {"tokens_seen": 0, "tokens_kept": 0}
    for row in rows:
        if row["step"] <= step:
            kind = planted[row["id"]]
            counts[f"seen_{kind}"] += 1
            counts[f"kept_{kind}"] += row["keep"]
            counts["tokens_seen"] += row["num_tokens"]
            counts["tokens_kept"] += row["kept_tokens"]
    return counts


def harness(model: Any, tokenizer: Any, tasks: Sequence[str]) -> list[dict[str, Any]]:
    """Accuracies of the tasks with their standard errors over questions, and which answers were right, a row each.

    Raises:
        ValueError: a task has no measure ``acc``.
    """
    from qtuning_kernels.commands.evaluate import harness_results

    training = model.training
    found = harness_results(model, tokenizer, tasks, apply_chat_template=True, log_samples=True)
    model.train(training)
    rows = []
    for name, row in found["results"].items():
        if "acc,none" not in row:
            raise ValueError(f"task {name} has no measure acc; accepted: tasks with one")
        right = [bool(sample["acc"]) for sample in sorted(found["samples"][name], key=lambda each: each["doc_id"])]
        rows.append({"task": name, "accuracy": row["acc,none"], "stderr": row["acc_stderr,none"], "correct": right})
    return rows


class Stopwatch:
    """Seconds of training, by the clock and of this process's own work, while it is not paused."""

    def __init__(self) -> None:
        self.seconds = self.cpu_seconds = self.peak = 0.0
        self.resume()

    def resume(self) -> None:
        reset_peak()
        self._start = time.perf_counter(), time.process_time()

    def pause(self) -> dict[str, float]:
        self.seconds += time.perf_counter() - self._start[0]
        self.cpu_seconds += time.process_time() - self._start[1]
        self.peak = max(self.peak, peak_mib())
        return {"seconds": self.seconds, "cpu_seconds": self.cpu_seconds, "peak_mib": self.peak}


def run(setting: Setting, inputs: Inputs) -> list[dict[str, Any]]:
    """Trains as `setting` says and returns a row per point of evaluation; of 0 steps, of the model as it is.

    ``run_minutes`` are those of this process's own work: what else the machine does makes no run look long.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback, TrainerCallback, set_seed

    from benchmarks.quality_measures import Evaluation
    from qtuning_kernels import QTuningTrainer
    from qtuning_kernels.run_record.reader import read_lines

    tokenizer = AutoTokenizer.from_pretrained(inputs.model)
    tokenizer.chat_template = CHAT_TEMPLATE
    sizes = setting.records, setting.held_out, setting.seed
    if inputs.data is None:
        train, held_out = generated_split(*sizes)
    else:
        train, held_out = file_split(inputs.data, inputs.prompt_field, inputs.completion_field, *sizes)
    train = plant(train, setting.condition, setting.seed, inputs.result_mark)
    evaluation = Evaluation(
        tokenizer,
        tokenized(held_out, tokenizer, inputs.cutoff),
        other_text(inputs.other),
        inputs.result_mark,
    )
    model = AutoModelForCausalLM.from_pretrained(inputs.model, dtype="float32")
    points: list[dict[str, Any]] = []
    rows: list[dict] = []
    precision = ""

    class Points(TrainerCallback):
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            self.watch = Stopwatch()

        def on_step_end(self, _args: Any, state: Any, *_: Any, **__: Any) -> None:
            if state.global_step in POINTS or state.global_step == setting.steps:
                spent = self.watch.pause()
                points.append({"step": state.global_step} | spent | evaluation(model))
                if inputs.tasks and state.global_step == min(HARNESS_STEP, setting.steps):
                    points[-1]["harness"] = harness(model, tokenizer, inputs.tasks)
                self.watch.resume()

    if setting.steps:
        set_seed(setting.seed)
        with tempfile.TemporaryDirectory() as folder:
            trainer = QTuningTrainer(
                model,
                training_arguments(setting, folder),
                train_dataset=tokenized(train, tokenizer, inputs.cutoff),
                processing_class=tokenizer,
                qtuning=qtuning_config(setting),
            )
            trainer.add_callback(Points())  # after the trainer's own: the step's record is written by then
            trainer.remove_callback(PrinterCallback)
            trainer.train()
            rows = list(read_lines(Path(folder) / "record" / "samples.jsonl"))
            precision = trainer.qtuning_summary()["precision"]
    else:
        points.append({"step": 0, "seconds": 0.0, "cpu_seconds": 0.0, "peak_mib": peak_mib()} | evaluation(model))
        if inputs.tasks:
            points[0]["harness"] = harness(model, tokenizer, inputs.tasks)
    planted = [record["planted"] for record in train]
    of_run = {"precision": precision, "run_minutes": time.process_time() / 60}
    return [point | counts_until(rows, planted, point["step"]) | of_run for point in points]


def main() -> None:
    arguments = json.loads(sys.argv[1])
    warnings.simplefilter("ignore", FutureWarning)
    machine = environment()
    for row in run(Setting(**arguments["setting"]), Inputs(**arguments["inputs"])):
        print(json.dumps(row | machine), flush=True)


if __name__ == "__main__":
    main()
