"""The benchmark of quality: planted flaws, which runs are made, and whole runs of a tiny model."""

import json
import runpy
import subprocess
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
import transformers

from benchmarks import quality, quality_grid, quality_pages
from benchmarks.common import ROOT, read_rows
from benchmarks.quality_data import CHAT_TEMPLATE, CONDITIONS, file_split, generated_split, plant, tokenized
from benchmarks.quality_grid import Inputs, Setting
from benchmarks.quality_measures import result_tokens, token_measures
from benchmarks.quality_run import counts_until, harness, qtuning_config, run
from benchmarks.quality_statistics import curves
from qtuning_kernels.data.samples import to_sample
from qtuning_kernels.pruning.policies import make_policy
from tests.tiny_tokenizer import byte_tokenizer

TASKS = ROOT / "benchmarks" / "tasks"
BASE = Setting("file/data", "clean", "full", 1.0, 1.0, 0, 1e-3, 4, pool=4, records=24, held_out=6)


def records(count=40):
    return [
        {"question": f"q {i}?", "answer": f"{i // 4}", "task": "ab"[i % 2], "planted": "clean"} for i in range(count)
    ]


@pytest.mark.parametrize("condition", CONDITIONS)
def test_flaws_are_planted_in_their_shares(condition):
    clean = records(200)
    planted = plant(clean, condition, 3)
    counts = Counter(record["planted"] for record in planted)
    shares = CONDITIONS[condition]
    assert counts == {kind: round(share * 200) for kind, share in {**shares, "clean": 1 - sum(shares.values())}.items()}
    assert planted == plant(clean, condition, 3)
    for before, after in zip(clean, planted, strict=True):
        if after["planted"] == "clean":
            assert after == before


def test_an_exchanged_answer_is_another_one_of_the_same_task():
    """Four records of each answer, so that a plain rotation would give many their own answer back."""
    clean = records(80)
    planted = plant(clean, "exchanged40", 1)
    changed = [(a, b) for a, b in zip(clean, planted, strict=True) if b["planted"] == "exchanged"]
    assert len(changed) == 32
    assert all(a["question"] == b["question"] and a["answer"] != b["answer"] for a, b in changed)
    for task in "ab":
        own = [(a["answer"], b["answer"]) for a, b in changed if a["task"] == task]
        assert Counter(a for a, _ in own) == Counter(b for _, b in own)


def test_answers_that_are_mostly_the_same_are_not_exchanged():
    same = [record | {"answer": "Yes"} for record in records()]
    with pytest.raises(ValueError, match=r"half of the answers of task '[ab]' are the same: 'Yes'"):
        plant(same, "exchanged40", 0)


def test_duplicates_repeat_clean_records_that_stay():
    planted = plant(records(200), "duplicates50", 0)
    clean = {record["question"]: record["answer"] for record in planted if record["planted"] == "clean"}
    duplicates = [record for record in planted if record["planted"] == "duplicate"]
    sources = Counter()
    for record in duplicates:
        (source,) = [question for question in clean if record["question"].endswith(". " + question)
                     or record["question"].endswith(": " + question)]  # fmt: skip
        assert record["answer"] == clean[source]
        sources[source] += 1
    assert len(sources) == 16
    assert len({record["question"] for record in duplicates}) == 100


def test_generated_records_are_distinct_and_held_out_ones_fixed():
    pytest.importorskip("reasoning_gym")
    (train, held_out), (other, again) = generated_split(60, 20, 0), generated_split(60, 20, 1)
    assert held_out == again
    assert train != other
    questions = [record["question"] for record in train + held_out]
    assert len(set(questions)) == 80
    assert Counter(record["task"] for record in train) == dict.fromkeys({r["task"] for r in train}, 15)


def test_the_tokens_of_the_result_are_those_behind_its_mark():
    tokenizer = byte_tokenizer()
    labels = tokenizer("1 + 1 = 2 #### 2\n#### 12<|im_end|>").input_ids
    marked = result_tokens(labels, tokenizer, "####")
    assert tokenizer.decode([x for x, mark in zip(labels, marked, strict=True) if mark]) == " 12<|im_end|>"
    assert not any(result_tokens(labels, tokenizer, "Answer:"))
    assert not any(result_tokens(labels, tokenizer, ""))


