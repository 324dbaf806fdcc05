"""A tiny model and data on disk, and a folder of its own for each test."""

import json

import pytest

from tests.tiny import byte_model

KINDS = ("clean", "wrong", "trivial")
ROWS = [
    {"question": f"What is {i} + {i}?", "answer": f"It is {2 * i}." * (1 + i % 3), "planted": KINDS[i % 3]}
    for i in range(24)
]


def record(output):
    return [json.loads(line) for line in (output / "record" / "samples.jsonl").open()]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A folder with a tiny random model and a tokenizer of bytes."""
    return byte_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    file = tmp_path_factory.mktemp("data") / "train.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return file


@pytest.fixture
def options(model, data):
    """Options of a run of seconds."""
    fields = ["--prompt-field", "question", "--completion-field", "answer"]
    return ["--model", str(model), "--data", str(data), *fields, "--sample-ratio", "0.25"]


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    """Nothing is fetched, and whatever a command writes by default lands in the test's folder."""
    monkeypatch.setenv("QTUNING_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
