"""Every snippet of README and docs, as it stands: Python is run, commands are run, or parsed by their own parsers.

A model, which a page takes as given, is put beside it in tiny form; what a page loads from the hub is tiny, too. A
snippet of another kind fails.
"""

import argparse
import contextlib
import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import datasets
import pytest
import torch
import transformers

from qtuning_kernels.commands import cli
from qtuning_kernels.demo import assets
from tests.tiny import tiny_model, tiny_samples
from tests.tiny_tokenizer import byte_tokenizer

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
COMMANDS = ("qtuning", "make", "python", "pytest", "pip", "torchrun", "accelerate")
ROWS = [{"question": f"What is {i} + {i}?", "answer": f"It is {2 * i}." * (1 + i % 3)} for i in range(32)]


def blocks(text: str) -> list[tuple[str, str]]:
    """Language and text of each fenced block."""
    return FENCE.findall(text)


def command_lines(script: str) -> list[str]:
    lines = script.replace("\\\n", " ").splitlines()
    return [line for line in lines if line.strip() and not line.lstrip().startswith("#")]


def inline_commands(text: str) -> Iterator[str]:
    """Code within sentences that is a command with arguments."""
    for code in re.findall(r"`([^`]+)`", FENCE.sub("", text)):
        words = code.split()
        while words and re.match(r"[A-Z_]+=", words[0]):
            words = words[1:]
        if len(words) > 1 and Path(words[0]).name in COMMANDS:
            yield " ".join(code.split())


class Parsed(Exception):
    """A parser has accepted its arguments."""


def parse_by_module(module: str, arguments: list[str]) -> None:
    """Start a module as ``python -m`` would, up to the end of its parser's work."""
    assert "parse_args(" in (ROOT / f"{module.replace('.', '/')}.py").read_text(), f"{module} parses no arguments"
    parse_args = argparse.ArgumentParser.parse_args

    def parse_and_stop(self, args=None, namespace=None):
        parse_args(self, args, namespace)
        raise Parsed

    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("TRITON_INTERPRET", raising=False)  # as a benchmark does, for whoever comes after it
        patch.setattr(argparse.ArgumentParser, "parse_args", parse_and_stop)
        patch.setattr(sys, "argv", [module, *arguments])
        with pytest.raises(Parsed):
            runpy.run_module(module, run_name="__main__")


