"""`qtuning train --resume`: what goes on, what is finished, and what is refused."""

import json
import shutil
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from qtuning_kernels.__main__ import main as command_line
from qtuning_kernels.commands import cli
from qtuning_kernels.training.checkpoints import latest_checkpoint

from .conftest import record


def weights(folder):
    return load_file(Path(folder) / "model.safetensors")


@pytest.mark.parametrize("killed_after", [pytest.param(1, marks=pytest.mark.slow), 5])
def test_killed_and_resumed_is_as_if_uninterrupted(options, tmp_path, killed_after):
    """Before the first checkpoint, and behind one. The run has 12 steps.

    The precision is fixed: a measurement at the start may choose differently for the two runs, whose weights then
    differ in their last bits.
    """
    arguments = [*options, "--batch-size", "8", "--epochs", "4", "--save-steps", "3", "--learning-rate", "0.01"]
    arguments += ["--matmul", "default", "--score-dtype", "model"]
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    command = [sys.executable, "-m", "qtuning_kernels", "train", *arguments, "--output", str(broken)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    steps = broken / "record" / "steps.jsonl"
    while process.poll() is None:
        if steps.exists() and steps.read_bytes().count(b"\n") >= killed_after:
            process.send_signal(signal.SIGKILL)
            break
        time.sleep(0.001)
    assert process.wait() == -signal.SIGKILL, process.stdout.read()
    assert not (broken / "final").exists()

    # with the run's own options
    assert cli.main(["train", "--output", str(broken), "--resume"]) == 0
    assert cli.main(["train", *arguments, "--output", str(whole)]) == 0
    resumed, uninterrupted = weights(broken / "final"), weights(whole / "final")
    assert resumed.keys() == uninterrupted.keys()
    for name, tensor in uninterrupted.items():
        assert torch.equal(resumed[name], tensor), name
    assert [(row["step"], row["id"], row["keep"]) for row in record(broken)] == [
        (row["step"], row["id"], row["keep"]) for row in record(whole)
    ]


def test_a_finished_run_that_is_resumed_stays_as_it_is(options, tmp_path, capsys):
    """Its summary was written again, with the seconds and losses of no step at all."""
    output = tmp_path / "run"
    arguments = ["train", *options, "--output", str(output), "--save-steps", "2"]
    assert cli.main([*arguments, "--max-steps", "2"]) == 0
    files = [output / "summary.json", output / "final" / "model.safetensors"]
    before = [(file.read_bytes(), file.stat().st_mtime_ns) for file in files]
    assert cli.main(["train", "--output", str(output), "--resume"]) == 0
    assert f"the run in {output} is finished" in capsys.readouterr().out
    assert [(file.read_bytes(), file.stat().st_mtime_ns) for file in files] == before
    assert cli.main(["train", "--output", str(output), "--resume", "--max-steps", "3"]) == 0  # more of it
    assert json.loads(files[0].read_text())["steps"] == 3


def test_a_finished_run_goes_on_for_more_epochs(options, tmp_path):
    output = tmp_path / "run"
    assert cli.main(["train", *options, "--output", str(output), "--epochs", "1"]) == 0
    assert json.loads((output / "summary.json").read_text())["steps"] == 2
    assert cli.main(["train", "--output", str(output), "--resume", "--epochs", "2", "--gradient-checkpointing"]) == 0
    assert json.loads((output / "summary.json").read_text())["steps"] == 4
    seen = [row["id"] for row in record(output)]
    assert sorted(seen[:24]) == sorted(seen[24:]) == list(range(24))


def test_a_finished_run_without_its_checkpoints_is_not_made_again(options, tmp_path, capsys):
    """They may be deleted, as the page for laptops says; the final model went with a run from the beginning."""
    output = tmp_path / "run"
    assert cli.main(["train", *options, "--output", str(output), "--save-steps", "2", "--max-steps", "2"]) == 0
    for folder in output.glob("checkpoint-*"):
        shutil.rmtree(folder)
    before = {file: file.read_bytes() for file in output.rglob("*") if file.is_file()}
    assert cli.main(["train", "--output", str(output), "--resume"]) == 0
    assert f"the run in {output} is finished" in capsys.readouterr().out
    assert cli.main(["train", "--output", str(output), "--resume", "--max-steps", "3"]) == 1
    assert f"the run in '{output}' is finished, and has no checkpoint to go on from" in capsys.readouterr().err
    assert {file: file.read_bytes() for file in output.rglob("*") if file.is_file()} == before


def test_a_checkpoint_that_lacks_a_file_or_part_of_one_is_passed_over(options, tmp_path):
    output = tmp_path / "run"
    arguments = ["train", *options, "--output", str(output), "--save-steps", "1", "--save-total-limit", "9"]
    assert cli.main([*arguments, "--max-steps", "7"]) == 0
    newest = [output / f"checkpoint-{step}" for step in range(7, 1, -1)]
    missing = ["optimizer.pt", "scheduler.pt", "rng_state.pth"]
    cut = ["model.safetensors", "scheduler.pt", "trainer_state.json"]
    for folder, name in zip(newest[:3], missing, strict=True):
        (folder / name).unlink()
    for file in (folder / name for folder, name in zip(newest[3:], cut, strict=True)):
        file.write_bytes(file.read_bytes()[:-100])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert latest_checkpoint(output) == output / "checkpoint-1"
    defects = [*(f"{name} is missing" for name in missing), *(f"{name} is cut short" for name in cut)]
    told = [str(warning.message) for warning in caught]
    assert told == [
        f"{folder} is incomplete and passed over: {defect}" for folder, defect in zip(newest, defects, strict=True)
    ]


def test_a_disk_that_is_full_at_a_checkpoint(options, tmp_path, monkeypatch, capsys):
    """Its optimizer lies on the device that is always full; the run ends in a line, and goes on from the one before."""
    from transformers import Trainer

    output, save = tmp_path / "run", Trainer._save_optimizer_and_scheduler

    def full(self, folder):
        if Path(folder).name == "checkpoint-2":
            (Path(folder) / "optimizer.pt").symlink_to("/dev/full")
        return save(self, folder)

    with monkeypatch.context() as patched:
        patched.setattr(Trainer, "_save_optimizer_and_scheduler", full)
        assert cli.main(["train", *options, "--output", str(output), "--save-steps", "1", "--max-steps", "3"]) == 1
    lines = [line for line in capsys.readouterr().err.splitlines() if "warning" not in line]
    assert len(lines) == 1
    assert lines[0].startswith("qtuning: error: no space is left on the disk; what was complete stays")
    assert not (output / "final").exists()
    (output / "checkpoint-2" / "optimizer.pt").unlink()  # there is space again
    assert cli.main(["train", "--output", str(output), "--resume"]) == 0
    assert json.loads((output / "summary.json").read_text())["steps"] == 3


def test_an_interrupted_run_ends_in_a_line_and_goes_on(options, tmp_path, monkeypatch, capsys):
    from qtuning_kernels.commands.panel import RunPanel

    output, on_step_end = tmp_path / "run", RunPanel.on_step_end

    def interrupted(self, arguments, state, *rest, **more):
        if state.global_step == 2:
            signal.raise_signal(signal.SIGINT)
        return on_step_end(self, arguments, state, *rest, **more)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a background process has it ignored
    try:
        with monkeypatch.context() as patched:
            patched.setattr(RunPanel, "on_step_end", interrupted)
            arguments = ["--output", str(output), "--save-steps", "1", "--max-steps", "3"]
            assert command_line(["train", *options, *arguments]) == 130
    finally:
        signal.signal(signal.SIGINT, before)
    assert capsys.readouterr().err.splitlines()[-1] == "qtuning: interrupted"
    assert cli.main(["train", "--output", str(output), "--resume"]) == 0
    assert json.loads((output / "summary.json").read_text())["steps"] == 3


def test_a_folder_without_a_run_is_not_resumed(options, tmp_path, capsys):
    other = tmp_path / "other"
    other.mkdir()
    (other / "notes.txt").write_text("mine")
    assert cli.main(["train", *options, "--output", str(other), "--resume"]) == 1
    assert f"nothing to resume: {other} has neither options.json nor a checkpoint" in capsys.readouterr().err
    assert [f.name for f in other.iterdir()] == ["notes.txt"]


def test_a_run_is_resumed_with_its_own_options_alone(options, data, tmp_path, capsys):
    """Other data, model, seed, pool or ratios went on under the old optimizer, and --learning-rate had no effect."""
    output = tmp_path / "run"
    arguments = ["train", "--output", str(output)]
    assert cli.main([*arguments, *options, "--max-steps", "1", "--batch-size", "8"]) == 0
    files = {file: file.read_bytes() for file in output.rglob("*") if file.is_file()}
    other = shutil.copy(data, tmp_path / "other.jsonl")
    changes = {"--data": other, "--model": "./other", "--seed": "7", "--batch-size": "4", "--sample-ratio": "0.5"}
    changes |= {"--token-ratio": "0.9", "--lora-rank": "2", "--learning-rate": "0.1", "--eval-share": "0.5"}
    changes |= {"--weight-decay": "0.1", "--lr-scheduler-type": "linear"}  # not given before; the checkpoint's win
    for option, changed in changes.items():
        assert cli.main([*arguments, "--resume", option, str(changed)]) == 1
        error = capsys.readouterr().err
        assert f"error: {option} is " in error
        assert f"and the run in '{output}' has " in error
    assert {file: file.read_bytes() for file in output.rglob("*") if file.is_file()} == files
    assert cli.main([*arguments, "--resume"]) == 0
    assert f"the run in {output} is finished" in capsys.readouterr().out
    assert {file: file.read_bytes() for file in output.rglob("*") if file.is_file()} == files
    assert cli.main([*arguments, "--resume", "--max-steps", "2"]) == 0


def test_a_data_file_that_was_edited_is_not_gone_on_with(options, data, tmp_path, capsys):
    """The same option, other samples: the order of what is left was made for those before."""
    file = Path(shutil.copy(data, tmp_path / "own.jsonl"))
    arguments = ["train", *options, "--data", str(file), "--output", str(tmp_path / "run"), "--eval-share", "0.1"]
    assert cli.main([*arguments, "--max-steps", "1"]) == 0
    rows = file.read_text().splitlines(keepends=True)
    file.write_text("".join(rows[1:]))
    assert cli.main([*arguments, "--resume", "--max-steps", "2"]) == 1
    assert f"other samples than those that the run in '{tmp_path}/run' began with" in capsys.readouterr().err
    file.write_text("".join(rows))
    assert cli.main([*arguments, "--resume", "--max-steps", "2"]) == 0
