"""`qtuning train`: fine-tune a model, pruning samples and tokens on the way."""

import argparse
import json
import shlex
import time
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

from qtuning_kernels.commands import checkpoints, options
from qtuning_kernels.commands.checkpoints import OPTIONS_FILE, SUMMARY_FILE
from qtuning_kernels.commands.inputs import held_out, load_inputs, load_reference, model_source
from qtuning_kernels.commands.terminal import log, program, quadrant_table
from qtuning_kernels.files import require, write_atomic
from qtuning_kernels.models.collectives import agreed, gather
from qtuning_kernels.run_record.schema import LOSS_STEPS, QUADRANT_LABELS

_FULL_RATE, _LORA_RATE = 2e-5, 1e-4


def add_parser(subparsers: argparse._SubParsersAction) -> argparse.ArgumentParser:
    parser = subparsers.add_parser(
        "train",
        help="fine-tune a model",
        description="Fine-tune a model on the samples and tokens that teach. Every field of QTuningConfig and "
        "transformers.TrainingArguments is an option (--help-all).",
        epilog="example: qtuning train --data my.jsonl --output runs/mine",
    )
    options.add_config(parser)
    positive, default = options.above(0, float), options.DEFAULT_TEXT
    parser.add_argument(
        "--output", "--output-dir", type=Path, metavar="FOLDER", help="new or empty (default: in runs/)"
    )
    text = f"between checkpoints {default}"
    parser.add_argument("--save-steps", type=positive, default=50, metavar="N", help=text)
    parser.add_argument("--resume", action="store_true", help="go on with the run in --output as it was")
    options.add_settings(parser, ("record", "record_tokens"))
    text = f"also log to what transformers knows: tensorboard, … {default}"
    parser.add_argument("--report-to", type=options.text_or_json, default="none", metavar="NAME", help=text)
    parser.add_argument("--report", action="store_true", help="end with qtuning report, which draws the run")
    group = options.add_model_and_data(parser)
    group.add_argument("--eval-data", metavar="PATH|NAME", help="evaluated on before, at checkpoints, and after")
    text = f"share of --data to hold out instead {default}"
    group.add_argument("--eval-share", type=float, default=0, metavar="X", help=text)

    group = parser.add_argument_group("pruning")
    options.add_settings(group, (*options.POLICY, *options.TOKEN_PRUNING))
    options.add_reference(group)
    options.add_settings(group, ("rescore_every", "selection_scope"))

    group = parser.add_argument_group("training")
    count = partial(group.add_argument, type=options.above(0), metavar="N")
    count("--batch-size", "--per-device-train-batch-size", default=16, help=f"of a pool, per process {default}")
    count("--gradient-accumulation", "--gradient-accumulation-steps", default=1, help=f"pools per step {default}")
    count("--epochs", "--num-train-epochs", type=positive, default=1, help=f"passes over the data {default}")
    count("--max-steps", help="optimiser steps; wins over --epochs")
    text = f"highest rate (default: {_FULL_RATE:g}, with LoRA {_LORA_RATE:g})"
    count("--learning-rate", type=positive, metavar="LR", help=text)
    count("--lora-rank", type=options.above(-1), default=0, help=f"of adapters, 0: all weights are trained {default}")
    count("--lora-target", type=options.text_or_json, metavar="A,B", help="layers with one (default: all-linear)")
    group.add_argument("--merge", action="store_true", help="add them into the final model's weights")
    count("--seed", type=int, default=42, help=f"of everything random {default}")
    group.add_argument("--bf16", action="store_true", help="under bfloat16 autocast; weights stay float32")
    text = "less memory, more time"
    group.add_argument("--gradient-checkpointing", action=options.FLAG, default=argparse.SUPPRESS, help=text)
    options.add_settings(group, ("micro_batch_tokens", *options.SCORING))
    return parser