def test_options_of_the_settings_and_of_the_policy_find_their_place():
    config = qtuning_config(replace(BASE, policy="qtuning", options='{"token_mode": "drop", "rescore_every": 2}'))
    assert (config.token_mode, config.rescore_every, dict(config.policy_options)) == ("drop", 2, {})
    config = qtuning_config(replace(BASE, policy="beyond_ll", options='{"q": 0.5}'))
    assert dict(config.policy_options) == {"q": 0.5}


def row(setting, minutes=2.0, machine="here", nll=1.0, step=None):
    values = {name: str(value) for name, value in vars(setting).items()}
    step = setting.steps if step is None else step
    return values | {"run_minutes": str(minutes), "machine": machine, "nll": str(nll), "step": str(step)}


def test_a_row_stands_under_the_columns_of_those_before_it(tmp_path):
    lists = {"sample_nll": [1.0], "sample_tokens": [2], "sample_correct": [True]}
    for point in ({"step": 4, "machine": "here", "minutes": 2.0}, {"minutes": 3.0, "machine": "there", "step": 5}):
        quality.append(tmp_path / "quality.csv", BASE, [point | lists])
    rows = [(row["step"], row["machine"], row["minutes"]) for row in read_rows(tmp_path / "quality.csv")]
    assert rows == [("4", "here", "2"), ("5", "there", "3")]
    assert not (tmp_path / "quality_harness.csv").exists()
    with pytest.raises(ValueError, match="unknown"):
        quality.append(tmp_path / "quality.csv", BASE, [{"unknown": 1, "step": 4} | lists])


def test_tasks_of_the_harness_are_measured_once_a_run(inputs, one_thread, monkeypatch):
    """The runs are otherwise the same ones."""
    monkeypatch.setattr("benchmarks.quality_run.POINTS", (2,))
    monkeypatch.setattr("benchmarks.quality_run.HARNESS_STEP", 2)
    calls = []

    def results(model, tokenizer, tasks, **options):
        calls.append((model.training, tasks, options))
        model.eval()
        return {
            "results": {"sums": {"acc,none": 0.5, "acc_stderr,none": 0.1}},
            "samples": {"sums": [{"doc_id": i, "acc": float(i < 2)} for i in (2, 0, 1, 3)]},
        }

    monkeypatch.setattr("qtuning_kernels.commands.evaluate.harness_results", results)
    setting = replace(BASE, policy="qtuning", sample_ratio=0.5)
    with_tasks, without = run(setting, replace(inputs, tasks=("a.yaml",))), run(setting, inputs)
    assert [point.pop("harness", None) for point in with_tasks] == [
        [{"task": "sums", "accuracy": 0.5, "stderr": 0.1, "correct": [True, True, False, False]}],
        None,
    ]
    assert [(p["step"], p["sample_nll"]) for p in with_tasks] == [(p["step"], p["sample_nll"]) for p in without]
    assert calls == [(True, ("a.yaml",), {"apply_chat_template": True, "log_samples": True})]


def test_the_questions_of_the_gsm8k_task():
    """The four operations on the two numbers of the first step, the true one marked."""
    choices = runpy.run_path(str(TASKS / "gsm8k_operation.py"))["choices"]
    assert choices("Each costs 8 / 2 = $<<8/2=4>>4 now.\nSo 4*3 = <<4*3=12>>12.\n#### 12") == {
        "begin": "Each costs ",
        "choices": ["8+2 =", "8-2 =", "8*2 =", "8/2 ="],
        "right": 3,
    }
    for other in (
        "No step.",
        "On day 2 he has 8*2=<<8*2=16>>16",
        "8*2=<<8*2=16>>16 and 1+1=<<1+1=2>>2",
        "8*2=<<8*3=24>>24",
    ):
        assert choices(other) is None


