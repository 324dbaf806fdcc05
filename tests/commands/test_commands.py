"""The command line: what each command leaves behind."""

import json
import math
import shutil
import sys
import warnings
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import qtuning_kernels
from qtuning_kernels import triage_samples
from qtuning_kernels.commands import checkpoints, cli, inputs
from qtuning_kernels.commands.terminal import program
from qtuning_kernels.demo import assets as fetch_module

from .conftest import KINDS, ROWS, record


def test_train_leaves_a_model_a_record_and_a_summary(options, model, tmp_path, capsys):
    output = tmp_path / "run"
    arguments = ["train", *options, "--output", str(output), "--batch-size", "8", "--learning-rate", "0.01"]
    assert cli.main(arguments) == 0
    shown = capsys.readouterr().out
    assert "named columns (question, answer); not used: planted" in shown
    assert "24 records read, 0 skipped, 0 truncated" in shown
    assert "samples kept" in shown
    assert "6 of 24 (25.0%)" in shown
    assert f"from_pretrained('{output}/final')" in shown

    trained = AutoModelForCausalLM.from_pretrained(output / "final")
    assert AutoTokenizer.from_pretrained(output / "final").eos_token == "<|im_end|>"
    assert trained.dtype == torch.float32
    before = AutoModelForCausalLM.from_pretrained(model)
    assert not torch.equal(trained.model.norm.weight, before.model.norm.weight)

    rows = record(output)
    assert len(rows) == 24
    assert {row["id"] for row in rows} == set(range(24))
    for step in (1, 2, 3):
        assert sum(row["keep"] for row in rows if row["step"] == step) == 2
    summary = json.loads((output / "summary.json").read_text())
    assert (summary["samples_seen"], summary["samples_kept"]) == (24, 6)
    assert math.isfinite(summary["loss_first"])
    # the table of planted items counts every row once
    table = {kind: line for kind in KINDS for line in shown.splitlines() if f" {kind} " in line}
    for kind in KINDS:
        kept = sum(row["keep"] for row in rows if ROWS[row["id"]]["planted"] == kind)
        assert f"8 / {kept}" in table[kind]
    texts = map(json.loads, (output / "record" / "texts.jsonl").open())
    assert {row["id"]: row["tag"] for row in texts} == {i: row["planted"] for i, row in enumerate(ROWS)}


def test_train_can_end_with_its_report(options, tmp_path, capsys):
    """The report holds the texts, and the command that was run."""
    pytest.importorskip("plotly", reason="needs the report extra: plotly, jinja2")
    output = tmp_path / "run"
    assert cli.main(["train", *options, "--output", str(output), "--batch-size", "8", "--report"]) == 0
    assert f"report in {output / 'report.html'}" in capsys.readouterr().out
    page = (output / "report.html").read_text(encoding="utf-8")
    for row in ROWS:
        assert row["question"] in page
    assert "recorded no texts" not in page


def test_train_with_everything_kept(options, tmp_path):
    everything = ["--sample-ratio", "1", "--token-ratio", "1", "--max-steps", "1"]
    assert cli.main(["train", *options, "--output", str(tmp_path / "run"), *everything]) == 0


def test_train_with_lora(options, model, tmp_path):
    pytest.importorskip("peft")
    output = tmp_path / "run"
    arguments = ["train", *options, "--output", str(output), "--max-steps", "2", "--lora-rank", "2"]
    assert cli.main(arguments) == 0
    assert (output / "final" / "adapter_model.safetensors").exists()
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        tuned = AutoModelForCausalLM.from_pretrained(output / "final")(ids).logits
        plain = AutoModelForCausalLM.from_pretrained(model)(ids).logits
    assert not torch.equal(tuned, plain)


