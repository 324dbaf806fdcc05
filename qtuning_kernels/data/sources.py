"""Reading records: JSON, CSV and Parquet files, local folders, and data sets of the Hugging Face hub.

JSON and CSV are parsed by Python's own modules, not by `datasets`, whose readers report neither file nor line, and turn
text that looks like a date or a number into one. Everything else goes through `datasets`.
"""

import csv
import io
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
from datasets import Dataset, DatasetDict, load_dataset, load_from_disk

_DELIMITERS = {".csv": ",", ".tsv": "\t"}
_COMPRESSIONS = (".gz", ".zst", ".bz2")
_PARQUET = ".parquet"
SUFFIXES = (".json", ".jsonl", ".ndjson", *_DELIMITERS, _PARQUET)
_ACCEPTED = f"{', '.join(SUFFIXES)}, also compressed: {', '.join(_COMPRESSIONS)}"


class DataError(ValueError):
    """A data set that cannot be used as it is; the message names the file and the line or record."""


@dataclass
class Records:
    """Records in source order, each with the location that it came from.

    Attributes:
        source: the file, folder or hub name, as it was given.
        columns: every column that occurs, in order of first appearance.
        rows: list of dicts, or a `datasets.Dataset`.
    """

    source: str
    columns: list[str]
    rows: list[dict[str, Any]] | Dataset
    _locations: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter(self.rows)

    def location(self, index: int) -> str:
        """Of record `index` (0-based): ``file:line``, or ``source, record n`` (1-based)."""
        return self._locations[index] if self._locations else f"{self.source}, record {index + 1}"

    def column(self, name: str) -> list[Any]:
        """One value per record; None where the record lacks it."""
        if isinstance(self.rows, Dataset):
            return list(self.rows[name])
        return [row.get(name) for row in self.rows]


def read_records(data: str | Path, *, split: str = "train", config: str | None = None) -> Records:
    """Read a data set.

    Args:
        data: a file of JSON records, lines or an array of them, as ``{"data": [...]}`` too; a ``.csv``, ``.tsv`` or
            ``.parquet`` file; JSON and CSV also compressed (``.gz``, ``.zst``, ``.bz2``); a folder that holds such
            files or was written by `Dataset.save_to_disk`; or the name of a data set on the hub.
        split: the split to take from a folder or a hub data set.
        config: the configuration of a hub data set that has several.

    Raises:
        FileNotFoundError: `data` reads as a path that does not exist.
        DataError: the content cannot be read; names the file, and the line if there is one.
    """
    path = Path(data).expanduser()
    if path.is_file():
        records = _read_files([path], str(data))
    elif path.is_dir():
        records = _read_folder(path, split)
    elif reads_as_path(str(data)):
        raise FileNotFoundError(f"data {str(data)!r}: no such file or folder")
    else:
        records = _from_dataset(_load_hub(str(data), split, config), str(data))
    if not len(records):
        raise DataError(f"{data}: holds no record")
    return records


def reads_as_path(data: str) -> bool:
    """Hub names are ``name`` or ``owner/name``; anything else can only have meant a path."""
    return data.startswith((".", "/", "~")) or data.count("/") > 1 or suffix_of(Path(data)) in SUFFIXES


def suffix_of(path: Path) -> str:
    """What kind of file it is, in lower case and without the suffix of a compression."""
    path = Path(path.name.lower())
    return (path.with_suffix("") if path.suffix in _COMPRESSIONS else path).suffix


def _read_folder(folder: Path, split: str) -> Records:
    if (folder / "dataset_dict.json").exists() or (folder / "state.json").exists():
        saved = load_from_disk(str(folder))
        if isinstance(saved, DatasetDict):
            if split not in saved:
                raise DataError(f"{folder}: has no split {split!r}; it has {', '.join(saved)}")
            saved = saved[split]
        return _from_dataset(saved, str(folder))
    files = sorted(f for f in folder.rglob("*") if suffix_of(f) in SUFFIXES and f.is_file())
    if not files:
        raise DataError(f"{folder}: holds no file that ends in {_ACCEPTED}")
    # the hub's convention: a file or a folder on its way names the split it belongs to, whole or up to a dash
    of_split = [f for f in files if _names_split(f.relative_to(folder), split)]
    others = [f for f in files if any(_names_split(f.relative_to(folder), s) for s in _SPLITS)]
    if not of_split and others:
        raise DataError(f"{folder}: no file of split {split!r} among {', '.join(f.name for f in others)}")
    return _read_files(of_split or files, str(folder))


_SPLITS = ("train", "test", "validation", "valid", "val", "eval", "dev")


