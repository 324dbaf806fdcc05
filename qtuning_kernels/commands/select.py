"""`qtuning select`: the pruned data set as JSON Lines, for any other trainer."""

import argparse
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from qtuning_kernels.commands import options
from qtuning_kernels.commands.scored import score_data_set
from qtuning_kernels.commands.tables import quadrant_table

FORMS = ("records", "text", "tokens")


def add_parser(subparsers: argparse._SubParsersAction) -> argparse.ArgumentParser:
    parser = subparsers.add_parser(
        "select",
        help="write the pruned data set",
        description="Score a data set with a model, without training, and write the samples that Q-Tuning "
        "keeps as JSON Lines, for use with any other trainer. The whole data set is one selection pool.",
        epilog="example: qtuning select --model HuggingFaceTB/SmolLM2-135M-Instruct my.jsonl "
        "--sample-ratio 0.25 --output kept.jsonl",
    )
    options.add_config(parser)
    options.add_model_and_data(parser, positional=True)
    parser.add_argument(
        "--output", type=Path, default=Path("selected.jsonl"), metavar="FILE", help="default: selected.jsonl"
    )
    parser.add_argument(
        "--write",
        choices=FORMS,
        default="records",
        help="records: the kept records as they are, no token pruned (default); text: the same, but the "
        "answers of quadrant 2 lose the text of their pruned tokens; tokens: input_ids and labels, with "
        "--token-mode applied",
    )
    group = parser.add_argument_group("selection and computation")
    options.add_sample_ratio(group)
    options.add_token_pruning(group)
    options.add_scoring(group)
    return parser


def run(arguments: argparse.Namespace) -> None:
    from rich.console import Console

    from qtuning_kernels import QTuningConfig
    from qtuning_kernels.training.selection import select

    options.quiet_libraries()
    console = Console()
    config = QTuningConfig(
        sample_ratio=arguments.sample_ratio,
        token_ratio=arguments.token_ratio,
        neighbor_weight=arguments.neighbor_weight,
        token_mode=arguments.token_mode,
    )
    source = options.model_source(arguments)
    tokenizer = options.load_tokenizer(source)
    records, samples, report = options.load_data(arguments, tokenizer)
    console.print(str(report), highlight=False, markup=False, soft_wrap=True)
    model = options.load_model(source)
    options.check_vocabulary(samples, model)
    selection = select(score_data_set(model, samples, arguments, console), config)

    if arguments.write == "tokens":
        rows = _token_rows(samples, selection, config.token_mode)
    elif arguments.write == "text":
        rows = _text_rows(records, samples, selection, tokenizer, options.answer_column(arguments, records), console)
    else:
        rows = (_record(records, samples, index) for index in _kept(selection))
    written = _write(rows, arguments.output)
    console.print(quadrant_table(selection.triage.quadrant.tolist(), selection.triage.keep.tolist()))
    seen, kept = len(selection.token_mask), int(selection.token_mask.sum())
    if arguments.write == "records":
        lengths = selection.cu_seqlens.diff()
        kept = int(lengths[selection.triage.keep].sum())
    console.print(
        f"{written} of {len(samples)} samples, {kept} of {seen} answer tokens in {arguments.output}",
        highlight=False,
        soft_wrap=True,
    )


def _kept(selection: Any) -> list[int]:
    return selection.triage.keep.nonzero().flatten().tolist()


def _record(records: Any, samples: Any, index: int) -> dict[str, Any]:
    return dict(records.rows[samples[index]["sample_id"]])


def _token_rows(samples: Any, selection: Any, token_mode: str) -> Iterable[dict[str, Any]]:
    """Tokenised samples, labels −100 where nothing is trained."""
    from qtuning_kernels.data.samples import to_sample
    from qtuning_kernels.kernels.contract import IGNORE_INDEX

    for index in _kept(selection):
        row = samples[index]
        sample = to_sample(row["input_ids"], row["labels"], row["sample_id"])
        prune = sample.dropped if token_mode == "drop" else sample.masked
        pruned = prune(selection.keep_of(index))
        labels = [IGNORE_INDEX] * len(pruned.input_ids)
        for position, label in zip(pruned.label_positions.tolist(), pruned.labels.tolist(), strict=True):
            labels[position] = label
        yield {"sample_id": row["sample_id"], "input_ids": pruned.input_ids.tolist(), "labels": labels}


def _text_rows(
    records: Any, samples: Any, selection: Any, tokenizer: Any, column: str, console: Any
) -> Iterable[dict[str, Any]]:
    """The kept records; those of quadrant 2 with answers of their kept tokens alone."""
    whole = 0
    for index in _kept(selection):
        record = _record(records, samples, index)
        if int(selection.triage.role[index]) == 2:
            answers = _kept_answers(samples[index], selection.keep_of(index), tokenizer)
            pruned = with_answers(record[column], answers)
            if pruned is None:
                whole += 1
            else:
                record[column] = pruned
        yield record
    if whole:
        console.print(
            f"{whole} records of quadrant 2 are written whole: an answer would be empty, calls a tool, or "
            "was lost to --cutoff",
            highlight=False,
            soft_wrap=True,
        )


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
        if turn.get("role", turn.get("from")) in _ANSWERING:
            answer = next(replaced, None)
            if answer is None or not isinstance(turn.get(text), str) or turn.get("tool_calls"):
                return None
            turn[text] = answer
    return turns if next(replaced, None) is None else None


_ANSWERING = frozenset({"assistant", "gpt", "chatgpt", "model", "bot"})


def _write(rows: Iterable[dict[str, Any]], path: Path) -> int:
    """One JSON object per line, under a temporary name first; returns how many."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    count = 0
    with temporary.open("w", encoding="utf-8", errors="backslashreplace") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False, default=str) + "\n")
            count += 1
    temporary.replace(path)
    return count
