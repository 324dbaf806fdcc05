"""Reading: every kind of source gives the same records, and every kind of damage names its place."""

import bz2
import gzip
import json

import pyarrow
import pytest
from datasets import Dataset, DatasetDict

from qtuning_kernels.data.sources import DataError, read_records

ROWS = [
    {"prompt": "p1", "completion": "c1"},
    {"prompt": "p2\u2028", "completion": "c2", "tag": "2024-01-01"},
]
FILLED = [{"tag": None} | row for row in ROWS]  # Arrow knows no absent key


def write(path, text):
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def json_lines(rows):
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


# name -> what is in it
TEXTS = {
    "a.JSONL": json_lines(ROWS),
    "no-suffix": json_lines(ROWS),
    "array.jsonl": json.dumps(ROWS, indent=1),
    "data.json": json.dumps({"version": "1", "data": ROWS}),
    "a.jsonl.gz": gzip.compress(json_lines(ROWS).encode()),
    "a.JSON.bz2": bz2.compress(json.dumps(ROWS).encode()),
    "a.jsonl.zst": pyarrow.compress(json_lines(ROWS).encode(), "zstd", asbytes=True),
}


@pytest.fixture(
    params=["jsonl", "json-array", "json-lines-in-json", "blank-lines", "bom", "parquet", "saved", "dict", *TEXTS]
)
def source(request, tmp_path):
    name = request.param
    if name == "parquet":
        Dataset.from_list(FILLED).to_parquet(tmp_path / "a.parquet")
        return tmp_path / "a.parquet"
    if name == "saved":
        Dataset.from_list(FILLED).save_to_disk(tmp_path / "saved")
        return tmp_path / "saved"
    if name == "dict":
        DatasetDict(train=Dataset.from_list(FILLED), test=Dataset.from_list(ROWS[:1])).save_to_disk(tmp_path / "d")
        return tmp_path / "d"
    if name in TEXTS:
        return write(tmp_path / name, TEXTS[name])
    text = {
        "jsonl": json_lines(ROWS),
        "json-array": json.dumps(ROWS, indent=2),
        "json-lines-in-json": json_lines(ROWS),
        "blank-lines": "\n" + json_lines(ROWS).replace("\n", "\r\n\r\n"),
        "bom": "\ufeff" + json_lines(ROWS),
    }[name]
    return write(tmp_path / ("a.json" if name.startswith("json-") else "a.jsonl"), text)


def test_every_source_gives_the_same_records(source):
    records = read_records(source)
    rows = [{key: value for key, value in row.items() if value is not None} for row in records]
    assert rows == ROWS
    assert sorted(records.columns) == ["completion", "prompt", "tag"]
    # a reader that infers types would have made a timestamp of it
    assert records.column("tag") == [None, "2024-01-01"]
    assert len(records) == 2


def test_a_folder_takes_the_files_of_the_split(tmp_path):
    write(tmp_path / "train-00001.jsonl", json_lines(ROWS[1:]))
    write(tmp_path / "train-00000.jsonl", json_lines(ROWS[:1]))
    write(tmp_path / "test.jsonl", json_lines(ROWS[:1]))
    write(tmp_path / "notes.txt", "not data")
    assert list(read_records(tmp_path)) == ROWS
    assert list(read_records(tmp_path, split="test")) == ROWS[:1]
    with pytest.raises(DataError, match=r"no file of split 'validation' among test.jsonl"):
        read_records(tmp_path, split="validation")


def test_locations_count_lines_not_records(tmp_path):
    records = read_records(write(tmp_path / "a.jsonl", "\n\n" + json_lines(ROWS)))
    assert records.location(1) == f"{tmp_path}/a.jsonl:4"


@pytest.mark.parametrize("name", ["missing.jsonl", "./missing", "a/b/c", "/nowhere", "~/nowhere.parquet"])
def test_missing_file(name):
    with pytest.raises(FileNotFoundError, match="no such file or folder"):
        read_records(name)