def run(arguments: argparse.Namespace) -> None:
    from rich.console import Console

    from qtuning_kernels.commands.panel import RunPanel
    from qtuning_kernels.run_record.writer import write_texts

    qtuning = options.qtuning_config(arguments)
    if arguments.report and not qtuning.record:
        raise ValueError("--report draws the record of the run; accepted: without --no-record")
    output = arguments.output or Path("runs") / time.strftime("qtuning-%Y%m%d-%H%M%S")
    _refuse_early(arguments)
    training = _training_arguments(arguments, output)  # in which the processes of a run meet
    first = training.process_index == 0
    console = Console(quiet=not first)

    def verdict() -> tuple[Path, str | None, bool]:
        asked = _options(arguments)
        found = checkpoints.prepare_output(output, arguments.resume, given=arguments.output is not None, asked=asked)
        return output, found, checkpoints.is_finished(output, found, asked)

    def prepare() -> tuple[Any, Any]:
        inputs = load_inputs(arguments, console)
        if first:
            checkpoints.refuse_other_samples(output, inputs.samples)
        evaluated = held_out(arguments, inputs, console)
        if arguments.lora_rank:
            inputs.model = _with_lora(inputs.model, arguments)
        if arguments.resume:
            log(console, f"resuming from {checkpoint or 'the beginning: no checkpoint was written'}")
        trainer = _trainer(training, inputs, evaluated, qtuning, load_reference(arguments))
        if first:
            _write_json(output / OPTIONS_FILE, _options(arguments))
        if first and qtuning.record:
            write_texts(output / "record", inputs.texts(), limit=inputs.text_limit())
        return inputs, trainer

    # the first process looks at the folder, and names it: by the time, each would name its own
    output, checkpoint, finished = gather(agreed(verdict if first else lambda: None))[0]
    if finished:  # Trainer would make another step
        log(console, f"the run in {output} is finished: nothing was trained, its model and summary stay")
        return _draw(arguments, output, console) if first else None
    training.output_dir = str(output)
    inputs, trainer = agreed(prepare)
    panel = RunPanel(console)
    trainer.add_callback(panel)
    started = time.perf_counter()
    try:
        trainer.train(resume_from_checkpoint=checkpoint)
        if trainer.eval_dataset is not None and trainer.state.global_step not in _evaluations(trainer):
            trainer.evaluate()
    finally:
        panel.close()
    seconds = time.perf_counter() - started
    base = model_source(arguments) if arguments.merge else None
    final = checkpoints.save_final(trainer, inputs.tokenizer, output, base=base)
    if first:
        summary = _summary(trainer, final, seconds)
        _write_json(output / SUMMARY_FILE, summary)
        _print_summary(console, summary, output, inputs.tags)
        _draw(arguments, output, console)
    trainer.accelerator.wait_for_everyone()  # a launcher ends all processes once one has ended badly
    trainer.accelerator.end_training()


def _draw(arguments: argparse.Namespace, output: Path, console: Any) -> None:
    if arguments.report:
        from qtuning_kernels.report import build_report

        log(console, f"report in {build_report(output)}")
    elif arguments.record:
        log(console, f"draw the run with: {program()} report {shlex.quote(str(output))}")


def _refuse_early(arguments: argparse.Namespace) -> None:
    """What would otherwise fail only after work was done."""
    if arguments.lora_rank:
        require("--lora-rank", "lora", "peft")
    elif arguments.merge or arguments.lora_target:
        raise ValueError("--merge and --lora-target are of adapters; accepted: with --lora-rank")
    if arguments.report:
        from qtuning_kernels.report import NEEDED

        require("--report", "report", *NEEDED)
    if not 0 <= arguments.eval_share < 1:
        raise ValueError(f"--eval-share is {arguments.eval_share}; accepted: a number in [0, 1)")
    if arguments.eval_share and arguments.eval_data is not None:
        raise ValueError("--eval-share and --eval-data are both given; accepted: one of them")


def _evaluations(trainer: Any) -> dict[int, float]:
    """The loss of each evaluation by its step."""
    return {row["step"]: row["eval_loss"] for row in trainer.state.log_history if "eval_loss" in row}


def _write_json(path: Path, value: dict[str, Any]) -> None:
    with write_atomic(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2, default=str) + "\n", encoding="utf-8")


def _options(arguments: argparse.Namespace) -> dict[str, Any]:
    """The options as a configuration file has them."""
    passing = ("command", "run", "config", "traceback", "resume", "output")
    return {name: value for name, value in vars(arguments).items() if name not in passing}


def _with_lora(model: Any, arguments: argparse.Namespace) -> Any:
    from peft import LoraConfig, get_peft_model
    from transformers import set_seed

    set_seed(arguments.seed)  # the adapters start at random
    rank, names = arguments.lora_rank, arguments.lora_target or "all-linear"
    if isinstance(names, str) and names != "all-linear":
        names = names.split(",")  # which of a single text PEFT takes for a pattern of the whole path
    return get_peft_model(model, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=names, task_type="CAUSAL_LM"))