def test_the_gsm8k_task_asks_for_the_sign(inputs, tmp_path, monkeypatch):
    """Its file through the harness on a model of bytes, against the log-probabilities of the four continuations."""
    pytest.importorskip("lm_eval", reason="needs the eval extra: lm_eval")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    monkeypatch.chdir(tmp_path)
    answers = [
        f"Then {begin}{i + 3}{'+-*/'[i % 4]}{i} = <<{i + 3}{'+-*/'[i % 4]}{i}="
        for begin in ("", "it takes ")
        for i in range(1, 9)
    ]
    docs = [{"question": f"What is it, {i}?", "answer": f"{text}7>>7 now."} for i, text in enumerate(answers)]
    (tmp_path / "gsm8k_test.jsonl").write_text("".join(json.dumps(doc) + "\n" for doc in docs))
    tokenizer = transformers.AutoTokenizer.from_pretrained(inputs.model)
    model = transformers.AutoModelForCausalLM.from_pretrained(inputs.model)
    right = []
    for doc, i in zip(docs, 2 * list(range(1, 9)), strict=True):
        message = [{"role": "user", "content": doc["question"]}]
        begin = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
        begin += doc["answer"][: doc["answer"].index(str(i + 3))]
        sums = []
        for sign in "+-*/":
            ids = torch.tensor([tokenizer(f"{begin}{i + 3}{sign}{i} =").input_ids])
            logp = model(ids).logits[0, :-1].double().log_softmax(-1).gather(1, ids[0, 1:, None])
            sums.append(logp[len(tokenizer(begin).input_ids) - 1 :].sum().item())
        right.append(i % 4 == int(np.argmax(sums)))
    (found,) = harness(model, tokenizer, [str(TASKS / "gsm8k_operation.yaml")])
    assert found["correct"] == right
    assert found["accuracy"] == pytest.approx(np.mean(right))
    assert 0 < np.mean(right) < 1


def test_a_row_gives_its_setting_back():
    setting = replace(BASE, options='{"q": 0.5}', learning_rate=5e-5, token_ratio=0.5)
    assert quality_grid.setting_of(row(setting)) == setting
    assert quality_grid.missing([setting, BASE], [row(setting)]) == [BASE]


def test_the_minutes_of_a_run_are_those_of_its_like():
    like = [row(replace(BASE, seed=seed), minutes) for seed, minutes in ((1, 3.0), (2, 5.0), (3, 4.0))]
    assert quality_grid.minutes(BASE, like, "here") == 4.0
    elsewhere = [row(replace(BASE, seed=4), 100.0, "elsewhere")]
    assert quality_grid.minutes(BASE, like + elsewhere, "here") == 4.0
    assert quality_grid.minutes(BASE, elsewhere, "here") == 100.0
    assert quality_grid.minutes(BASE, [*like, row(replace(BASE, seed=5), "")], "here") == 4.0  # not known
    assert quality_grid.minutes(replace(BASE, options='{"q": 0.5}', records=8), like, "here") == 4.0
    other = replace(BASE, policy="random", steps=8)
    assert quality_grid.minutes(other, like, "here") == pytest.approx(10.0)  # by the longest, per step
    assert quality_grid.minutes(other, [], "here") is None
    of_other_data = [row(replace(BASE, data="file/other"), 100.0)]
    assert quality_grid.minutes(BASE, of_other_data + elsewhere, "here") == 100.0  # nothing of this data here


def test_the_rate_is_that_of_the_lowest_nll_once_all_have_run():
    runs = [setting for setting in quality_grid.rate_runs(BASE) if setting.steps]
    rows = [row(setting, nll=nll) for setting, nll in zip(runs, (0.9, 0.7, 0.8), strict=True)]
    assert quality_grid.chosen_rate(BASE, rows[:2]) is None
    assert quality_grid.chosen_rate(BASE, rows) == quality_grid.RATES[1]


