"""The command line: how each failure ends."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from qtuning_kernels.__main__ import main as command_line
from qtuning_kernels.commands import cli, train
from qtuning_kernels.commands.terminal import program
from tests.models.tiny_architectures import tiny_architecture
from tests.tiny_tokenizer import byte_tokenizer


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("learning-rat: 1", "unknown key 'learning-rat'; accepted: attn-implementation, batch-size, bf16, "),
        ("command: score", "unknown key 'command'"),
        ("token-mode: keep", "token-mode is 'keep'; accepted: mask, drop"),
        ("batch-size: 0", "batch-size is 0: 0 is not above 0"),
        ("batch-size: [8]", "batch-size is [8]; accepted: one text or number"),
        ("bf16: 1", "bf16 is 1; accepted: true, false"),
        ("- a\n- b", "must hold names and values, not list"),
        ("a: [", "expected the node content"),
        (None, "no such file"),
    ],
)
def test_config_files_that_cannot_be_used(content, message, tmp_path, capsys):
    config = tmp_path / "c.yaml"
    if content is not None:
        config.write_text(content)
    assert cli.main(["train", "--config", str(config)]) == 1
    error = capsys.readouterr().err
    assert message in error
    assert str(config) in error


def without_tokenizer(model, tmp_path):
    folder = shutil.copytree(model, tmp_path / "bare")
    for file in folder.glob("tokenizer*"):
        file.unlink()
    return folder


def with_nan(model, tmp_path):
    folder = shutil.copytree(model, tmp_path / "nan")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"][3] = torch.nan
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def with_a_weight_missing(model, tmp_path):
    folder = shutil.copytree(model, tmp_path / "incomplete")
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def with_large_tokens(model, tmp_path):
    folder = shutil.copytree(model, tmp_path / "large")
    byte_tokenizer(None, merges=("Wh", "at")).save_pretrained(folder)
    return folder


def bad(content):
    """A data file of this content."""

    def make(_model, tmp_path):
        (tmp_path / "bad.jsonl").write_bytes(content)
        return tmp_path / "bad.jsonl"

    return make


def value(text):
    return lambda _model, _tmp_path: text


# option, its value made from the model's and the test's folder, what the error says
BAD_INPUT = {
    "missing data": ("--data", value("no.jsonl"), "data 'no.jsonl': no such file or folder"),
    "missing model": ("--model", value("./nowhere"), "model './nowhere': no such folder"),
    "broken JSON": ("--data", bad(b'{"question": "a"}\n{"quest'), "bad.jsonl:2: broken JSON"),
    "unknown column": ("--completion-field", value("reply"), "columns found: question, answer, planted"),
    "empty file": ("--data", bad(b""), "bad.jsonl: the file is empty"),
    "no answer": ("--data", bad(b'{"question": "a", "answer": ""}\n'), "bad.jsonl:1: no answer"),
    "non-UTF-8": ("--data", bad(b'{"question": "\xff"}\n'), "bad.jsonl:1: not UTF-8"),
    "no tokenizer": ("--model", without_tokenizer, "holds no tokenizer"),
    "other tokenizer": ("--model", with_large_tokens, "they do not belong together"),
    "missing weight": ("--model", with_a_weight_missing, "first 'model.layers.1.mlp.up_proj.weight'"),
    "split of a file": ("--data-split", value("test"), "is one file, which has no splits"),
    "sample ratio": ("--sample-ratio", value("0"), "--sample-ratio is 0.0; accepted: a number in (0, 1]"),
    "token ratio": ("--token-ratio", value("1.5"), "--token-ratio is 1.5; accepted: a number in (0, 1]"),
    "pool of one": ("--batch-size", value("1"), "of a pool of one nothing can be pruned"),
    "cutoff": ("--cutoff", value("1"), "cutoff=1 must be at least 2"),
    "tag": ("--tag-field", value("flaw"), "'flaw' is not a column; columns found: question, answer"),
    "NaN weights": ("--model", with_nan, "sample"),
}


@pytest.mark.parametrize(("option", "make", "message"), BAD_INPUT.values(), ids=BAD_INPUT.keys())
def test_bad_input_ends_in_one_line(option, make, message, options, model, tmp_path, capsys):
    arguments = ["train", *options, "--max-steps", "1", option, str(make(model, tmp_path))]
    assert cli.main(arguments) == 1
    error = capsys.readouterr().err
    assert message in error
    lines = [line for line in error.splitlines() if not line.startswith("qtuning: warning: ")]
    assert len(lines) == 1
    assert lines[0].startswith("qtuning: error: ")
    assert not list(tmp_path.glob("runs/*/final"))


def test_unknown_shape_names_the_columns(model, data, capsys):
    data = shutil.copy(data, "other.jsonl")
    Path(data).write_text(Path(data).read_text().replace('"answer"', '"reply"'))
    assert cli.main(["train", "--model", str(model), "--data", data]) == 1
    error = capsys.readouterr().err
    assert "unknown shape: columns found: question, reply, planted" in error
    assert "--prompt-field" in error


def test_debug_shows_the_traceback(options, capsys):
    assert cli.main(["train", *options, "--sample-ratio", "0", "--traceback"]) == 1
    error = capsys.readouterr().err
    assert "Traceback" in error
    assert error.splitlines()[-1].startswith("qtuning: error: --sample-ratio is 0.0")


@pytest.mark.parametrize("path", ["", "folder of qtuning"])
def test_the_named_command_runs_where_it_is_typed(path, tmp_path, monkeypatch):
    """In an environment that is not activated, `qtuning` alone is not found."""
    if path:
        (tmp_path / path).mkdir()
        (tmp_path / path / "qtuning").symlink_to(Path(sys.executable).parent / "qtuning")
    monkeypatch.setenv("PATH", str(tmp_path / path))
    assert (program() == "qtuning") == bool(path)
    done = subprocess.run(f"{program()} --version", shell=True, executable="/bin/bash", capture_output=True, text=True)
    assert done.stdout.startswith("qtuning-kernels "), done.stderr


def test_nothing_fetched(options, capsys):
    for arguments in (["train"], ["score"], ["train", "--data", options[3]]):
        assert cli.main(arguments) == 1
        assert f"run: {program()} fetch" in capsys.readouterr().err


def test_output_in_use_and_nothing_to_resume(options, tmp_path, capsys):
    used = tmp_path / "used"
    used.mkdir()
    (used / "file").touch()
    assert cli.main(["train", *options, "--output", str(used)]) == 1
    assert f"output '{used}' is not empty; give another --output, or --resume" in capsys.readouterr().err
    assert cli.main(["train", *options, "--output", str(tmp_path / "none"), "--resume"]) == 1
    assert f"nothing to resume: {tmp_path}/none is no folder" in capsys.readouterr().err
    assert cli.main(["train", *options, "--resume"]) == 1
    assert "nothing to resume: --output must name" in capsys.readouterr().err


def test_wrong_usage_ends_with_2():
    for arguments in ([], ["tarin"], ["train", "--batch-size", "none"], ["train", "--token-mode", "keep"]):
        with pytest.raises(SystemExit) as ended:
            cli.main(arguments)
        assert ended.value.code == 2


def test_interrupt_ends_with_130(monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "parse", interrupt)
    assert command_line(["info"]) == 130


def test_one_process_in_an_output_folder(options, tmp_path, capsys):
    output = tmp_path / "run"
    script = (
        "import sys, time; from pathlib import Path; from qtuning_kernels.commands.checkpoints import prepare_output"
    )
    script += f"; prepare_output(Path({str(output)!r}), False); print('held', flush=True); sys.stdin.read()"
    with subprocess.Popen([sys.executable, "-c", script], stdin=-1, stdout=-1, text=True) as first:
        assert first.stdout.readline() == "held\n"
        assert cli.main(["train", *options, "--output", str(output)]) == 1
        assert f"output '{output}' is in use by process {first.pid}" in capsys.readouterr().err
        own = train._options(cli.parse(["train", *options]))
        (output / "options.json").write_text(json.dumps(own, default=str))
        assert cli.main(["train", "--output", str(output), "--resume"]) == 1
        assert f"output '{output}' is in use by process {first.pid}" in capsys.readouterr().err
        (output / "options.json").unlink()
        first.kill()
    assert cli.main(["train", *options, "--output", str(output), "--max-steps", "1"]) == 0  # a kill leaves no lock


def test_weights_that_are_not_finite_are_no_final_model(options, tmp_path, monkeypatch, capsys):
    """The last step of a run made them so, and no scoring came after it; exit status 0 and a model of NaN."""
    from transformers import Trainer

    inner = Trainer._inner_training_loop

    def loop(self, *args, **kwargs):
        output = inner(self, *args, **kwargs)
        with torch.no_grad():
            self.model.model.norm.weight[0] = torch.inf
        return output

    monkeypatch.setattr(Trainer, "_inner_training_loop", loop)
    output = tmp_path / "run"
    assert cli.main(["train", *options, "--output", str(output), "--max-steps", "1"]) == 1
    assert "the trained weights are not finite (the first is model.norm.weight)" in capsys.readouterr().err
    assert not (output / "final").exists()
    assert not (output / "summary.json").exists()


@pytest.mark.parametrize("value", ["inf", "nan", "1e999"])
def test_a_learning_rate_is_finite(value, options, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(["train", *options, "--learning-rate", value])
    assert ended.value.code == 2
    assert f"--learning-rate: {value} is not" in capsys.readouterr().err


def test_scores_of_nan_are_a_failure(options, model, tmp_path, capsys):
    for command in ("score", "select"):
        assert cli.main([command, *options, "--model", str(with_nan(model, tmp_path / command))]) == 1
        assert "the model gives NaN for every sample" in capsys.readouterr().err
    assert not list(tmp_path.glob("plane.parquet")) + list(tmp_path.glob("selected.jsonl"))


@pytest.mark.parametrize("command", ["score", "select", "train"])
def test_a_model_that_sees_later_tokens_is_refused(command, options, tmp_path, capsys):
    """transformers has its own lines about the model above."""
    folder, tokenizer = tmp_path / "model", byte_tokenizer(None)
    tiny_architecture("bert-generation", is_decoder=False, vocab_size=len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    assert cli.main([command, *options, "--model", str(folder)]) == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("qtuning: error: the logits of BertGenerationDecoder depend on later tokens; accepted: ")
    assert not [*tmp_path.glob("plane.parquet"), *tmp_path.glob("selected.jsonl"), *tmp_path.glob("runs/*/record/s*")]


def test_ratios_and_output_are_refused_before_the_model_is_loaded(options, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr("qtuning_kernels.commands.inputs.load_model", lambda *_: pytest.fail("loaded"))
    (tmp_path / "file").touch()
    for command in ("score", "select"):
        assert cli.main([command, *options, "--sample-ratio", "7"]) == 1
        assert "--sample-ratio is 7.0" in capsys.readouterr().err
        assert cli.main([command, *options, "--output", str(tmp_path / "file" / "out")]) == 1
        assert str(tmp_path / "file") in capsys.readouterr().err
    assert cli.main(["train", *options, "--output", str(tmp_path / "file" / "out")]) == 1


@pytest.mark.parametrize(
    "text",
    [
        "[Errno 28] No space left on device",
        "[enforce fail at inline_container.cc:672] . unexpected pos 146432 vs 146320",
    ],
)
def test_a_full_disk_is_called_that(text, monkeypatch, capsys):
    monkeypatch.setattr("qtuning_kernels.commands.info.run", lambda _: (_ for _ in ()).throw(RuntimeError(text)))
    assert cli.main(["info"]) == 1
    assert capsys.readouterr().err.startswith("qtuning: error: no space is left on the disk; what was complete stays")


def test_what_is_missing_is_said_before_any_work(options, monkeypatch, capsys):
    monkeypatch.setattr("qtuning_kernels.commands.train.load_inputs", lambda *_: pytest.fail("loaded"))
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    assert cli.main(["eval", "./nowhere", "--tasks", "task.yaml"]) == 1
    assert f"qtuning eval needs lm_eval: {sys.executable} -m pip install 'qtuning-kernels[eval]'" in (
        capsys.readouterr().err
    )
    for module, extra, option in (("peft", "lora", ["--lora-rank", "2"]), ("plotly", "report", ["--report"])):
        with monkeypatch.context() as without:
            without.setitem(sys.modules, module, None)
            assert cli.main(["train", *options, *option]) == 1
        remedy = f"{sys.executable} -m pip install 'qtuning-kernels[{extra}]'"
        assert f"{option[0]} needs {module}: {remedy}" in capsys.readouterr().err
    monkeypatch.setattr("qtuning_kernels.demo.assets._download", lambda *_: pytest.fail("downloaded"))
    monkeypatch.setitem(sys.modules, "gguf", None)
    assert cli.main(["fetch"]) == 1
    assert f"needs gguf: {sys.executable} -m pip install 'qtuning-kernels[demo]'" in capsys.readouterr().err


def test_pip_finds_the_extras_in_what_is_installed():
    """Without an index: the package need not be published for a remedy to work."""
    extras = [f"qtuning-kernels[{extra}]" for extra in ("lora", "report", "demo")]
    command = [sys.executable, "-m", "pip", "install", "--dry-run", "--no-index", "--no-cache-dir", *extras]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "Would install" not in done.stdout
    assert "does not provide the extra" not in done.stderr


def test_an_interrupt_while_libraries_load_is_one_line():
    """Importing PyTorch takes seconds, in which Ctrl-C gave its traceback."""
    script = "import sys; from qtuning_kernels.__main__ import main"
    script += "\nassert 'torch' not in sys.modules\nclass Interrupt:\n    def find_spec(self, name, *_):\n"
    script += "        if name == 'torch': raise KeyboardInterrupt\nsys.meta_path.insert(0, Interrupt())\n"
    script += "sys.exit(main(['info']))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (130, "qtuning: interrupted\n")
