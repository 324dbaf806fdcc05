"""`qtuning train`: fine-tune a model, pruning samples and tokens on the way."""

import argparse
import json
import time
from pathlib import Path
from typing import Any

from qtuning_kernels.commands import checkpoints, options
from qtuning_kernels.commands.tables import QUADRANTS, quadrant_table

OPTIONS_FILE = "options.json"  # in the output folder; what a resumed run goes on with
_FULL_RATE, _LORA_RATE = 2e-5, 1e-4
_LOSS_STEPS = 5  # single steps train on so few samples that their losses say little


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
    options.add_config(parser)
    options.add_model_and_data(parser)

    group = parser.add_argument_group("pruning")
    options.add_sample_ratio(group)
    options.add_token_pruning(group)

    group = parser.add_argument_group("training")
    group.add_argument(
        "--batch-size",
        type=options.positive,
        default=16,
        metavar="N",
        help="samples in a selection pool, of which the sample ratio is trained on (default: 16)",
    )
    group.add_argument(
        "--gradient-accumulation",
        type=options.positive,
        default=1,
        metavar="N",
        help="pools per optimiser step (default: 1)",
    )
    group.add_argument(
        "--epochs",
        type=options.positive_float,
        default=1.0,
        metavar="N",
        help="passes over the data (default: 1)",
    )
    group.add_argument("--max-steps", type=options.positive, metavar="N", help="optimiser steps; wins over --epochs")
    group.add_argument(
        "--learning-rate",
        type=options.positive_float,
        metavar="LR",
        help=f"highest rate of the cosine schedule (default: {_FULL_RATE:g}, with LoRA {_LORA_RATE:g})",
    )
    group.add_argument(
        "--lora-rank",
        type=options.not_negative,
        default=0,
        metavar="R",
        help="train adapters of this rank instead of all weights (default: 0, full fine-tuning)",
    )
    group.add_argument("--seed", type=int, default=42, metavar="N", help="of everything random (default: 42)")

    group = parser.add_argument_group("computation")
    group.add_argument("--bf16", action="store_true", help="train under bfloat16 autocast; weights stay float32")
    group.add_argument(
        "--micro-batch-tokens",
        type=options.positive,
        default=4096,
        metavar="N",
        help="most tokens in one training forward and backward (default: 4096)",
    )
    options.add_scoring(group)

    group = parser.add_argument_group("output")
    group.add_argument(
        "--output", type=Path, metavar="FOLDER", help="new or empty folder (default: runs/ and the time)"
    )
    group.add_argument(
        "--save-steps",
        type=options.positive,
        default=50,
        metavar="N",
        help="steps between two checkpoints, of which the last two are kept (default: 50)",
    )
    group.add_argument(
        "--resume",
        action="store_true",
        help="go on from the newest checkpoint in --output, with that run's options, to the same result",
    )
    group.add_argument(
        "--report-to",
        default="none",
        metavar="NAME",
        help="also log to a tracker that transformers knows: tensorboard, wandb, … (default: none)",
    )
    group.add_argument("--report", action="store_true", help="end with qtuning report, which draws the finished run")
    return parser


def run(arguments: argparse.Namespace) -> None:
    from rich.console import Console

    from qtuning_kernels import QTuningConfig
    from qtuning_kernels.commands.panel import RunPanel
    from qtuning_kernels.run_record.writer import write_texts

    options.quiet_libraries()
    console = Console()
    qtuning = QTuningConfig(
        sample_ratio=arguments.sample_ratio,
        token_ratio=arguments.token_ratio,
        neighbor_weight=arguments.neighbor_weight,
        token_mode=arguments.token_mode,
        micro_batch_tokens=arguments.micro_batch_tokens,
        score_batch_tokens=arguments.score_batch_tokens,
        score_dtype=arguments.score_dtype,
        matmul=arguments.matmul,
    )
    output = arguments.output or Path("runs") / time.strftime("qtuning-%Y%m%d-%H%M%S")
    checkpoint = checkpoints.prepare_output(output, arguments.resume, given=arguments.output is not None)
    source = options.model_source(arguments)
    tokenizer = options.load_tokenizer(source)
    records, samples, report = options.load_data(arguments, tokenizer)
    tags = options.tags(arguments, records)
    console.print(str(report), highlight=False, markup=False, soft_wrap=True)
    model = options.load_model(source)
    options.check_vocabulary(samples, model)
    if arguments.lora_rank:
        model = _with_lora(model, arguments.lora_rank, arguments.seed)
    if arguments.resume:
        console.print(f"resuming from {checkpoint or 'the beginning: no checkpoint was written'}", highlight=False)

    checkpoints.write_atomic(output / OPTIONS_FILE, _options(arguments))
    texts = options.texts(arguments, records, samples)
    write_texts(output / "record", texts, limit=options.text_limit(samples))
    trainer = _trainer(arguments, output, model, tokenizer, samples, qtuning)
    panel = RunPanel(console)
    trainer.add_callback(panel)
    started = time.perf_counter()
    try:
        trainer.train(resume_from_checkpoint=checkpoint)
    finally:
        panel.close()
    seconds = time.perf_counter() - started
    final = checkpoints.save_final(trainer, tokenizer, output)
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    summary = trainer.qtuning_summary() | {
        "loss_first_steps": _mean(losses[:_LOSS_STEPS]),
        "loss_last_steps": _mean(losses[-_LOSS_STEPS:]),
        "wall_seconds": seconds,
        "checkpoint": str(final),
    }
    checkpoints.write_atomic(output / "summary.json", json.dumps(summary, indent=2, default=str) + "\n")
    _print_summary(console, summary, output, tags)
    if arguments.report:
        from qtuning_kernels.report import build_report

        console.print(f"report in {build_report(output)}", highlight=False, soft_wrap=True)
    else:
        console.print(f"draw the run with: qtuning report {output}", highlight=False, soft_wrap=True)


