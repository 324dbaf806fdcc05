"""From records to training samples: chat template, tokens, labels on the answers alone, truncation."""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
from datasets import Dataset
from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from qtuning_kernels.data.conversations import LeftOutError, Shape, detect_shape, is_trained, tools_of
from qtuning_kernels.data.rendering import (
    MARK,
    PlainRenderer,
    Span,
    TemplateRenderer,
    refuse_dropped_tools,
    special_tokens,
)
from qtuning_kernels.data.sources import DataError, Records, read_records
from qtuning_kernels.kernels.contract import IGNORE_INDEX

_BATCH = 1000
_EXAMPLES = 5


@dataclass
class DataReport:
    """What became of the records.

    Attributes:
        source, shape, columns, unused_columns: where they came from and how they were read.
        read: records in the source; `read - skipped` samples remain.
        skipped: records left out: without an answer token, marked as not to be trained on, or unusable.
        untrained_answers: answers of samples that are read and not trained on, by their ``weight: 0``.
        truncated: samples cut to the cutoff.
        tokens, answer_tokens: totals over the samples.
        skipped_examples: the first few that were skipped, with location and reason.
    """

    source: str
    shape: str
    columns: tuple[str, ...]
    unused_columns: tuple[str, ...]
    read: int = 0
    skipped: int = 0
    untrained_answers: int = 0
    truncated: int = 0
    tokens: int = 0
    answer_tokens: int = 0
    skipped_examples: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        unused = f"; not used: {', '.join(self.unused_columns)}" if self.unused_columns else ""
        lines = [
            f"{self.source}: {self.shape} ({', '.join(self.columns)}){unused}",
            f"{self.read} records read, {self.skipped} skipped, {self.truncated} truncated; "
            f"{self.tokens} tokens, {self.answer_tokens} of them answers",
            *[f"{self.untrained_answers} answers have weight 0 and are not trained on"] * (self.untrained_answers > 0),
            *(f"skipped {example}" for example in self.skipped_examples),
        ]
        return "\n".join(lines)


def load_sft_dataset(
    data: str | Path,
    tokenizer: PreTrainedTokenizerBase,
    *,
    split: str = "train",
    config: str | None = None,
    **kwargs,
) -> tuple[Dataset, DataReport]:
    """`read_records` and `tokenize_records` in one call; keyword arguments are theirs."""
    return tokenize_records(read_records(data, split=split, config=config), tokenizer, **kwargs)


def tokenize_records(
    records: Records,
    tokenizer: PreTrainedTokenizerBase,
    *,
    prompt_field: str | None = None,
    completion_field: str | None = None,
    cutoff: int = 2048,
    skip_unusable: bool = False,
) -> tuple[Dataset, DataReport]:
    """Training samples of `records`, in their order.

    With a chat template a record is rendered by it, and the labels cover every message of the assistant and
    the end-of-turn token behind it, where the sample ends. Without one the text is prompt, completion,
    end-of-sequence token.

    A sample of more than `cutoff` tokens loses its end. Where the prompt alone takes more than half of the
    cutoff, it loses its beginning first, until the first answer, or `cutoff // 2` tokens of it, fits: no
    sample is ever left without an answer token. A special token that the data spells is text.

    Args:
        records: what `read_records` returned.
        tokenizer: a fast tokenizer (labels are found through character offsets).
        prompt_field, completion_field: columns to use where the shape is none of the usual ones; several columns of
            the prompt, with commas between them, are joined by an empty line.
        cutoff: the most tokens of a sample, at least 2.
        skip_unusable: leave out records that cannot be used and count them, instead of raising.

    Returns:
        A dataset with ``input_ids`` (list of int32), ``labels`` (the same, `IGNORE_INDEX` outside the answers
        and on a first token, which nothing predicts) and ``sample_id`` (int64, the 0-based record number),
        and a report.

    Raises:
        DataError: a record cannot be used; names its file and line.
        ValueError: `cutoff` below 2, or a slow tokenizer.
    """
    if cutoff < 2:
        raise ValueError(f"cutoff={cutoff!r} must be at least 2: an answer token and one to predict it from")
    if not tokenizer.is_fast:
        raise ValueError(f"tokenizer {type(tokenizer).__name__} has no character offsets; a fast one is needed")
    shape = detect_shape(records.columns, prompt_field=prompt_field, completion_field=completion_field)
    columns = tuple(c for c in shape.columns if c in records.columns)
    report = DataReport(
        source=records.source,
        shape=shape.name,
        columns=columns,
        unused_columns=tuple(c for c in records.columns if c not in columns),
        read=len(records),
    )
    renderer = TemplateRenderer(tokenizer) if tokenizer.chat_template else PlainRenderer(tokenizer, shape)
    rendered = _render_all(records, shape, renderer, report, skip_unusable)
    # one Arrow table per batch: lists of Python integers for a whole data set would not fit into memory
    tables = []
    while batch := list(islice(rendered, _BATCH)):
        tables.append(_tokenize(batch, tokenizer, renderer.add_special_tokens, records, cutoff, report))
    if report.read == report.skipped:
        raise DataError(f"{records.source}: no record has an answer token; {'; '.join(report.skipped_examples)}")
    return Dataset(pa.concat_tables(tables)), report


def _skip(report: DataReport, where: str, why: object) -> None:
    report.skipped += 1
    if len(report.skipped_examples) < _EXAMPLES:
        report.skipped_examples.append(f"{where}: {why}")