def test_the_budget_is_kept_and_finished_runs_are_skipped(tmp_path):
    """Runs of 2 minutes by a clock of the test's own: of four, 5 minutes hold two."""
    now = [0.0]
    made = []

    def make(setting, timeout):
        made.append(setting)
        now[0] += 120
        lists = {"sample_nll": [1.0], "sample_tokens": [2], "sample_correct": [True, False]}
        return [{"step": 4, "nll": 1.0, "machine": quality.machine_name(), "run_minutes": 2.0, **lists}]

    settings = [replace(BASE, seed=seed) for seed in range(4)]
    runner = quality.Runner(tmp_path / "quality.csv", 1, 300.0, make, clock=lambda: now[0])
    runner(settings)
    assert made == settings[:2]
    assert runner.left_out == settings[2:]
    again = quality.Runner(tmp_path / "quality.csv", 1, 1e9, make, clock=lambda: now[0])
    again(settings)
    assert made == settings
    assert [row["seed"] for row in read_rows(tmp_path / "quality.csv")] == ["0", "1", "2", "3"]
    assert read_rows(tmp_path / "quality_samples.csv")[0]["sample_correct"] == "10"


def test_a_run_of_unknown_length_is_stopped_at_the_end_of_the_budget(tmp_path):
    given = []

    def make(setting, timeout):
        given.append(timeout)
        raise subprocess.TimeoutExpired("run", timeout)

    runner = quality.Runner(tmp_path / "quality.csv", 1, 300.0, make, clock=lambda: 100.0)
    runner([BASE])
    assert (given, runner.left_out, runner.failed) == ([200.0], [BASE], [])
    assert not (tmp_path / "quality.csv").exists()


def test_a_failed_run_leaves_no_row_and_the_others_go_on(tmp_path):
    def make(setting, timeout):
        if setting.seed == 0:
            raise RuntimeError("it is broken")
        lists = {"sample_nll": [1.0], "sample_tokens": [2], "sample_correct": []}
        return [{"step": 4, "nll": 1.0, "machine": "here", "run_minutes": 1.0, **lists}]

    runner = quality.Runner(tmp_path / "quality.csv", 2, 1e9, make)
    runner([replace(BASE, seed=seed) for seed in range(3)])
    assert [setting.seed for setting in runner.failed] == [0]
    assert sorted(row["seed"] for row in read_rows(tmp_path / "quality.csv")) == ["1", "2"]


def test_counts_are_cumulative_and_by_mark():
    marks = ["clean", "exchanged"]
    rows = [
        {"step": step, "id": i, "keep": i == step % 2, "num_tokens": 5, "kept_tokens": 5 * (i == step % 2)}
        for step in (1, 2)
        for i in (0, 1)
    ]
    assert counts_until(rows, marks, 1)["kept_exchanged"] == 1
    both = counts_until(rows, marks, 2)
    assert (both["seen_clean"], both["kept_clean"], both["tokens_seen"], both["tokens_kept"]) == (2, 1, 20, 10)


@pytest.fixture
def inputs(tmp_path):
    """A tiny model of bytes, a file of sums and another text."""
    tokenizer = byte_tokenizer(CHAT_TEMPLATE)
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
        tie_word_embeddings=True,
    )
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    lines = [
        json.dumps({"question": f"{a}+{b}", "answer": f"{a} and {b}: {a + b}"}) for a in range(9) for b in range(9)
    ]
    (tmp_path / "data.jsonl").write_text("\n".join(lines))
    (tmp_path / "other.txt").write_text("What is forgotten while this is learnt? " * 20)
    return Inputs(
        str(tmp_path / "model"),
        str(tmp_path / "data.jsonl"),
        result_mark=":",
        other=str(tmp_path / "other.txt"),
    )