def _options(arguments: argparse.Namespace) -> str:
    """The options as a configuration file."""
    passing = ("command", "run", "config", "debug", "resume", "output")
    return json.dumps({k: v for k, v in vars(arguments).items() if k not in passing}, indent=2) + "\n"


def _with_lora(model: Any, rank: int, seed: int) -> Any:
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError:
        raise ImportError("--lora-rank needs peft: pip install 'qtuning-kernels[lora]'") from None
    from transformers import set_seed

    set_seed(seed)  # the adapters start at random
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")
    return get_peft_model(model, config)


def _trainer(
    arguments: argparse.Namespace,
    output: Path,
    model: Any,
    tokenizer: Any,
    samples: Any,
    qtuning: Any,
) -> Any:
    import torch
    from transformers import PrinterCallback, TrainingArguments

    from qtuning_kernels import QTuningTrainer

    default_rate = _LORA_RATE if arguments.lora_rank else _FULL_RATE
    training = TrainingArguments(
        output_dir=str(output),
        per_device_train_batch_size=arguments.batch_size,
        gradient_accumulation_steps=arguments.gradient_accumulation,
        num_train_epochs=arguments.epochs,
        max_steps=arguments.max_steps or -1,
        learning_rate=arguments.learning_rate or default_rate,
        lr_scheduler_type="cosine",
        warmup_steps=0.03,
        seed=arguments.seed,
        bf16=arguments.bf16,
        save_strategy="steps",
        save_steps=arguments.save_steps,
        save_total_limit=2,
        logging_steps=1,
        report_to=arguments.report_to,
        disable_tqdm=True,
        dataloader_pin_memory=torch.cuda.is_available(),
        remove_unused_columns=False,  # sample_id is no argument of the model
    )
    trainer = QTuningTrainer(
        model=model, args=training, train_dataset=samples, processing_class=tokenizer, qtuning=qtuning
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def _mean(values: list[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _print_summary(console: Any, summary: dict[str, Any], output: Path, tags: list[str] | None) -> None:
    from rich.table import Table

    def share(kept: int, seen: int) -> str:
        return f"{kept} of {seen} ({kept / seen:.1%})" if seen else "0"

    def number(value: float | None) -> str:
        return "none" if value is None else f"{value:.4f}"

    kept = {QUADRANTS[int(quadrant)]: n for quadrant, n in summary["kept_by_quadrant"].items() if n}
    by_quadrant = ", ".join(f"{name} {n}" for name, n in kept.items()) or "none"
    table = Table(show_header=False, box=None)
    rows = {
        "samples kept": share(summary["samples_kept"], summary["samples_seen"]),
        "tokens kept": share(summary["tokens_kept"], summary["tokens_seen"]),
        "kept by quadrant": f"{by_quadrant}; {summary['supplemented']} of them supplemented",
        "ineligible": str(summary["ineligible"]),
        "loss first, last": f"{number(summary['loss_first'])}, {number(summary['loss_last'])}; mean of the "
        f"first and last {_LOSS_STEPS} steps {number(summary['loss_first_steps'])}, "
        f"{number(summary['loss_last_steps'])}",
        "precision": summary["precision"] or "",
        "seconds": ", ".join(f"{name} {value:.1f}" for name, value in summary["seconds"].items()),
        "wall time": f"{summary['wall_seconds']:.1f} s",
    }
    for name, value in rows.items():
        table.add_row(name, value)
    console.print(table, highlight=False)
    record = output / "record" / "samples.jsonl"
    if tags is not None and record.exists():
        with record.open(encoding="utf-8") as lines:
            # a run that keeps everything scores nothing, and its samples stand in no quadrant
            seen = [row for row in map(json.loads, lines) if row.get("quadrant") is not None]
        console.print(
            quadrant_table(
                [row["quadrant"] for row in seen],
                [row["keep"] for row in seen],
                [tags[row["id"]] for row in seen],
            )
        )
    checkpoint = summary["checkpoint"]
    console.print(
        f"model in {checkpoint}; load it with\n"
        f"  AutoModelForCausalLM.from_pretrained({checkpoint!r})\n"
        f"  AutoTokenizer.from_pretrained({checkpoint!r})",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )
