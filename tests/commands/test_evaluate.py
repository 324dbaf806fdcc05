"""`qtuning eval`: tasks of lm-evaluation-harness from files, on a tiny model."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from qtuning_kernels.commands import cli
from tests.tiny_tokenizer import byte_tokenizer

TASK = Path(__file__).parents[2] / "examples" / "sums.yaml"


def sums(count):
    choices = [[str(i + 1 + shift) for shift in (-1, 0, 2, 10)] for i in range(count)]
    return [{"question": f"What is {i} + 1?", "choices": each, "answer": i % 4} for i, each in enumerate(choices)]


def accuracy(model, rows, begin=lambda question: f"{question} "):
    """How often the choice of the highest log-probability is the right one, without the harness."""
    causal, tokenizer = AutoModelForCausalLM.from_pretrained(model), AutoTokenizer.from_pretrained(model)
    right = 0
    for row in rows:
        scores = []
        for choice in row["choices"]:
            prompt = tokenizer(begin(row["question"]).rstrip(" ")).input_ids
            ids = torch.tensor([tokenizer(begin(row["question"]) + choice).input_ids])
            with torch.no_grad():
                logp = causal(ids).logits[0, :-1].double().log_softmax(-1)
            scores.append(logp.gather(1, ids[0, 1:, None])[len(prompt) - 1 :].sum().item())
        right += scores.index(max(scores)) == row["answer"]
    return right / len(rows)


@pytest.fixture
def rows(tmp_path, monkeypatch):
    """What the task asks, its file and data in the current folder."""
    pytest.importorskip("lm_eval", reason="needs the eval extra: lm_eval")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    made = sums(24)
    Path("sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in made))
    shutil.copy(TASK, "task.yaml")
    return made


def test_accuracy_of_a_local_task(model, rows, capsys):
    assert cli.main(["eval", str(model), "--tasks", "task.yaml", "--output", "found.json"]) == 0
    expected = accuracy(model, rows)
    assert 0 < expected < 1
    shown = capsys.readouterr().out
    assert f" {expected:.4f}".rstrip("0") in shown
    assert "Stderr" in shown
    found = json.loads(Path("found.json").read_text())
    assert found["model"] == str(model)
    assert found["results"]["sums"]["acc,none"] == pytest.approx(expected)
    stderr = math.sqrt(expected * (1 - expected) / (len(rows) - 1))
    assert found["results"]["sums"]["acc_stderr,none"] == pytest.approx(stderr)


def test_a_question_stands_in_the_chat_template_where_that_is_asked_for(model, rows, capsys):
    command = ["eval", "chat", "--tasks", "task.yaml", "--apply-chat-template", "--output", "found.json"]
    shutil.copytree(model, "chat")
    assert cli.main(command) == 1
    assert "--apply-chat-template: the tokenizer of chat has no chat template" in capsys.readouterr().err
    tokenizer = byte_tokenizer()
    tokenizer.save_pretrained("chat")
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    assert cli.main(command) == 0
    assert torch.equal(torch.rand(3), expected)  # the harness would seed PyTorch anew

    def turn(question):
        message = [{"role": "user", "content": question}]
        return tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)

    found = json.loads(Path("found.json").read_text())["results"]["sums"]["acc,none"]
    assert found == pytest.approx(accuracy(model, rows, turn))
    assert accuracy(model, rows, turn) != accuracy(model, rows)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tasks", "none.yaml"], "--tasks none.yaml: no such file"),
        (["--tasks", "bad.yaml", "--output", "bad.yaml"], "output 'bad.yaml' is a file of the input 'bad.yaml'"),
    ],
)
def test_what_cannot_be_evaluated_is_refused_before_the_model_is_loaded(arguments, message, model, monkeypatch, capsys):
    pytest.importorskip("lm_eval", reason="needs the eval extra: lm_eval")
    monkeypatch.setattr("qtuning_kernels.commands.evaluate.load_model", lambda *_: pytest.fail("loaded"))
    Path("bad.yaml").write_text("a: 1\n")
    assert cli.main(["eval", str(model), *arguments]) == 1
    assert message in capsys.readouterr().err