def test_whole_runs_of_a_tiny_model(inputs, tmp_path, one_thread, monkeypatch):
    """From the model as it is to tables and pictures: same pools for all policies, every sample counted."""
    monkeypatch.setattr("benchmarks.quality_run.POINTS", (2,))
    output = tmp_path / "results" / "quality.csv"
    settings = [
        replace(BASE, steps=0),
        *(replace(BASE, condition="exchanged40", policy=policy, sample_ratio=0.5, seed=seed)
          for policy in ("random", "qtuning") for seed in (0, 1)),
    ]  # fmt: skip
    runner = quality.Runner(output, 1, 1e9, lambda setting, timeout: [
        point | {"machine": "here"} for point in run(setting, inputs)
    ])  # fmt: skip
    runner(settings)
    rows = read_rows(output)
    assert [(row["policy"], row["seed"], row["step"]) for row in rows] == [
        ("full", "0", "0"),
        *((policy, seed, step) for policy in ("random", "qtuning") for seed in "01" for step in "24"),
    ]
    seen = {}
    for row in rows[1:]:
        counts = {kind: int(row[f"seen_{kind}"]) for kind in ("clean", "exchanged", "duplicate", "trivial")}
        assert sum(counts.values()) == 4 * int(row["step"])
        assert sum(int(row[f"kept_{kind}"]) for kind in counts) == 2 * int(row["step"])
        assert seen.setdefault((row["seed"], row["step"]), counts) == counts  # the order of pools is the seed's
        assert float(row["nll"]) != float(rows[0]["nll"])
        assert float(row["nll_result"]) > 0
    found = curves(rows, read_rows(output.with_name("quality_samples.csv")))
    for curve in found:
        stored = [float(row["nll"]) for row in curve.rows]
        assert curve.mean_nll() == pytest.approx(stored, rel=1e-3)  # of four digits per sample
        assert list(curve.steps) == [0, 2, 4]
    quality_pages.draw(output)
    assert len(list(output.parent.glob("*.png"))) == 2


def test_a_file_without_the_field_is_refused(inputs):
    with pytest.raises(ValueError, match=r"has no field 'prompt'; accepted: of \['question', 'answer'\]"):
        file_split(inputs.data, "prompt", "answer", 4, 4, 0)
    with pytest.raises(ValueError, match="has 81 distinct prompts; accepted: at least 80"):
        file_split(inputs.data, "question", "answer", 80, 4, 0)


def test_exact_matches_are_those_of_greedy_generation(inputs):
    """A model that has learnt some of six answers: without a cache, token by token, it gives those and no others."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(inputs.model)
    torch.manual_seed(0)
    config = transformers.AutoConfig.from_pretrained(inputs.model)
    model = transformers.AutoModelForCausalLM.from_config(config)
    rows = tokenized([{"question": f"{i}", "answer": "ab"[: 1 + i % 2] * i} for i in range(1, 7)], tokenizer, 512)
    samples = [to_sample(row["input_ids"], row["labels"]) for row in rows]
    optimizer = torch.optim.AdamW(model.parameters(), 0.005)
    for _ in range(100):
        for row in list(rows)[:3]:
            model(torch.tensor([row["input_ids"]]), labels=torch.tensor([row["labels"]])).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    nll, greedy = token_measures(model, samples)
    model = model.double()
    for sample, values, right in zip(samples, nll, greedy, strict=True):
        tokens = sample.input_ids[: int(sample.label_positions[0])]
        with torch.no_grad():
            logits = model(sample.input_ids[None]).logits[0, sample.label_positions - 1]
            while len(tokens) < len(sample.input_ids):
                tokens = torch.cat([tokens, model(tokens[None]).logits[0, -1:].argmax(-1)])
        expected = torch.nn.functional.cross_entropy(logits, sample.labels, reduction="none")
        assert torch.allclose(values.double(), expected, atol=1e-5)
        assert bool(right.all()) == torch.equal(tokens, sample.input_ids)
    assert len({bool(right.all()) for right in greedy}) == 2


def test_the_answer_ends_with_the_end_of_turn(inputs):
    tokenizer = byte_tokenizer(CHAT_TEMPLATE)
    (sample,) = tokenized(records(1), tokenizer, 512)
    assert tokenizer.decode([x for x in sample["labels"] if x >= 0]) == "0<|im_end|>"
    assert tokenizer.decode(sample["input_ids"]) == (
        "<|im_start|>user\nq 0?<|im_end|>\n<|im_start|>assistant\n0<|im_end|>"
    )


@pytest.mark.parametrize("stages", [quality_grid.GENERATED_STAGES, quality_grid.FILE_STAGES, quality_grid.QUICK_STAGES])
def test_every_run_of_the_plan_has_a_policy_that_takes_its_settings(stages):
    settings = quality_grid.grid(replace(BASE, steps=60), stages)
    assert len(settings) == len({setting.run for setting in settings})
    for setting in settings:
        policy = make_policy(qtuning_config(setting))
        assert getattr(policy, "sample_ratio", setting.sample_ratio) == setting.sample_ratio
        assert not policy.needs & {"reference_nll"}
