"""The command line: how each failure ends."""

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from qtuning_kernels.commands import cli
from tests.tiny_tokenizer import byte_tokenizer


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("learning-rat: 1", "unknown key 'learning-rat'; accepted: batch-size, bf16, "),
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
    assert cli.main(["train", "--model", str(model), "--data", str(data)]) == 1
    error = capsys.readouterr().err
    assert "unknown shape: columns found: question, answer, planted" in error
    assert "--prompt-field" in error


def test_debug_shows_the_traceback(options, capsys):
    assert cli.main(["train", *options, "--sample-ratio", "0", "--debug"]) == 1
    error = capsys.readouterr().err
    assert "Traceback" in error
    assert error.splitlines()[-1].startswith("qtuning: error: --sample-ratio is 0.0")


def test_nothing_fetched(options, capsys):
    for arguments in (["train"], ["score"], ["train", "--data", options[3]]):
        assert cli.main(arguments) == 1
        assert "run: qtuning fetch" in capsys.readouterr().err


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
    assert cli.main(["info"]) == 130
