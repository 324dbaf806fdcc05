"""Reads the record of a run in whatever state it was left."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qtuning_kernels.run_record.schema import RECORD_VERSION, TABLES, TEXT_COLUMNS

if TYPE_CHECKING:
    import pandas


class RecordError(RuntimeError):
    """A record cannot be read; the message has the reason and the remedy."""


def flatten(row: Mapping[str, Any]) -> dict[str, Any]:
    """``{"seconds": {"score": 1.0}}`` as ``{"seconds_score": 1.0}``: a table has no nested cells."""
    flat = {}
    for key, value in row.items():
        if isinstance(value, Mapping):
            flat.update({f"{key}_{inner}": item for inner, item in value.items()})
        else:
            flat[key] = value
    return flat


def read_lines(path: Path) -> Iterable[dict]:
    """The rows of a JSON Lines file; what a kill left of the last one is dropped.

    Raises:
        RecordError: a line before the last is not a JSON object.
    """
    if not path.exists():
        return
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.endswith(b"\n"):
                return
            try:
                row = json.loads(line)
                if not isinstance(row, dict):
                    raise ValueError("not an object")
                if path.name in TABLES and not isinstance(row.get("step"), int):
                    raise ValueError("it has no step")
            except ValueError as error:
                if not file.read(1):  # a machine that lost power can leave a last line of any content
                    return
                raise RecordError(f"{path}, line {number}: not a row of a record ({error})") from error
            yield row


@dataclass
class Record:
    """A record as it was read: `run` is ``run.json``, the others are one DataFrame per file.

    `notices` lists what is missing or was dropped, for a reader of the report.
    """

    folder: Path
    run: dict[str, Any]
    samples: "pandas.DataFrame"
    steps: "pandas.DataFrame"
    tokens: "pandas.DataFrame"
    texts: "pandas.DataFrame"
    notices: list[str] = field(default_factory=list)


def record_folder(run: str | Path) -> Path:
    """The record's folder, given it or the run's output folder.

    Raises:
        RecordError: neither holds a record.
    """
    run = Path(run)
    for folder in (run / "record", run):
        if (folder / "run.json").is_file():
            return folder
    what = "holds no record" if run.exists() else "does not exist"
    raise RecordError(f"{run} {what}: expected the output folder of a run, with record/run.json in it")


def read_run(folder: str | Path) -> dict[str, Any]:
    """``run.json`` of a record.

    Raises:
        RecordError: it is missing, damaged, or of a later version than this package reads.
    """
    path = record_folder(folder) / "run.json"
    try:
        run = json.loads(path.read_text(encoding="utf-8"))
        version = run["record_version"]
        if not isinstance(version, int):
            raise TypeError(f"record_version {version!r} is not an integer")
    except (ValueError, KeyError, TypeError) as error:
        raise RecordError(f"{path} is not the head of a record: {error!r}") from error
    if version > RECORD_VERSION:
        raise RecordError(
            f"{path} has record_version {version}; this version of qtuning-kernels reads up to "
            f"{RECORD_VERSION}. Update the package to read it."
        )
    absent: dict[str, Any] = dict.fromkeys(("created", "command", "total_steps"))
    return absent | {"configuration": {}, "versions": {}, "resumed": [], "evaluations": []} | run


def read_record(run: str | Path) -> Record:
    """Reads the record of a run in whatever state it was left: running, killed or empty.

    Args:
        run: the run's output folder, or the record's folder.

    Raises:
        RecordError: there is no record, it is damaged, or it is of a later version.
    """
    folder = record_folder(run)
    head = read_run(folder)
    notices = []
    rows = {name: list(read_lines(folder / name)) for name in TABLES}
    last = max((row["step"] for row in rows["steps.jsonl"]), default=0)
    complete = {name: [flatten(row) for row in table if row["step"] <= last] for name, table in rows.items()}
    if len(complete["samples.jsonl"]) < len(rows["samples.jsonl"]):
        notices.append(f"The run ended inside step {last + 1}, whose rows are left out.")
    if not rows["steps.jsonl"]:
        notices.append("The run ended before its first optimiser step was recorded.")
    elif (head["total_steps"] or 0) > last:
        notices.append(f"{last} of {head['total_steps']} steps are recorded: the run is under way, or it ended early.")
    tables = {name.removesuffix(".jsonl"): _table(complete[name], columns) for name, columns in TABLES.items()}
    texts = _table(list(read_lines(folder / "texts.jsonl")), TEXT_COLUMNS)
    return Record(folder=folder, run=head, **tables, texts=texts, notices=notices)


_NOT_NUMBERS = frozenset({"id", "token_ids", "tokens", "nll", "score", "keep", "prompt", "answer", "truncated", "tag"})
_INFINITY = {"Infinity": float("inf"), "-Infinity": float("-inf")}


def _floats(cell: Any) -> Any:
    if not isinstance(cell, list):
        return cell
    return [float("nan") if item is None else float(item) for item in cell]


def _table(rows: list[dict], columns: tuple[str, ...]) -> "pandas.DataFrame":
    """A DataFrame with at least `columns`; a cell or a column that the rows lack is NaN."""
    import pandas

    names = dict.fromkeys((*columns, *(key for row in rows for key in row)))
    table = pandas.DataFrame(rows, columns=list(names))
    for name in table.columns.difference(list(_NOT_NUMBERS)):
        cells = table[name].map(lambda cell: _INFINITY.get(cell, cell) if isinstance(cell, str) else cell)
        numbers = pandas.to_numeric(cells, errors="coerce")
        table[name] = numbers if numbers.notna().sum() == cells.notna().sum() else cells
    for name in table.columns.intersection(["nll", "score"]):
        table[name] = table[name].map(_floats)
    return table