def _render_all(
    records: Records,
    shape: Shape,
    renderer: "TemplateRenderer | PlainRenderer",
    report: DataReport,
    skip_unusable: bool,
) -> Iterator[tuple[int, str, list[Span]]]:
    special = special_tokens(renderer.tokenizer)
    for index, row in enumerate(records):
        where = records.location(index)
        try:
            messages, tools = shape.to_messages(row), tools_of(row) if "tools" in shape.columns else None
            for message in messages:
                if isinstance(content := message.get("content"), str):
                    message["content"] = special.sub(lambda found: f"{found[0][0]}{MARK}{found[0][1:]}", content)
            text, spans = renderer.render(messages, tools)
            refuse_dropped_tools(messages, tools, renderer.render)
            text.encode()  # the tokenizer cannot take half a surrogate pair, which JSON can spell
        except (DataError, TemplateError, UnicodeEncodeError) as error:
            reason = _reason(error, row, shape)
            if not skip_unusable and not isinstance(error, LeftOutError):
                raise DataError(f"{where}: {reason}; --skip-unusable (skip_unusable=True) leaves such out") from None
            _skip(report, where, reason)
        else:
            report.untrained_answers += sum(m["role"] == "assistant" and not is_trained(m) for m in messages)
            yield index, text, spans


def _reason(error: Exception, row: dict[str, Any], shape: Shape) -> str:
    if isinstance(error, UnicodeEncodeError):
        return f"not valid Unicode text: {error.reason}"
    if isinstance(error, TemplateError):
        return f"the model's chat template refuses it: {error}"
    try:
        own = detect_shape([name for name, value in row.items() if value is not None]).name
    except DataError:
        own = shape.name
    mixed = own != shape.name and shape.name != "named columns"
    return f"{error} (its columns are those of {own}; this data is read as {shape.name})" if mixed else str(error)


def _tokenize(
    batch: list[tuple[int, str, list[Span]]],
    tokenizer: PreTrainedTokenizerBase,
    add_special_tokens: bool,
    records: Records,
    cutoff: int,
    report: DataReport,
) -> pa.Table:
    encoded = tokenizer(
        [text for _, text, _ in batch],
        add_special_tokens=add_special_tokens,
        return_offsets_mapping=True,
        return_special_tokens_mask=True,
        return_attention_mask=False,
        verbose=False,  # its warning about long texts comes before the cutoff
    )
    columns: dict[str, list[Any]] = {"input_ids": [], "labels": [], "sample_id": []}
    for row, (index, text, spans) in enumerate(batch):
        ids, offsets, special = (encoded[name][row] for name in ("input_ids", "offset_mapping", "special_tokens_mask"))
        if MARK in text:
            ids, offsets, special = _encode_marked(text, tokenizer, add_special_tokens)
            spans = [(start - text.count(MARK, 0, start), end - text.count(MARK, 0, end)) for start, end in spans]
        trained = _in_spans(offsets, special, spans)
        if not trained:
            _skip(report, records.location(index), "no answer token after tokenisation")
            continue
        ids = ids[: trained[-1] + 1]  # tokens after the last answer teach nothing
        start = _window_start(trained, cutoff)
        labels = [IGNORE_INDEX] * len(ids)
        for position in trained:
            labels[position] = ids[position]
        report.truncated += len(ids) > cutoff
        ids, labels = ids[start : start + cutoff], labels[start : start + cutoff]
        labels[0] = IGNORE_INDEX
        report.tokens += len(ids)
        report.answer_tokens += len(labels) - labels.count(IGNORE_INDEX)
        for name, value in (("input_ids", ids), ("labels", labels), ("sample_id", index)):
            columns[name].append(value)
    return pa.table(
        {
            "input_ids": pa.array(columns["input_ids"], pa.list_(pa.int32())),
            "labels": pa.array(columns["labels"], pa.list_(pa.int32())),
            "sample_id": pa.array(columns["sample_id"], pa.int64()),
        }
    )


def _encode_marked(
    text: str, tokenizer: PreTrainedTokenizerBase, add_special_tokens: bool
) -> tuple[list[int], list[Span], list[int]]:
    """Ids, offsets in the text without marks, and which tokens the tokenizer added; marked special tokens as text."""
    ids: list[int] = tokenizer("").input_ids[:1] if add_special_tokens else []
    ids = [token for token in ids if token == tokenizer.bos_token_id]
    offsets, start = [(0, 0)] * len(ids), 0
    added = len(ids)
    for piece in re.split(f"({special_tokens(tokenizer).pattern})", text):
        plain, literal = piece.replace(MARK, ""), bool(special_tokens(tokenizer).fullmatch(piece))
        encoded = tokenizer(
            plain,
            add_special_tokens=False,
            split_special_tokens=not literal,
            return_offsets_mapping=True,
            verbose=False,
        )
        ids += encoded["input_ids"]
        offsets += [(start + first, start + last) for first, last in encoded["offset_mapping"]]
        start += len(plain)
    return ids, offsets, [1] * added + [0] * (len(ids) - added)


def _in_spans(offsets: list[Span], special: list[int], spans: list[Span]) -> list[int]:
    """Positions > 0 of the tokens that hold a character of an answer.

    A token that straddles the border belongs to the answer, whose first characters it predicts. Some
    tokenizers give a token of blanks no width; it counts at its own position.
    """
    positions, remaining = [], iter(spans)
    span = next(remaining, None)
    for position, ((start, end), is_added) in enumerate(zip(offsets, special, strict=True)):
        while span is not None and start >= span[1]:
            span = next(remaining, None)
        if span is None:
            break
        if position and not is_added and max(end, start + 1) > span[0]:
            positions.append(position)
    return positions


def _window_start(trained: list[int], cutoff: int) -> int:
    """Where the `cutoff` tokens to keep begin: 0 unless the prompt takes more than half of them."""
    first = trained[0]
    length = next((n for n, p in enumerate(trained) if p != first + n), len(trained))  # of the first answer
    return max(0, first + min(length, cutoff // 2) - cutoff)