@cache
def parse_by_make(arguments: tuple[str, ...]) -> None:
    makefile = (ROOT / "Makefile").read_text()
    for name in (word.partition("=")[0] for word in arguments if "=" in word):
        assert f"$({name})" in makefile, f"the Makefile has no {name}"
    done = subprocess.run(["make", "-n", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def parse_by_pip(arguments: list[str]) -> None:
    from pip._internal.commands import create_command

    assert arguments[0] == "install"
    requirements = create_command("install").parse_args(arguments[1:])[1]
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for requirement in requirements:
        named = re.fullmatch(r"\.(?:\[(.*)\])?", requirement)
        assert not named or set((named[1] or "").split(",")) - {""} <= extras.keys(), requirement


def parse_by_pytest(arguments: list[str], config: pytest.Config) -> None:
    found, unknown = config._parser.parse_known_and_unknown_args(arguments)
    assert not unknown
    assert all((ROOT / path).exists() for path in found.file_or_dir)


def parse(line: str, config: pytest.Config) -> None:
    """Raise, or exit, unless the command's own parser takes the line."""
    words = shlex.split(line, comments=True)
    while re.match(r"[A-Z_]+=", words[0]):
        words = words[1:]
    command, rest = Path(words[0]).name, words[1:]
    if command == "compute-sanitizer":
        rest = rest[rest.index("python") :]
        command, rest = rest[0], rest[1:]
    if command == "python" and rest[0] == "-m":
        command, rest = rest[1], rest[2:]
    if command == "torchrun":
        from torch.distributed.run import get_args_parser

        launched = get_args_parser().parse_args(rest)
        assert (launched.module, launched.training_script) == (True, "qtuning_kernels")
        command, rest = "qtuning", launched.training_script_args
    elif command == "accelerate":
        from accelerate.commands.launch import launch_command_parser

        assert rest[0] == "launch"
        launched = launch_command_parser().parse_args(rest[1:])
        assert (launched.module, launched.training_script) == (True, "qtuning_kernels")
        command, rest = "qtuning", launched.training_script_args
    if command == "qtuning":
        with pytest.raises(SystemExit, match=r"^0$") if "--help" in rest else contextlib.nullcontext():
            cli.parse(rest)
    elif command == "make":
        parse_by_make(tuple(rest))
    elif command == "pip":
        parse_by_pip(rest)
    elif command == "pytest":
        parse_by_pytest(rest, config)
    elif command.startswith("benchmarks."):
        parse_by_module(command, rest)
    else:
        raise AssertionError(f"no parser is known for: {line}")


def run(line: str, folder: Path, config: pytest.Config) -> None:
    """What is quick is run for real: `qtuning`, Python code, and the shell's own commands within the page's folder."""
    words = shlex.split(line, comments=True)
    command = Path(words[0]).name
    if command == "qtuning":
        assert cli.main(words[1:]) == 0, line
    elif (command, words[1]) == ("python", "-c"):
        exec(words[2], {})
    elif command in ("echo", "du", "rm"):
        assert not re.search(r"(^|\s)/|\.\.", line), line
        environment = os.environ | {"HOME": str(folder)}
        done = subprocess.run(line, shell=True, cwd=folder, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    else:
        parse(line, config)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tokenizer = byte_tokenizer()
    torch.manual_seed(3)
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, tie_word_embeddings=True, bos_token_id=0, eos_token_id=1,
        pad_token_id=1,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write_rows(path: Path) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))


@pytest.fixture
def beside(model, tmp_path, monkeypatch):
    """A folder with what the pages take as given; the embedded model and data are tiny ones."""
    shutil.copytree(model, tmp_path / "path/or/hub-name")
    cache_folder = tmp_path / ".cache/qtuning-kernels"
    shutil.copytree(model, cache_folder / assets.MODEL.name)
    (cache_folder / assets.DATA.name).mkdir()
    write_rows(cache_folder / assets.DATA.name / "train.jsonl")
    for asset in (assets.MODEL, assets.DATA):
        folder = cache_folder / asset.name
        files = {path.name: path.stat().st_size for path in folder.iterdir()}
        (folder / assets.MANIFEST).write_text(json.dumps({"wheel_sha256": asset.wheel.sha256, "files": files}))
    monkeypatch.setenv("QTUNING_CACHE", str(cache_folder))
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: datasets.Dataset.from_list(ROWS))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def names(tmp_path):
    """What Python snippets take as given."""
    torch.manual_seed(0)
    head = torch.nn.Linear(16, 97, bias=False)
    hidden = torch.randn(6, 16, requires_grad=True)
    return {
        "model": tiny_model(),
        "args": transformers.TrainingArguments(
            str(tmp_path / "trained"), per_device_train_batch_size=16, max_steps=1, use_cpu=True, report_to=[]
        ),
        "dataset": datasets.Dataset.from_list(tiny_samples(16)),
        "tokenizer": byte_tokenizer(),
        "TheTrainerYouUse": transformers.Trainer,
        "head": head,
        "hidden": hidden,
        "logits": head(hidden.detach()),
        "labels": torch.tensor([1, 5, -100, 7, 96, 0]),
        "keep": torch.tensor([1.0, 0, 0, 1, 1, 0]),
    }


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_snippets(page, beside, names, pytestconfig, monkeypatch, one_thread):
    text = page.read_text()
    assert re.findall(r"^ {4}\S.*", FENCE.sub("", text), re.MULTILINE) == [], "a snippet without a fence"
    assert text.count("```") == 2 * len(blocks(text))
    for language, snippet in blocks(text):
        if language == "python":
            exec(compile(snippet, str(page), "exec", dont_inherit=True), names)
        elif language == "sh":
            for line in command_lines(snippet):
                run(line, beside, pytestconfig)
        else:
            assert language == "text", f"{page.name}: a snippet in {language or 'no language'}"
    for line in inline_commands(text):
        parse(line, pytestconfig)
    if page.name == "README.md":
        assert names["trainer"].qtuning_summary()["samples_kept"] == 2
        assert len(names["samples"]) == len(ROWS)
        assert (beside / "plane.html").exists() or (beside / "report.html").exists()
        assert 0 < len((beside / "pruned.jsonl").read_text().splitlines()) < len(ROWS)


@pytest.mark.parametrize(
    "line",
    ["qtuning train --no-such-flag", "make no-such-target", "make train NOTHING=1", "pip install '.[nothing]'",
     "python -m benchmarks.step --no-such", "pytest --no-such", "pytest tests/nothing", "torchrun -m other",
     "cargo build"],
)  # fmt: skip
def test_what_no_parser_takes_fails(line, pytestconfig):
    with pytest.raises((AssertionError, SystemExit)):
        parse(line, pytestconfig)


def test_the_policy_in_the_page_is_the_example():
    example = (ROOT / "examples/own_policy.py").read_text()
    assert any(example.endswith(snippet) for _, snippet in blocks((ROOT / "docs/policies.md").read_text()))
