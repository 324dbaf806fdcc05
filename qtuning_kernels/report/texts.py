"""What the report shows of the samples' texts: excerpts, and the token view."""

import math

import numpy as np
import pandas as pd

from qtuning_kernels.run_record.reader import Record

TEXT_BYTES = 8_000_000  # of all excerpts that hovering shows
EXCERPT = 600  # characters of a prompt or answer, at most
MAX_TOKENS = 40_000  # tokens in the token view
SHADES = 10


def _cut(text: str, limit: int) -> str:
    return text if len(text) <= limit else text[: limit - 1] + "…"


def excerpts(ids: list, texts: pd.DataFrame) -> dict:
    """Prompt and answer of `ids`, cut to one length at which all fit into `TEXT_BYTES`.

    Returns ``prompt`` and ``answer`` (lists in the order of `ids`, None where there is no text) and
    ``limit``, the characters that were kept of each.
    """
    written = texts[texts.prompt.notna() & texts.answer.notna()]
    known = {row.id: (str(row.prompt), str(row.answer)) for row in written.itertuples()}
    pairs = [known.get(each, (None, None)) for each in ids]
    limit = EXCERPT
    while limit > 20:
        cut = [tuple(None if text is None else _cut(text, limit) for text in pair) for pair in pairs]
        size = sum(len(text.encode()) for pair in cut for text in pair if text)
        if size <= TEXT_BYTES:
            break
        limit = min(int(limit * TEXT_BYTES / size), limit - 10)
    else:
        cut = [(None, None)] * len(ids)
    return {"prompt": [pair[0] for pair in cut], "answer": [pair[1] for pair in cut], "limit": limit}


def _list(cell: object) -> list:
    return cell if isinstance(cell, list) else []


def _visible(text: str) -> str:
    """A token as a reader sees it: a line break is marked and still breaks the line."""
    return text.replace("\r", "").replace("\n", "⏎\n")


def _number(value: float) -> str:
    return "–" if value is None or math.isnan(value) else f"{value:.3g}"


def token_samples(record: Record) -> tuple[list[dict], int]:
    """The answers of the token view, and how many the record holds beyond `MAX_TOKENS`.

    A token's ``shade``, 0 … SHADES − 1, is by the rank of its score within the answer.
    """
    roles = {(row.step, row.id): row.role for row in record.samples[["step", "id", "role"]].itertuples(index=False)}
    prompts = dict(zip(record.texts.id, record.texts.prompt, strict=True))
    shown: list[dict] = []
    budget = MAX_TOKENS
    for row in record.tokens.itertuples():
        strings, keep = _list(row.tokens), _list(row.keep)
        nll = _list(row.nll) or [math.nan] * len(strings)
        score = _list(row.score)
        budget -= len(strings)
        if budget < 0 and shown:
            break
        rank = np.argsort(np.argsort(score or nll, kind="stable"), kind="stable")
        tokens = [
            {
                "text": _visible(str(text)),
                "shade": int(rank[i] * SHADES // len(strings)),
                "pruned": not keep[i],
                "title": f"nll {_number(nll[i])} nats" + (f", score {_number(score[i])}" if score else ""),
            }
            for i, text in enumerate(strings)
        ]
        role = roles.get((row.step, row.id), 0)
        prompt = row.prompt if isinstance(row.prompt, str) else prompts.get(row.id, "")
        shown.append(
            {
                "id": str(row.id),
                "step": int(row.step),
                "role": 0 if pd.isna(role) else int(role),
                "prompt": _cut(str(prompt), EXCERPT),
                "tokens": tokens,
                "kept": sum(map(bool, keep)),
                "total": len(tokens),
            }
        )
    return shown, len(record.tokens) - len(shown)