@pytest.mark.parametrize("target", ["q_proj,v_proj", '["q_proj", "v_proj"]'])
def test_adapters_are_of_the_layers_that_are_named_and_can_be_merged(target, options, model, tmp_path):
    """Merged, the final model needs no PEFT, and gives the logits of the adapters of the last checkpoint."""
    peft = pytest.importorskip("peft")
    output = tmp_path / "run"
    arguments = ["train", *options, "--output", str(output), "--max-steps", "2", "--learning-rate", "0.05"]
    assert cli.main([*arguments, "--lora-rank", "2", "--lora-target", target, "--merge"]) == 0
    adapters = load_file(output / "checkpoint-2" / "adapter_model.safetensors")
    assert {name.split(".")[-3] for name in adapters} == {"q_proj", "v_proj"}
    assert sorted(p.name for p in (output / "final").glob("*.safetensors")) == ["model.safetensors"]
    assert not (output / "final" / "adapter_config.json").exists()
    modes = {file.stat().st_mode for file in (output / "final").iterdir()}
    assert modes == {(output / "options.json").stat().st_mode}  # those of any new file
    ids = torch.tensor([[5, 6, 7, 8, 9]])
    plain, merged = (AutoModelForCausalLM.from_pretrained(folder) for folder in (model, output / "final"))
    assert {p.dtype for p in merged.parameters()} == {torch.float32}
    assert AutoTokenizer.from_pretrained(output / "final").eos_token == "<|im_end|>"
    with torch.no_grad():
        expected = peft.PeftModel.from_pretrained(plain, output / "checkpoint-2").double()(ids).logits
        found = merged.double()(ids).logits
        without = AutoModelForCausalLM.from_pretrained(model).double()(ids).logits
    assert (expected - without).abs().max() > 1e-3  # the adapters do something
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)  # weights of about 0.1, rounded to float32 once


@pytest.mark.parametrize("option", [["--merge"], ["--lora-target", "q_proj"]])
def test_options_of_adapters_need_adapters(option, options, capsys):
    assert cli.main(["train", *options, *option]) == 1
    assert "accepted: with --lora-rank" in capsys.readouterr().err


@pytest.mark.parametrize("lora", [[], ["--lora-rank", "2"]])
def test_gradient_checkpointing_trains_the_same(lora, options, tmp_path):
    """The same gradients, computed twice: also where only adapters ask for any."""
    fixed = ["--max-steps", "2", "--learning-rate", "0.01", "--matmul", "default", "--score-dtype", "model", *lora]
    for output, more in (("plain", []), ("again", ["--gradient-checkpointing"])):
        assert cli.main(["train", *options, *fixed, *more, "--output", str(tmp_path / output)]) == 0
    name = "adapter_model.safetensors" if lora else "model.safetensors"
    plain, again = (load_file(tmp_path / output / "final" / name) for output in ("plain", "again"))
    for key, tensor in plain.items():
        torch.testing.assert_close(again[key], tensor, rtol=0, atol=1e-6)


@pytest.mark.parametrize("command", ["train", "score", "select"])
def test_attention_is_the_one_that_is_named(command, options, tmp_path, monkeypatch, capsys):
    loaded = []
    find = inputs.load_model
    monkeypatch.setattr(inputs, "load_model", lambda *given: loaded.append(find(*given)) or loaded[-1])
    more = ["--max-steps", "1"] if command == "train" else []
    for name in ("eager", "sdpa"):
        arguments = [command, *options, *more, "--attn-implementation", name, "--output", str(tmp_path / name)]
        assert cli.main(arguments) == 0
        assert loaded[-1].config._attn_implementation == name
    assert cli.main([command, *options, "--attn-implementation", "square"]) == 1
    assert "square" in capsys.readouterr().err


def test_lora_without_peft(options, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "peft", None)
    assert cli.main(["train", *options, "--lora-rank", "2"]) == 1
    assert "pip install 'qtuning-kernels[lora]'" in capsys.readouterr().err


def test_score_writes_the_plane(options, data, tmp_path, capsys):
    output = tmp_path / "planes" / "plane.parquet"
    assert cli.main(["score", *options, "--output", str(output), "--score-dtype", "float32"]) == 0
    table = pq.read_table(output)
    names = ["sample_id", "ppl", "entropy", "num_tokens", "quadrant", "role", "nll", "planted", "prompt", "answer"]
    assert table.column_names == names
    columns = table.to_pydict()
    assert columns["sample_id"] == list(range(24))
    assert columns["planted"] == [row["planted"] for row in ROWS]
    assert columns["num_tokens"] == [len(row["answer"]) + 1 for row in ROWS]  # bytes, and the end
    triage = triage_samples(torch.tensor(columns["ppl"]), torch.tensor(columns["entropy"]), 0.25)
    assert columns["quadrant"] == triage.quadrant.tolist()
    assert columns["role"] == triage.role.tolist()
    assert json.loads(table.schema.metadata[b"qtuning"]) == {"alpha": float(triage.alpha), "tag_field": "planted"}
    assert "24 samples in" in capsys.readouterr().out
    assert [p.name for p in output.parent.iterdir()] == ["plane.parquet"]