def test_a_name_that_is_neither_local_nor_on_the_hub(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    with pytest.raises(DataError, match=r"'no-owner/no-name': neither a local file or folder nor a data set"):
        read_records("no-owner/no-name")


DAMAGED = {
    "broken line": ("a.jsonl", json_lines(ROWS) + '{"prompt": "x", \n', r"a.jsonl:3: broken JSON, column 17"),
    "two on a line": ("a.jsonl", '{"a": 1} {"a": 2}\n', r"a.jsonl:1: broken JSON, column 10: Extra data"),
    "broken array": ("a.json", '[\n{"prompt": "x"},\n{"prompt" "y"}]', r"a.json:3: broken JSON, column 11"),
    "deep nesting": ("a.jsonl", "{}\n" + "[" * 100_000 + "\n", r"a.jsonl:2: broken JSON"),
    "not an object": ("a.jsonl", '{"a": 1}\n[1, 2]\n', r"a.jsonl:2: a record must be an object, not list"),
    "latin-1": ("a.jsonl", b'{"a": 1}\n{"a": "caf\xe9"}\n', r"a.jsonl:2: not UTF-8: byte 0xe9 at offset 19"),
    "utf-16": ("a.jsonl", '{"a": 1}\n'.encode("utf-16"), r"a.jsonl:1: not UTF-8: byte 0xff at offset 0"),
    "empty": ("a.jsonl", "", r"a.jsonl: the file is empty"),
    "blank": ("a.json", " \n\n", r"a.json: the file is empty"),
    "no records": ("a.json", "[]", r"a.json: holds no record"),
    "not parquet": ("a.parquet", "PAR1 and then nothing", r"a.parquet: not a readable Parquet file"),
    "unknown suffix": (
        "a.txt",
        "a,b\n",
        r"'a.txt' does not end in one of .json, .jsonl, .ndjson, .csv, .tsv, .parquet",
    ),
    "not gzip": ("a.jsonl.gz", "{}", r"a.jsonl.gz: cannot be read: "),
    "cut gzip": ("a.jsonl.gz", gzip.compress(json_lines(ROWS * 50).encode())[:-20], r"a.jsonl.gz: cannot be read: "),
    "short row": ("a.csv", "a,b\n1,2\n3\n", r"a.csv:3: not as many fields as the 2 of the first line"),
    "long row": ("a.tsv", "a\tb\n1\t2\t3\n", r"a.tsv:2: not as many fields as the 2"),
    "open quote": ("a.csv", 'a,b\n1,"2\n', r"a.csv:1: broken table: unexpected end of data"),
}


@pytest.mark.parametrize(("name", "content", "message"), DAMAGED.values(), ids=DAMAGED.keys())
def test_damage_names_its_place(tmp_path, name, content, message):
    with pytest.raises(DataError, match=message):
        read_records(write(tmp_path / name, content))


@pytest.mark.parametrize(("name", "delimiter"), [("a.csv", ","), ("a.TSV", "\t"), ("a.csv.gz", ",")])
def test_tables_hold_text(tmp_path, name, delimiter):
    """A reader that infers types turns 007 into 7, and NA into nothing."""
    text = "\ufeff" + 'question,answer\r\n"a, ""b""\nc",007\r\nNA,2024-01-01\r\n'.replace(",", delimiter)
    text = text.replace(f"a{delimiter} ", "a, ")
    records = read_records(write(tmp_path / name, gzip.compress(text.encode()) if name.endswith("gz") else text))
    assert list(records) == [{"question": 'a, "b"\nc', "answer": "007"}, {"question": "NA", "answer": "2024-01-01"}]
    assert records.location(1) == f"{tmp_path / name}:4"


def test_a_folder_of_several_kinds(tmp_path):
    write(tmp_path / "train-0.JSONL", json_lines(ROWS[:1]))
    write(tmp_path / "train-1.csv", "prompt,completion\np3,c3\n")
    assert list(read_records(tmp_path)) == [ROWS[0], {"prompt": "p3", "completion": "c3"}]


def test_folders_that_cannot_be_read(tmp_path):
    with pytest.raises(DataError, match="holds no file that ends in"):
        read_records(tmp_path)
    write(tmp_path / "a.jsonl", json_lines(ROWS))
    Dataset.from_list(ROWS).to_parquet(tmp_path / "b.parquet")
    with pytest.raises(DataError, match="Parquet and other files at once"):
        read_records(tmp_path)
