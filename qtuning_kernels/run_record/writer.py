"""Writes the record of a run, as JSON Lines that survive a kill at any moment."""

import json
import platform
import random
import shlex
import sys
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any, TextIO

from qtuning_kernels.files import write_atomic
from qtuning_kernels.run_record.reader import flatten, read_lines, read_run
from qtuning_kernels.run_record.schema import RECORD_VERSION, TABLES

DISTRIBUTIONS = ("qtuning-kernels", "torch", "transformers", "datasets", "accelerate", "peft", "triton")
TEXT_LIMIT = 2000  # characters of prompt and of answer that texts.jsonl keeps


def _portable(value: Any) -> Any:
    """`value` as JSON and pandas can hold it: NaN as None, infinities as strings, no lone surrogates."""
    if isinstance(value, float):
        if value != value:
            return None
        return value if abs(value) != float("inf") else ("Infinity" if value > 0 else "-Infinity")
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode("utf-8")
    if isinstance(value, Mapping):
        return {str(key): _portable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_portable(item) for item in value]
    return value


def _plain(value: Any) -> Any:
    """Tensors, arrays and NumPy scalars as Python values; anything else that JSON lacks as text."""
    return value.tolist() if hasattr(value, "tolist") else str(value)


def _line(row: Mapping) -> str:
    try:
        line = json.dumps(row, default=_plain, allow_nan=False, separators=(",", ":"))
        portable = "\\ud" not in line
    except ValueError:
        portable = False
    if not portable:  # rare, so only then is the row walked
        row = _portable(json.loads(json.dumps(row, default=_plain)))
        line = json.dumps(row, separators=(",", ":"))
    return line + "\n"


