"""A tiny model and data on disk, and a folder of its own for each test."""

import json

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tests.tiny_tokenizer import byte_tokenizer

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
    folder = tmp_path_factory.mktemp("model")
    tokenizer = byte_tokenizer(None)
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256, tie_word_embeddings=True,
        bos_token_id=0, eos_token_id=1, pad_token_id=1,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


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
