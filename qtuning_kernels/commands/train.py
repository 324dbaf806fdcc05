"""`qtuning train`: fine-tune a model, pruning samples and tokens on the way."""

import argparse
import json
import time
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

from qtuning_kernels.commands import checkpoints, options
from qtuning_kernels.commands.checkpoints import OPTIONS_FILE, SUMMARY_FILE
from qtuning_kernels.commands.inputs import held_out, load_inputs, load_reference
from qtuning_kernels.commands.terminal import log, quadrant_table
from qtuning_kernels.files import require, write_atomic
from qtuning_kernels.models.collectives import agreed, gather
from qtuning_kernels.run_record.schema import LOSS_STEPS, QUADRANT_LABELS

_FULL_RATE, _LORA_RATE = 2e-5, 1e-4


def add_parser(subparsers: argparse._SubParsersAction) -> argparse.ArgumentParser:
    parser = subparsers.add_parser(
        "train",
        help="fine-tune a model",
        description="Fine-tune a model. Every step scores a pool of samples with the model as it then is, "
        "keeps the samples that teach (quadrants 2 and 4 of the Error-Uncertainty plane), prunes the tokens "
        "of those in quadrant 2, and trains on the rest.",
        epilog="example: qtuning train --model HuggingFaceTB/SmolLM2-135M-Instruct --data my.jsonl "
        "--prompt-field question --completion-field answer --output runs/mine",
    )
    text = "show this, and all other fields of transformers.TrainingArguments, which are options by their own names"
    parser.add_argument("--help-all", action="help", help=text)
    options.add_config(parser)
    options.add_model_and_data(parser)
    group = parser.add_argument_group("evaluation", "before the first step, with every checkpoint, and after the last.")
    group.add_argument("--eval-data", metavar="PATH|NAME", help="data to evaluate on, read as --data is")
    text = "share of the data that is evaluated on instead of trained on, in [0, 1) (default: 0)"
    group.add_argument("--eval-share", type=float, default=0.0, metavar="X", help=text)

    group = parser.add_argument_group("pruning")
    options.add_settings(group, (*options.POLICY, *options.TOKEN_PRUNING))
    options.add_reference(group)
    options.add_settings(group, ("rescore_every", "selection_scope"))

    group = parser.add_argument_group("training")
    count = partial(group.add_argument, type=options.above(0), metavar="N")
    text = "samples in a selection pool, per process, of which the sample ratio is trained on (default: 16)"
    count("--batch-size", "--per-device-train-batch-size", default=16, help=text)
    text = "pools per optimiser step (default: 1)"
    count("--gradient-accumulation", "--gradient-accumulation-steps", default=1, help=text)
    text = "passes over the data (default: 1)"
    count("--epochs", "--num-train-epochs", type=options.above(0, float), default=1.0, help=text)
    count("--max-steps", help="optimiser steps; wins over --epochs")
    text = f"highest rate of the schedule (default: {_FULL_RATE:g}, with LoRA {_LORA_RATE:g})"
    count("--learning-rate", type=options.above(0, float), metavar="LR", help=text)
    text = "train adapters of this rank instead of all weights (default: 0, full fine-tuning)"
    count("--lora-rank", type=options.above(-1), default=0, help=text)
    count("--seed", type=int, default=42, help="of everything random (default: 42)")

    group = parser.add_argument_group("computation")
    group.add_argument("--bf16", action="store_true", help="train under bfloat16 autocast; weights stay float32")
    options.add_settings(group, ("micro_batch_tokens", *options.SCORING))

    group = parser.add_argument_group("output")
    text = "new or empty folder (default: runs/ and the time)"
    group.add_argument("--output", "--output-dir", type=Path, metavar="FOLDER", help=text)
    text = "steps between two checkpoints, of which the last two are kept (default: 50)"
    group.add_argument("--save-steps", type=options.above(0), default=50, metavar="N", help=text)
    text = "go on from the newest checkpoint in --output, with that run's options, to the same result"
    group.add_argument("--resume", action="store_true", help=text)
    options.add_settings(group, ("record", "record_tokens"))
    text = "also log to a tracker that transformers knows: tensorboard, wandb, … (default: none)"
    group.add_argument("--report-to", default="none", metavar="NAME", help=text)
    group.add_argument("--report", action="store_true", help="end with qtuning report, which draws the finished run")
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
        evaluated = held_out(arguments, inputs, console)
        if arguments.lora_rank:
            inputs.model = _with_lora(inputs.model, arguments.lora_rank, arguments.seed)
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
    final = checkpoints.save_final(trainer, inputs.tokenizer, output)
    trainer.accelerator.end_training()  # the last that the processes do together
    if not first:
        return
    summary = _summary(trainer, final, seconds)
    _write_json(output / SUMMARY_FILE, summary)
    _print_summary(console, summary, output, inputs.tags)
    _draw(arguments, output, console)


def _draw(arguments: argparse.Namespace, output: Path, console: Any) -> None:
    if arguments.report:
        from qtuning_kernels.report import build_report

        log(console, f"report in {build_report(output)}")
    elif arguments.record:
        log(console, f"draw the run with: qtuning report {output}")


def _refuse_early(arguments: argparse.Namespace) -> None:
    """What would otherwise fail only after work was done."""
    if arguments.lora_rank:
        require("--lora-rank", "lora", "peft")
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


def _with_lora(model: Any, rank: int, seed: int) -> Any:
    from peft import LoraConfig, get_peft_model
    from transformers import set_seed

    set_seed(seed)  # the adapters start at random
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")
    return get_peft_model(model, config)


def _training_arguments(arguments: argparse.Namespace, output: Path) -> Any:
    import torch
    from transformers import TrainingArguments

    defaults: dict[str, Any] = {
        "lr_scheduler_type": "cosine",
        "warmup_steps": 0.03,
        "save_strategy": "steps",
        "save_total_limit": 2,
        "logging_steps": 1,
        "disable_tqdm": True,
        "dataloader_pin_memory": torch.cuda.is_available(),
        "remove_unused_columns": False,  # sample_id is no argument of the model
    }
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
    training = TrainingArguments(**defaults | given | renamed)
    if training.deepspeed_plugin is not None:  # stage 3 would leave the final model without weights
        zero = training.deepspeed_plugin.deepspeed_config.setdefault("zero_optimization", {})
        zero["stage3_gather_16bit_weights_on_model_save"] = True
    return training


def _trainer(training: Any, inputs: Any, evaluated: Any, qtuning: Any, reference: dict[str, Any]) -> Any:
    from transformers import PrinterCallback

    from qtuning_kernels import QTuningTrainer

    trainer = QTuningTrainer(
        model=inputs.model,
        args=training,
        train_dataset=inputs.samples,
        eval_dataset=evaluated,
        processing_class=inputs.tokenizer,
        qtuning=qtuning,
        **reference,
    )
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