def test_score_is_the_models_own_loss(options, model, tmp_path):
    """One sample's perplexity against `transformers`' loss of the same text."""
    assert cli.main(["score", *options, "--score-dtype", "float32"]) == 0
    row = pq.read_table("plane.parquet").to_pylist()[5]
    tokenizer, plain = AutoTokenizer.from_pretrained(model), AutoModelForCausalLM.from_pretrained(model)
    prompt = tokenizer(ROWS[5]["question"]).input_ids
    answer = tokenizer(ROWS[5]["answer"]).input_ids + [tokenizer.eos_token_id]
    with torch.no_grad():
        loss = plain(torch.tensor([prompt + answer]), labels=torch.tensor([[-100] * len(prompt) + answer])).loss
    assert row["ppl"] == pytest.approx(loss.exp().item(), rel=1e-5)


def test_score_takes_its_data_once(options, data, capsys):
    assert cli.main(["score", *options, str(data)]) == 1
    assert "data is given twice" in capsys.readouterr().err
    without_data = [*options[:2], *options[4:]]
    assert cli.main(["score", str(data), *without_data]) == 0
    assert len(pq.read_table("plane.parquet")) == 24


def test_warnings_are_one_line_each(monkeypatch, capsys):
    def warn(_arguments):
        warnings.warn("two\nlines", stacklevel=2)
        warnings.warn("a library's own business", FutureWarning, stacklevel=2)

    monkeypatch.setattr("qtuning_kernels.commands.info.run", warn)
    assert cli.main(["info"]) == 0
    assert capsys.readouterr().err == "qtuning: warning: two lines\n"


def test_info(capsys):
    assert cli.main(["info"]) == 0
    shown = capsys.readouterr().out
    lines = {line[2:18].strip(): line[19:] for line in shown.splitlines() if line.startswith("  ")}
    assert lines["xpu order"].startswith("triton, reference: ")
    assert lines["mps order"].startswith("reference: ")
    for word in ("torch", "cpu tensors", "reference", "native", "triton", f"not fetched; run: {program()} fetch"):
        assert word in shown


def test_fetch(monkeypatch, tmp_path):
    fetched = []
    monkeypatch.setattr(fetch_module, "fetch", lambda asset, cache: fetched.append((asset.name, cache)))
    assert cli.main(["fetch", "--cache", str(tmp_path)]) == 0
    assert fetched == [("SmolLM2-135M-Instruct", tmp_path), ("word-problems", tmp_path)]


def test_embedded_model_and_data_are_the_default(model, data, monkeypatch, tmp_path, capsys):
    cache = tmp_path / "cache"
    shutil.copytree(model, cache / fetch_module.MODEL.name)
    (cache / fetch_module.DATA.name).mkdir()
    shutil.copy(data, cache / fetch_module.DATA.name / "train.jsonl")
    monkeypatch.setattr(fetch_module, "is_fetched", lambda asset: True)
    assert cli.main(["train", "--max-steps", "1"]) == 0
    assert "word-problems/train.jsonl: named columns (question, answer)" in capsys.readouterr().out.replace("\n", "")
    assert list(tmp_path.glob("runs/qtuning-*/final/model.safetensors"))
    assert cli.main(["score", "--data-split", "validation"]) == 1
    assert "the embedded data has train, eval" in capsys.readouterr().err


def test_config_file(options, tmp_path):
    config = tmp_path / "run.yaml"
    config.write_text("max-steps: 2\nlearning_rate: 1e-3\nbf16: true\noutput: from-file\nseed:\n")
    arguments = cli.parse(["train", *options, "--config", str(config), "--max-steps", "3"])
    assert arguments.max_steps == 3  # the command line wins
    assert arguments.learning_rate == 1e-3  # which YAML reads as text
    assert arguments.bf16 is True
    assert arguments.output == Path("from-file")
    assert arguments.seed == 42  # nothing said: the default
    config = tmp_path / "run.json"
    config.write_text('{"token-mode": "drop", "lora_rank": 4}')
    arguments = cli.parse(["train", "--config", str(config)])
    assert (arguments.token_mode, arguments.lora_rank) == ("drop", 4)


def test_every_command_explains_itself(capsys):
    for command in ("train", "score", "fetch", "info"):
        with pytest.raises(SystemExit) as ended:
            cli.main([command, "--help"])
        assert ended.value.code == 0
        assert "--traceback" in capsys.readouterr().out


