"""Sharded and partitioned models over gloo: the step of one process, whatever wraps the model and its head."""

import json
import shutil

import pytest
import torch
import transformers
from safetensors.torch import load_file

from tests.tiny import tiny_model
from tests.training.test_distributed import launch

# DeepSpeed has no float64; two AdamW steps apart, float32 additions in another order reach 1e-6
WRAPPERS = {"ddp": 1e-9, "fsdp2": 1e-9, "zero1": 2e-5, "zero2": 2e-5, "zero3": 2e-5}
KINDS = {"tied": [], "untied": [], "LoRA": ["--lora"], "LoRA, head saved": ["--lora"]}
HEADS = {"tied": "tied", "untied": "untied", "LoRA": "untied", "LoRA, head saved": "saved"}
# the others run with --slow
QUICK = {("fsdp2", "tied"), ("fsdp2", "LoRA, head saved"), ("zero3", "untied")}


def options(wrapper, kind):
    dtype = "float32" if wrapper.startswith("zero") else "float64"
    return ["--pool", "16", "--head", HEADS[kind], "--dtype", dtype, *KINDS[kind]]


def run(folder, wrapper, kind, *extra, processes=2):
    if wrapper.startswith("zero"):
        pytest.importorskip("deepspeed")
    done = launch(folder, processes, *options(wrapper, kind), "--wrapper", wrapper, *extra)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((folder / "result.json").read_text())


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The same run in one process, made once a kind and dtype."""
    made = {}

    def make(wrapper, kind):
        key = kind, wrapper.startswith("zero")
        if key not in made:
            folder = tmp_path_factory.mktemp("alone") / "run"
            done = launch(folder, 1, *options(wrapper, kind))
            assert done.returncode == 0, done.stderr[-3000:]
            made[key] = folder
        return made[key]

    return make


def cases():
    for wrapper in WRAPPERS:
        for kind in HEADS:
            marks = [] if (wrapper, kind) in QUICK else [pytest.mark.slow]
            reason = "transformers 5.0 keeps a learning rate for the empty group of parameters that DeepSpeed drops"
            fails = wrapper.startswith("zero") and "LoRA" in kind and transformers.__version__.startswith("5.0.")
            marks += [pytest.mark.skipif(fails, reason=reason)]
            yield pytest.param(wrapper, kind, marks=marks, id=f"{wrapper}-{kind}")


@pytest.mark.parametrize(("wrapper", "kind"), [*cases()])
def test_the_step_of_one_process(alone, tmp_path, wrapper, kind):
    """Weights after 5 AdamW steps; the wrapper's class is looked at, since accelerate makes DDP of FSDP on a CPU."""
    result = run(tmp_path / "run", wrapper, kind)
    expected_class = {"ddp": "DistributedDataParallel", "fsdp2": "FSDP"}.get(wrapper, "DeepSpeedEngine")
    assert expected_class in result["wrapped"]
    assert (result["partitioned"] > 0) == (wrapper in ("fsdp2", "zero3"))
    assert result["fused"]
    folder = alone(wrapper, kind)
    reference = json.loads((folder / "result.json").read_text())
    assert [sum(pair) for pair in zip(*result["tokens"], strict=True)] == reference["tokens"][0]
    assert result["losses"] == pytest.approx(reference["losses"], rel=1e-5)
    expected, actual = load_file(folder / "w"), load_file(tmp_path / "run" / "w")
    assert expected.keys() == actual.keys()
    distance = max((actual[name] - expected[name]).abs().max().item() for name in expected)
    print(f"{wrapper}, {kind}: {distance:.1e}")
    assert distance < WRAPPERS[wrapper]
    if kind in ("tied", "untied"):
        saved = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "final")
        dtype = torch.float32 if wrapper.startswith("zero") else torch.float64
        for name, weight in saved.to(dtype).named_parameters():
            # of two tied tensors in a file transformers 5.0 makes two parameters
            of_worker = actual["model.embed_tokens.weight" if kind == "tied" and name not in actual else name]
            assert (weight - of_worker).abs().max() < 1e-6, name


@pytest.mark.parametrize("wrapper", ["fsdp2", pytest.param("zero3", marks=pytest.mark.slow)])
def test_a_process_with_nothing_left_and_nothing_to_score_takes_part(tmp_path, wrapper):
    """A shared pool of two keeps one sample, and scores of an earlier epoch leave nothing to score: a process that made
    fewer forwards than the others would wait for parameters that nobody gathers any more."""
    if wrapper == "zero3":
        pytest.importorskip("deepspeed")
    folder = tmp_path / "run"
    dtype = "float32" if wrapper == "zero3" else "float64"
    arguments = ["--wrapper", wrapper, "--pool", "2", "--accumulation", "1", "--dtype", dtype, "--rescore-every", "2"]
    done = launch(folder, 2, *arguments, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads((folder / "result.json").read_text())
    assert all(sorted(pair)[0] == 0 < sorted(pair)[1] for pair in zip(*result["tokens"], strict=True))


@pytest.mark.parametrize("wrapper", ["fsdp2", pytest.param("zero3", marks=pytest.mark.slow)])
def test_resume(tmp_path, wrapper):
    whole = run(tmp_path / "whole", wrapper, "untied", "--save-steps", "3")
    folder = tmp_path / "whole"
    before = load_file(folder / "w")
    shutil.rmtree(folder / "checkpoint-5")
    done = launch(folder, 2, *options(wrapper, "untied"), "--wrapper", wrapper, "--save-steps", "3", "--resume")
    assert done.returncode == 0, done.stderr[-3000:]
    after = load_file(folder / "w")
    assert all(torch.allclose(before[name], after[name], rtol=0, atol=1e-7) for name in before)
    assert json.loads((folder / "result.json").read_text())["losses"] == pytest.approx(whole["losses"], rel=1e-6)


def test_scores_leave_a_sharded_model_unrounded(tmp_path):
    """accelerate's policy casts what a model returns to bfloat16: eight bits of every nll, and ties among samples."""
    folder = tmp_path / "run"
    done = launch(folder, 2, "--pool", "16", "--wrapper", "fsdp2", "--dtype", "float32", "--bf16")
    assert done.returncode == 0, done.stderr[-3000:]
    assert all(json.loads((folder / "result.json").read_text())["exact"])


def test_tiny_models_differ_by_head():
    assert tiny_model("llama-tied").config.tie_word_embeddings
    assert not tiny_model("llama").config.tie_word_embeddings