def _names_split(path: Path, split: str) -> bool:
    parts = [*path.parts[:-1], path.name.split(".")[0]]
    return any(part == split or part.startswith((f"{split}-", f"{split}_")) for part in parts)


def _read_files(files: list[Path], source: str) -> Records:
    unknown = [f.name for f in files if suffix_of(f) not in (*SUFFIXES, "")]
    if unknown:
        raise DataError(f"{source}: {unknown[0]!r} does not end in one of {_ACCEPTED}")
    parquet = [suffix_of(f) == _PARQUET for f in files]
    if all(parquet):
        return _from_dataset(_load_parquet(files, source), source)
    if any(parquet):
        raise DataError(f"{source}: holds Parquet and other files at once; name the file to read")
    rows, locations = [], []
    for file in files:
        for where, row in _read_text(file):
            if not isinstance(row, dict):
                raise DataError(f"{where}: a record must be an object, not {type(row).__name__}")
            rows.append(row)
            locations.append(where)
    columns = list(dict.fromkeys(key for row in rows for key in row))
    return Records(source, columns, rows, locations)


def _read_text(file: Path) -> Iterator[tuple[str, Any]]:
    """Yield (location, record) of a table, an array of records, or one record per line."""
    try:
        with pyarrow.input_stream(str(file)) as stream:  # the suffix names the compression
            raw = stream.read()
    except OSError as error:
        raise DataError(f"{file}: cannot be read: {first_line(error)}") from None
    try:
        text = raw.decode("utf-8-sig")  # editors on Windows write the mark
    except UnicodeDecodeError as error:
        number = raw.count(b"\n", 0, error.start) + 1
        raise DataError(
            f"{file}:{number}: not UTF-8: byte 0x{raw[error.start]:02x} at offset {error.start}, {error.reason}"
        ) from None
    if not text.strip():
        raise DataError(f"{file}: the file is empty")
    if suffix_of(file) in _DELIMITERS:
        yield from _read_table(file, text)
        return
    try:  # whatever the suffix says
        whole = json.loads(text)
    except (ValueError, RecursionError) as error:
        if text.lstrip().startswith("["):
            raise _broken(file, getattr(error, "lineno", 1), error) from None
    else:
        if isinstance(whole, dict) and isinstance(whole.get("data"), list):
            whole = whole["data"]
        elif "\n" in text.strip():  # one line is JSON Lines
            whole = whole if isinstance(whole, list) else [whole]
        if isinstance(whole, list):
            yield from ((f"{file}, record {i}", row) for i, row in enumerate(whole, 1))
            return
    # not splitlines(): JSON strings may hold U+2028 and other line breaks
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise _broken(file, number, error) from None
            yield f"{file}:{number}", row


def _read_table(file: Path, text: str) -> Iterator[tuple[str, dict[str, str]]]:
    csv.field_size_limit(sys.maxsize)
    rows = csv.DictReader(io.StringIO(text, newline=""), delimiter=_DELIMITERS[suffix_of(file)], strict=True)
    try:
        for row in rows:
            where = f"{file}:{rows.line_num}"  # the last line of the record
            if None in row or None in row.values():
                raise DataError(f"{where}: not as many fields as the {len(rows.fieldnames or ())} of the first line")
            yield where, row
    except csv.Error as error:
        raise DataError(f"{file}:{rows.line_num}: broken table: {error}") from None


def _broken(file: Path, line: int, error: Exception) -> DataError:
    column = f", column {error.colno}" if isinstance(error, json.JSONDecodeError) else ""
    reason = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
    return DataError(f"{file}:{line}: broken JSON{column}: {reason}")


def _load_parquet(files: list[Path], source: str) -> Dataset:
    tables = []
    for file in files:
        try:
            tables.append(pyarrow.parquet.read_table(file, memory_map=True))
        except (pyarrow.ArrowException, OSError) as error:
            raise DataError(f"{file}: not a readable Parquet file: {first_line(error)}") from None
    try:
        return Dataset(pyarrow.concat_tables(tables, promote_options="default"))
    except pyarrow.ArrowException as error:
        raise DataError(f"{source}: its Parquet files disagree on columns: {first_line(error)}") from None


def _load_hub(name: str, split: str, config: str | None) -> Dataset:
    try:
        return load_dataset(name, config, split=split)
    except Exception as error:  # a dozen exception types, from the network to the data set's own script
        reason = f"neither a local file or folder nor a data set that the hub could serve: {first_line(error)}"
        raise DataError(f"data {name!r}: {reason}") from error


def _from_dataset(dataset: Dataset, source: str) -> Records:
    return Records(source, dataset.column_names, dataset)


def first_line(error: BaseException) -> str:
    """The first line of a library's error message, or the error's name."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