def _rows(rows: Iterable[Mapping] | Mapping[str, Sequence] | None) -> list[dict]:
    """A list of rows, from a list of rows or from columns of equal length."""
    if rows is None:
        return []
    if not isinstance(rows, Mapping):
        return [dict(row) for row in rows]
    columns = {name: _plain(column) if hasattr(column, "tolist") else column for name, column in rows.items()}
    lengths = {name: len(column) for name, column in columns.items()}
    if len(set(lengths.values())) > 1:
        raise ValueError(f"sample_rows: columns must be of equal length, got {lengths}")
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def _write_lines(path: Path, lines: Iterable[str]) -> None:
    with write_atomic(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        file.writelines(lines)


def installed_versions() -> dict[str, str]:
    """Of Python, the platform, and what is installed of `DISTRIBUTIONS`."""
    found = {"python": platform.python_version(), "platform": platform.platform()}
    for name in DISTRIBUTIONS:
        with suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def _command() -> str:
    """The command line of this process, as one would type it."""
    script = Path(sys.argv[0]).name
    return shlex.join(["qtuning", *sys.argv[1:]] if script == "qtuning" else sys.orig_argv)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


class RunRecord:
    """Writes the record of a run, one flushed append per file and step.

    Only the main process of a distributed run may own one. A step counts as recorded when its row is in
    ``steps.jsonl``, which is written last.

    Args:
        folder: the record's folder, ``<output_dir>/record``; made if missing. An earlier record in
            it that is not resumed is moved to ``record.1``, ``record.2``, … beside it.
        resume_step: the step of the checkpoint that the run goes on from; rows of later steps are removed.
        total_steps: optimiser steps of the whole run, if known, over which the token rows are spread.
        token_samples: how many rows ``tokens.jsonl`` may hold.
        seed: of the choice of samples whose tokens are recorded.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        resume_step: int | None = None,
        total_steps: int | None = None,
        token_samples: int = 256,
        seed: int = 0,
    ) -> None:
        if resume_step is not None and resume_step < 0:
            raise ValueError(f"resume_step must be at least 0, got {resume_step}")
        self.folder = Path(folder)
        self._seed, self._total_steps, self._token_samples = seed, total_steps, token_samples
        self._token_rows = 0
        exists = (self.folder / "run.json").exists()
        if exists and resume_step is None:
            self._set_aside()
        if exists and resume_step is not None:
            self.run = read_run(self.folder)
            self.run.setdefault("resumed", []).append({"step": resume_step, "created": _now(), "command": _command()})
            self._truncate(resume_step)
        else:
            self.run = {
                "record_version": RECORD_VERSION,
                "created": _now(),
                "command": _command(),
                "configuration": {},
                "versions": installed_versions(),
                "resumed": [],
                "evaluations": [],
            }
        self.run["total_steps"] = total_steps
        self._write_run()
        self._files: dict[str, TextIO] = {name: (self.folder / name).open("a", encoding="utf-8") for name in TABLES}

    def _set_aside(self) -> None:
        number = 1
        while (aside := self.folder.with_name(f"{self.folder.name}.{number}")).exists():
            number += 1
        aside.mkdir()
        for name in ("run.json", *TABLES):
            if (self.folder / name).exists():
                (self.folder / name).rename(aside / name)

    def _truncate(self, step: int) -> None:
        for name in TABLES:
            kept = [row for row in read_lines(self.folder / name) if row["step"] <= step]
            if name == "tokens.jsonl":
                self._token_rows = len(kept)
            _write_lines(self.folder / name, map(_line, kept))

    def _write_run(self) -> None:
        text = json.dumps(_portable(json.loads(json.dumps(self.run, default=_plain))), indent=2)
        _write_lines(self.folder / "run.json", [text + "\n"])

    def write_run(self, *, configuration: Mapping[str, Any] | None = None, **entries: Any) -> None:
        """Adds to the configuration in ``run.json``, and replaces others of its entries."""
        self.run["configuration"].update(configuration or {})
        self.run.update(entries)
        self._write_run()

    def choose_token_samples(self, step: int, keep: Sequence[bool]) -> list[int]:
        """The positions in the pool whose tokens are to be recorded at `step`, ascending.

        A seeded choice among the kept samples: it depends on the seed, the step and `keep` alone, and spreads
        ``token_samples`` rows evenly over ``total_steps`` (one per step where that is unknown).
        """
        limit = self._token_samples
        quota = 1
        if self._total_steps:  # so many of the rows are due by the end of this step, less those due before
            quota = limit * step // self._total_steps - limit * (step - 1) // self._total_steps
        kept = [position for position, kept in enumerate(keep) if kept]
        quota = max(0, min(quota, len(kept), limit - self._token_rows))
        return sorted(random.Random(f"{self._seed}:{step}").sample(kept, quota))

    def write_step(
        self,
        step_row: Mapping[str, Any],
        sample_rows: Iterable[Mapping] | Mapping[str, Sequence],
        token_rows: Iterable[Mapping] | None = None,
    ) -> None:
        """Appends one optimiser step.

        Args:
            step_row: values of `STEP_COLUMNS`, those that are known, and any others; ``step`` is required.
                Nested mappings are flattened: ``{"seconds": {"score": s}}`` becomes ``seconds_score``.
                The counts are taken from `sample_rows` where they are missing.
            sample_rows: rows of `SAMPLE_COLUMNS`, or columns of equal length (lists, arrays or tensors).
                ``step`` is filled in.
            token_rows: rows of `TOKEN_COLUMNS`; ``step`` is filled in.
        """
        step_row = flatten(step_row)
        step = step_row["step"]
        samples = [{"step": step, **row} for row in _rows(sample_rows)]
        tokens = [{"step": step, **row} for row in _rows(token_rows)]
        quadrants = [row.get("quadrant") for row in samples]
        counts = {f"count_q{quadrant}": quadrants.count(quadrant) for quadrant in range(5)}
        counts["count_samples"] = len(samples)
        counts["count_kept"] = sum(bool(row.get("keep")) for row in samples)
        counts["count_supplemented"] = sum(bool(row.get("supplemented")) for row in samples)
        self._append("samples.jsonl", samples)
        self._append("tokens.jsonl", tokens)
        self._append("steps.jsonl", [{**step_row, **{k: v for k, v in counts.items() if k not in step_row}}])
        self._token_rows += len(tokens)

    def _append(self, name: str, rows: list[dict]) -> None:
        if rows:
            self._files[name].write("".join(map(_line, rows)))
            self._files[name].flush()

    def close(self) -> None:
        """Closes the files; nothing is lost without it."""
        for file in self._files.values():
            file.close()

    def __enter__(self) -> "RunRecord":
        return self

    def __exit__(self, *_) -> None:
        self.close()


def write_texts(folder: str | Path, rows: Iterable[Mapping], *, limit: int = TEXT_LIMIT) -> Path:
    """Writes ``texts.jsonl`` into a record's folder, once, at the start of a run.

    Args:
        folder: the record's folder.
        rows: mappings with ``id``, ``prompt`` and ``answer``, and ``tag`` if the data has one.
        limit: characters of each text that are kept; a row that lost some has ``truncated`` true.
    """
    path = Path(folder) / "texts.jsonl"

    def cut(row: Mapping) -> dict:
        prompt, answer = str(row["prompt"]), str(row["answer"])
        truncated = max(len(prompt), len(answer)) > limit
        tag = {"tag": row["tag"]} if row.get("tag") is not None else {}
        return {"id": row["id"], "prompt": prompt[:limit], "answer": answer[:limit], "truncated": truncated} | tag

    _write_lines(path, (_line(cut(row)) for row in rows))
    return path