def test_the_final_model_is_replaced_whole(tmp_path):
    class Trainer:
        def is_world_process_zero(self):
            return True

        def save_model(self, folder):
            Path(folder).mkdir()
            (Path(folder) / "weights").write_text("new")

    class Tokenizer:
        def save_pretrained(self, folder):
            (Path(folder) / "tokens").write_text("new")

    (tmp_path / "final").mkdir()
    (tmp_path / "final" / "stale").touch()
    (tmp_path / ".final").mkdir()  # what a kill left behind
    assert checkpoints.save_final(Trainer(), Tokenizer(), tmp_path) == tmp_path / "final"
    assert sorted(p.name for p in (tmp_path / "final").iterdir()) == ["tokens", "weights"]
    assert [p.name for p in tmp_path.iterdir()] == ["final"]


def test_version(capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(["--version"])
    assert (ended.value.code, capsys.readouterr().out) == (0, f"qtuning-kernels {qtuning_kernels.__version__}\n")


def test_bfloat16_autocast_on_this_device(options, tmp_path):
    """transformers refused it on a CPU unless the CPU was asked for by name."""
    output = tmp_path / "run"
    assert cli.main(["train", *options, "--output", str(output), "--max-steps", "1", "--bf16"]) == 0
    assert json.loads((output / "record" / "run.json").read_text())["configuration"]["training"]["bf16"]


def test_models_have_the_permissions_of_any_new_file(options, tmp_path):
    """safetensors writes for its owner alone, so that nobody else could load a shared model."""
    output = tmp_path / "run"
    assert cli.main(["train", *options, "--output", str(output), "--max-steps", "1"]) == 0
    (tmp_path / "new").touch()
    files = sorted(output.rglob("*.safetensors"))
    assert [file.parent.name + "/" + file.stem for file in files] == [
        "checkpoint-1/model", "checkpoint-1/qtuning_state", "final/model",
    ]  # fmt: skip
    assert {file.stat().st_mode for file in files} == {(tmp_path / "new").stat().st_mode}


def test_evaluation_before_during_and_after(options, model, data, tmp_path, capsys):
    output = tmp_path / "run"
    arguments = ["train", *options, "--output", str(output), "--max-steps", "5", "--save-steps", "2"]
    assert cli.main([*arguments, "--eval-data", str(data), "--learning-rate", "0.01", "--batch-size", "8"]) == 0
    losses = json.loads((output / "summary.json").read_text())["eval_loss"]
    assert list(losses) == ["0", "2", "4", "5"]
    assert losses["5"] < losses["0"]
    assert f"{losses['0']:.4f} at step 0" in capsys.readouterr().out
    # the mean over batches of the model's own loss, as `Trainer` evaluates
    causal, tokenizer = AutoModelForCausalLM.from_pretrained(model), AutoTokenizer.from_pretrained(model)
    nll = []
    for row in ROWS:
        prompt = tokenizer(row["question"]).input_ids
        answer = tokenizer(row["answer"]).input_ids + [tokenizer.eos_token_id]
        with torch.no_grad():
            loss = causal(torch.tensor([prompt + answer]), labels=torch.tensor([[-100] * len(prompt) + answer])).loss
        nll.append((loss.item() * len(answer), len(answer)))
    batches = [nll[i : i + 8] for i in range(0, len(nll), 8)]
    means = [sum(total for total, _ in batch) / sum(count for _, count in batch) for batch in batches]
    assert losses["0"] == pytest.approx(sum(means) / len(means), rel=1e-4)


def test_a_held_out_share_is_not_trained_on(options, tmp_path, capsys):
    output = tmp_path / "run"
    assert cli.main(["train", *options, "--output", str(output), "--eval-share", "0.25", "--epochs", "2"]) == 0
    assert "6 samples are held out for evaluation, 18 trained on" in capsys.readouterr().out
    assert len({row["id"] for row in record(output)}) == 18
    assert json.loads((output / "summary.json").read_text())["eval_loss"].keys() >= {"0"}
    for share in ("1", "-0.1", "nan", "0.999"):
        assert cli.main(["train", *options, "--eval-share", share]) == 1
        assert (
            f"--eval-share {'is ' * (share != '0.999')}{share.replace('1', '1.0', share == '1')}"
            in capsys.readouterr().err
        )
