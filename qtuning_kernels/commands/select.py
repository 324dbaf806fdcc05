"""`qtuning select`: the pruned data set as JSON Lines, for any other trainer."""

import argparse
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from qtuning_kernels.commands import options
from qtuning_kernels.commands.inputs import Inputs, load_inputs, load_reference
from qtuning_kernels.commands.scored import select_from_all
from qtuning_kernels.commands.terminal import log, quadrant_table
from qtuning_kernels.data.conversations import ASSISTANT_NAMES
from qtuning_kernels.files import write_atomic

FORMS = ("records", "text", "tokens")


def add_parser(subparsers: argparse._SubParsersAction) -> argparse.ArgumentParser:
    parser = subparsers.add_parser(
        "select",
        help="write the pruned data set",
        description="Score a data set with a model, without training, and write the samples that a policy, Q-Tuning "
        "by default, keeps as JSON Lines, for use with any other trainer. The whole data set is one selection pool.",
        epilog="example: qtuning select --model HuggingFaceTB/SmolLM2-135M-Instruct my.jsonl "
        "--sample-ratio 0.25 --output kept.jsonl",
    )
    options.add_config(parser)
    options.add_model_and_data(parser, positional=True)
    default = "selected.jsonl"
    parser.add_argument("--output", type=Path, default=Path(default), metavar="FILE", help=f"default: {default}")
    text = "records: the kept records as they are, no token pruned (default); text: answers without the text of their "
    text += "pruned tokens; tokens: input_ids and labels, with --token-mode applied"
    parser.add_argument("--write", choices=FORMS, default="records", help=text)
    group = parser.add_argument_group("selection and computation")
    options.add_settings(group, (*options.POLICY, *options.TOKEN_PRUNING, *options.SCORING))
    options.add_reference(group)
    group.add_argument("--seed", type=int, default=42, help=f"of what a policy draws {options.DEFAULT_TEXT}")
    return parser


def run(arguments: argparse.Namespace) -> None:
    from rich.console import Console

    console = Console()
    config = options.qtuning_config(arguments)
    inputs = load_inputs(arguments, console, output=arguments.output)
    reference = None
    if arguments.reference_model or arguments.reference_scores:
        from qtuning_kernels.training.reference import ReferenceScores

        given = load_reference(arguments)
        reference = ReferenceScores(given["reference_model"], given["reference_nll"])
    selection, _ = select_from_all(inputs, config, console, seed=arguments.seed, reference=reference)
    kept = selection.keep.nonzero().flatten().tolist()
    seen, trained = len(selection.token_mask), int(selection.token_mask.sum())
    if arguments.write == "tokens":
        rows = _token_rows(inputs.samples, selection, kept, config.token_mode)
    elif arguments.write == "text":
        rows = _text_rows(inputs, selection, kept, console)
    else:
        rows = (_record(inputs, index) for index in kept)
        trained = int(selection.cu_seqlens.diff()[selection.keep].sum())
    _write(rows, arguments.output)
    if selection.triage is not None:
        console.print(quadrant_table(selection.triage.quadrant.tolist(), selection.keep.tolist()))
    samples = f"{len(kept)} of {len(inputs.samples)} samples"
    log(console, f"{samples}, {trained} of {seen} answer tokens in {arguments.output}")


def _record(inputs: Inputs, index: int) -> dict[str, Any]:
    return dict(inputs.records.rows[inputs.samples[index]["sample_id"]])


def _token_rows(samples: Any, selection: Any, kept: list[int], token_mode: str) -> Iterable[dict[str, Any]]:
    """Tokenised samples, labels −100 where nothing is trained."""
    from qtuning_kernels.data.samples import to_sample

    for index in kept:
        row = samples[index]
        sample = to_sample(row["input_ids"], row["labels"], row["sample_id"])
        prune = sample.dropped if token_mode == "drop" else sample.masked
        pruned = prune(selection.keep_of(index))
        labels = pruned.aligned_labels().tolist()
        yield {"sample_id": row["sample_id"], "input_ids": pruned.input_ids.tolist(), "labels": labels}


def _text_rows(inputs: Inputs, selection: Any, kept: list[int], console: Any) -> Iterable[dict[str, Any]]:
    """The kept records; those with pruned tokens with answers of their kept tokens alone."""
    column, whole = inputs.shape.columns[-1], 0
    for index in kept:
        record = _record(inputs, index)
        if not selection.keep_of(index).all():
            answers = _kept_answers(inputs.samples[index], selection.keep_of(index), inputs.tokenizer)
            pruned = with_answers(record[column], answers)
            whole += pruned is None
            record[column] = record[column] if pruned is None else pruned
        yield record
    if whole:
        reason = "an answer would be empty, calls a tool, or was lost to --cutoff"
        log(console, f"{whole} records with pruned tokens are written whole: {reason}")


def _kept_answers(row: dict[str, Any], keep: Any, tokenizer: Any) -> list[str]:
    """The text of the kept tokens of each answer, an answer being a run of trainable tokens."""
    answers: list[list[int]] = []
    tokens = ((i, t) for i, t in enumerate(row["labels"]) if t >= 0)
    last = None
    for (position, token), kept in zip(tokens, keep.tolist(), strict=True):
        if last is None or position != last + 1:
            answers.append([])
        if kept:
            answers[-1].append(token)
        last = position
    return [tokenizer.decode(answer, skip_special_tokens=True) for answer in answers]


def with_answers(value: Any, answers: list[str]) -> Any:
    """The content of a record's answer column with other answers; None if these do not fit or are empty.

    Args:
        value: text, or a list of turns (``role`` and ``content``, or ``from`` and ``value``).
        answers: one per answer, in order.
    """
    if not all(answer.strip() for answer in answers):
        return None
    if not isinstance(value, list):
        return answers[0] if len(answers) == 1 else None
    turns = [dict(turn) for turn in value]
    replaced = iter(answers)
    for turn in turns:
        text = "value" if "from" in turn else "content"
        if turn.get("role", turn.get("from")) in ASSISTANT_NAMES and turn.get("weight") != 0:
            answer = next(replaced, None)
            calls = turn.get("tool_calls") or turn.get("from") == "function_call"
            if answer is None or not isinstance(turn.get(text), str) or calls:
                return None
            turn[text] = answer
    return turns if next(replaced, None) is None else None


def _write(rows: Iterable[dict[str, Any]], path: Path) -> None:
    """One JSON object per line."""
    with write_atomic(path) as temporary, temporary.open("w", encoding="utf-8", errors="backslashreplace") as file:
        file.writelines(json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in rows)