def _training_arguments(arguments: argparse.Namespace, output: Path) -> Any:
    import torch
    from transformers import TrainingArguments

    defaults = options.DEFAULTS | {"dataloader_pin_memory": torch.cuda.is_available()}
    if arguments.eval_data is not None or arguments.eval_share:
        defaults |= {"eval_strategy": "steps", "eval_steps": arguments.save_steps, "eval_on_start": True}
    renamed = {
        "output_dir": str(output),
        "per_device_train_batch_size": arguments.batch_size,
        "gradient_accumulation_steps": arguments.gradient_accumulation,
        "num_train_epochs": arguments.epochs,
        "max_steps": arguments.max_steps or -1,
        "learning_rate": arguments.learning_rate or (_LORA_RATE if arguments.lora_rank else _FULL_RATE),
    }
    given = options.training_arguments(arguments)
    if given.get("fsdp"):
        defaults["fsdp_config"] = {"fsdp_version": 2}  # where transformers' default is another
    if given.get("bf16") and not torch.accelerator.is_available():
        defaults["use_cpu"] = True  # which autocast on a CPU has to be asked for with
    training = TrainingArguments(**defaults | given | renamed)
    if training.deepspeed_plugin is not None:  # stage 3 would leave the final model without weights
        zero = training.deepspeed_plugin.deepspeed_config.setdefault("zero_optimization", {})
        zero["stage3_gather_16bit_weights_on_model_save"] = True
    return training


def _trainer(training: Any, inputs: Any, evaluated: Any, qtuning: Any, reference: dict[str, Any]) -> Any:
    from transformers import PrinterCallback

    from qtuning_kernels import QTuningTrainer

    data = {"train_dataset": inputs.samples, "eval_dataset": evaluated, "processing_class": inputs.tokenizer}
    trainer = QTuningTrainer(model=inputs.model, args=training, qtuning=qtuning, **data, **reference)
    trainer.remove_callback(PrinterCallback)
    return trainer


def _summary(trainer: Any, final: Path, seconds: float) -> dict[str, Any]:
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    return trainer.qtuning_summary() | {
        "loss_first_steps": fmean(losses[:LOSS_STEPS]) if losses else None,
        "loss_last_steps": fmean(losses[-LOSS_STEPS:]) if losses else None,
        "eval_loss": _evaluations(trainer),
        "wall_seconds": seconds,
        "checkpoint": str(final),
    }


def _print_summary(console: Any, summary: dict[str, Any], output: Path, tags: list[str] | None) -> None:
    from rich.table import Table

    def share(kept: int, seen: int) -> str:
        return f"{kept} of {seen} ({kept / seen:.1%})" if seen else "0"

    def number(value: float | None) -> str:
        return "none" if value is None else f"{value:.4f}"

    kept = {QUADRANT_LABELS[int(quadrant)]: n for quadrant, n in summary["kept_by_quadrant"].items() if n}
    by_quadrant = ", ".join(f"{name} {n}" for name, n in kept.items())
    table = Table(show_header=False, box=None)
    rows = {
        "samples kept": share(summary["samples_kept"], summary["samples_seen"]),
        "tokens kept": share(summary["tokens_kept"], summary["tokens_seen"]),
        **({"kept by quadrant": f"{by_quadrant}; {summary['supplemented']} of them supplemented"} if kept else {}),
        "ineligible": str(summary["ineligible"]),
        "loss first, last": f"{number(summary['loss_first'])}, {number(summary['loss_last'])}; mean of the "
        f"first and last {LOSS_STEPS} steps {number(summary['loss_first_steps'])}, "
        f"{number(summary['loss_last_steps'])}",
        "evaluation loss": ", ".join(f"{loss:.4f} at step {step}" for step, loss in summary["eval_loss"].items()),
        "precision": summary["precision"] or "",
        "seconds": ", ".join(f"{name} {value:.1f}" for name, value in summary["seconds"].items()),
        "wall time": f"{summary['wall_seconds']:.1f} s",
    }
    for name, value in rows.items():
        if value:
            table.add_row(name, value)
    console.print(table, highlight=False)
    record = output / "record" / "samples.jsonl"
    if tags is not None and record.exists():
        with record.open(encoding="utf-8") as lines:
            # nothing is in a quadrant where the policy has none
            seen = [row for row in map(json.loads, lines) if row.get("quadrant") is not None]
        groups = [tags[row["id"]] for row in seen]
        if seen:
            console.print(quadrant_table([row["quadrant"] for row in seen], [row["keep"] for row in seen], groups))
    checkpoint = summary["checkpoint"]
    log(console, f"model in {checkpoint}; load it with")
    for loader in ("AutoModelForCausalLM", "AutoTokenizer"):
        log(console, f"  {loader}.from_pretrained({checkpoint!r})")
