"""`qtuning select`: what each form holds, against the selection computed here from the model itself."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from qtuning_kernels import eu_plane, prune_tokens, triage_samples
from qtuning_kernels.commands import cli
from qtuning_kernels.commands.select import with_answers
from qtuning_kernels.data.tokenization import load_sft_dataset
from tests.tiny_tokenizer import SMOLLM2_TEMPLATE, byte_tokenizer

ROWS = [
    {"question": f"Q{i}: {i} + é?", "answer": f"It is {2 * i}, as ever." * (1 + i % 4), "extra": None}
    for i in range(32)
]


@pytest.fixture(scope="module", params=[None, SMOLLM2_TEMPLATE], ids=["plain", "template"])
def model(request, tmp_path_factory):
    """A folder with a tiny random model, sharp enough that samples differ, and a tokenizer of bytes."""
    folder = tmp_path_factory.mktemp("model")
    tokenizer = byte_tokenizer(request.param)
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512, tie_word_embeddings=True,
        bos_token_id=0, eos_token_id=1, pad_token_id=1, initializer_range=0.2,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def data(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "data.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return file


def written():
    return [json.loads(line) for line in Path("selected.jsonl").read_text(encoding="utf-8").splitlines()]


def select(model, data, *more, fields=("question", "answer")):
    named = ["--prompt-field", fields[0], "--completion-field", fields[1]] if fields else []
    arguments = ["select", "--model", str(model), "--data", str(data), *named, *more]
    arguments += ["--sample-ratio", "0.5", "--token-ratio", "0.5", "--score-dtype", "float32"]
    assert cli.main(arguments) == 0
    return written()


def expected(model, data, fields=("question", "answer")):
    """Per kept sample: number, role, tokens, answer positions, which are kept; from plain `transformers`."""
    tokenizer, causal = AutoTokenizer.from_pretrained(model), AutoModelForCausalLM.from_pretrained(model)
    named = {"prompt_field": fields[0], "completion_field": fields[1]} if fields else {}
    samples, _ = load_sft_dataset(data, tokenizer, **named)
    nlls, entropies = [], []
    for sample in samples:
        ids, labels = torch.tensor([sample["input_ids"]]), torch.tensor(sample["labels"])
        with torch.no_grad():
            log_p = causal(ids).logits[0, :-1].log_softmax(-1)
        answered = labels[1:] >= 0
        nlls.append(-log_p.gather(1, ids[0, 1:, None])[answered, 0])
        entropies.append(-(log_p.exp() * log_p).sum(-1)[answered])
    ends = torch.tensor([0, *map(len, nlls)]).cumsum(0).int()
    nll = torch.cat(nlls)
    plane = eu_plane(nll, torch.cat(entropies), ends)
    triage = triage_samples(plane.ppl, plane.entropy, 0.5)
    mask = prune_tokens(nll, ends, triage, 0.5)
    rows = []
    for i in triage.keep.nonzero().flatten().tolist():
        positions = [p for p, label in enumerate(samples[i]["labels"]) if label >= 0]
        kept = {p for p, k in zip(positions, mask[ends[i] : ends[i + 1]].tolist(), strict=True) if k}
        rows.append((i, int(triage.role[i]), samples[i]["input_ids"], positions, kept))
    assert {role for _, role, *_ in rows} == {2, 4}
    return rows, tokenizer


def test_records_are_the_kept_ones_untouched(model, data, capsys):
    rows, _ = expected(model, data)
    assert select(model, data) == [ROWS[i] for i, *_ in rows]
    answers = sum(len(positions) for _, _, _, positions, _ in rows)
    assert f"16 of 32 samples, {answers} of" in capsys.readouterr().out


def test_tokens_masked(model, data):
    rows, _ = expected(model, data)
    selected = select(model, data, "--write", "tokens")
    assert [row["sample_id"] for row in selected] == [i for i, *_ in rows]
    for row, (_, _, ids, _, kept) in zip(selected, rows, strict=True):
        assert row["input_ids"] == ids
        assert row["labels"] == [token if p in kept else -100 for p, token in enumerate(ids)]


def test_tokens_dropped(model, data):
    """Pruned answer tokens leave the sequence, but for the last one of an answer, the end of turn."""
    rows, _ = expected(model, data)
    selected = select(model, data, "--write", "tokens", "--token-mode", "drop")
    for row, (_, _, ids, positions, kept) in zip(selected, rows, strict=True):
        stay = [p for p in range(len(ids)) if p not in positions or p in kept or p == positions[-1]]
        assert row["input_ids"] == [ids[p] for p in stay]
        assert row["labels"] == [ids[p] if p in kept else -100 for p in stay]


def test_text_loses_the_pruned_tokens(model, data):
    rows, tokenizer = expected(model, data)
    selected = select(model, data, "--write", "text")
    shortened = 0
    for row, (i, role, ids, _, kept) in zip(selected, rows, strict=True):
        assert row["question"] == ROWS[i]["question"]
        assert row["extra"] is None
        if role == 4:
            assert row == ROWS[i]
        else:
            text = tokenizer.decode([ids[p] for p in sorted(kept)], skip_special_tokens=True)
            assert row["answer"] == (text if text.strip() else ROWS[i]["answer"])
            shortened += len(row["answer"]) < len(ROWS[i]["answer"])
    assert shortened > 0


def test_text_of_conversations(model, tmp_path, monkeypatch):
    """Several answers in a record are pruned each in its place; the other turns stay."""
    monkeypatch.chdir(tmp_path)
    records = [
        {
            "messages": [
                {"role": "user", "content": f"Q{i}?"},
                {"role": "assistant", "content": f"First {i} answer"},
                {"role": "user", "content": "And?"},
                {"role": "assistant", "content": f"Second {i * i} answer" * (1 + i % 3)},
            ]
        }
        for i in range(32)
    ]
    file = tmp_path / "chat.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in records))
    rows, tokenizer = expected(model, file, fields=None)
    selected = select(model, file, "--write", "text", fields=None)
    pruned = 0
    for row, (i, role, ids, positions, kept) in zip(selected, rows, strict=True):
        answers, last = [], None
        for p in positions:
            if last != p - 1:
                answers.append([])
            answers[-1] += [ids[p]] if p in kept else []
            last = p
        texts = [tokenizer.decode(answer, skip_special_tokens=True) for answer in answers]
        original = records[i]["messages"]
        if role == 4 or len(texts) != 2 or not all(text.strip() for text in texts):
            assert row == records[i]
            continue
        pruned += 1
        assert [m["content"] for m in row["messages"] if m["role"] == "assistant"] == texts
        assert [m for m in row["messages"] if m["role"] == "user"] == [original[0], original[2]]
    assert pruned > 0


@pytest.mark.parametrize(
    ("value", "answers", "result"),
    [
        ("old", ["new"], "new"),
        ("old", ["a", "b"], None),
        ("old", [" "], None),
        (7, ["7"], "7"),
        (
            [{"from": "human", "value": "q"}, {"from": "gpt", "value": "old"}],
            ["new"],
            [{"from": "human", "value": "q"}, {"from": "gpt", "value": "new"}],
        ),
        ([{"role": "assistant", "content": "old"}], [], None),
        ([{"role": "assistant", "content": "old"}], ["a", "b"], None),
        ([{"role": "assistant", "content": None, "tool_calls": [1]}], ["a"], None),
        ([{"from": "function_call", "value": "{}"}], ["a"], None),
        (
            [{"role": "assistant", "content": "x", "weight": 0}, {"role": "assistant", "content": "old"}],
            ["new"],
            [{"role": "assistant", "content": "x", "weight": 0}, {"role": "assistant", "content": "new"}],
        ),
    ],
)
def test_with_answers(value, answers, result):
    before = json.dumps(value)
    assert with_answers(value, answers) == result
    assert json.dumps(value) == before


def test_output_is_whole_or_not_there(model, data, monkeypatch):
    """A failure while writing leaves what stood there before."""
    before = select(model, data)
    monkeypatch.setattr("qtuning_kernels.commands.select._record", lambda *_: 1 / 0)
    arguments = ["select", "--model", str(model), "--data", str(data)]
    assert cli.main([*arguments, "--prompt-field", "question", "--completion-field", "answer"]) == 1
    assert written() == before


def test_other_policies(model, data, capsys):
    """Random draws by the seed, and longest needs no score; weights, and what only a run has, are refused."""
    draws = [select(model, data, "--policy", "random", "--seed", seed) for seed in ("1", "1", "2")]
    assert draws[0] == draws[1] != draws[2]
    assert all(len(draw) == 16 for draw in draws)
    longest = select(model, data, "--policy", "longest")
    assert sorted(len(row["answer"]) for row in ROWS)[16:] == sorted(len(row["answer"]) for row in longest)
    assert "scoring" not in capsys.readouterr().out
    for policy in ("dft", "infobatch", "tailsft"):
        arguments = ["select", "--model", str(model), "--data", str(data), "--policy", policy]
        assert cli.main([*arguments, "--prompt-field", "question", "--completion-field", "answer"]) == 1
        assert "is one of training; accepted: one that keeps or prunes by one scoring" in capsys.readouterr().err


def test_tokens_against_a_reference(model, data):
    """The scores that `qtuning score` wrote of the reference, and the reference itself, choose the same tokens."""
    fields = ["--prompt-field", "question", "--completion-field", "answer", "--score-dtype", "float32"]
    other = data.parent / "other"
    causal = AutoModelForCausalLM.from_pretrained(model)
    with torch.no_grad():
        causal.get_input_embeddings().weight[5:60] *= 0.5
    causal.save_pretrained(other)
    AutoTokenizer.from_pretrained(model).save_pretrained(other)
    assert cli.main(["score", "--model", str(other), "--data", str(data), *fields]) == 0
    write = ("--policy", "rho1", "--write", "tokens")
    by_file = select(model, data, *write, "--reference-scores", "plane.parquet")
    by_model = select(model, data, *write, "--reference-model", str(other))
    assert by_file == by_model
    kept, total = (sum(len([x for x in row["labels"] if x >= 0]) for row in rows)
                   for rows in (by_file, select(model, data, "--policy", "full", "--write", "tokens")))  # fmt: skip
    assert kept == total // 2
