"""SIGKILL at an arbitrary moment, also while a checkpoint is being written, then the same final weights."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from qtuning_kernels.run_record.reader import read_record

ROOT = Path(__file__).parents[2]


def start(output, mode):
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "tests/training/kill_worker.py"), str(output), mode]
    return subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    output = tmp_path_factory.mktemp("whole")
    run = start(output, "fresh")
    _, errors = run.communicate(timeout=200)
    assert run.returncode == 0, errors[-2000:]
    return output


@pytest.mark.parametrize("checkpoint", [6, pytest.param(15, marks=pytest.mark.slow)])
def test_killed_and_resumed(uninterrupted, tmp_path, checkpoint):
    run = start(tmp_path, "fresh")
    deadline = time.monotonic() + 120
    while not (tmp_path / f"checkpoint-{checkpoint}").exists():  # appears when its first file is written
        assert run.poll() is None, run.stderr.read()[-2000:]
        assert time.monotonic() < deadline
        time.sleep(0.001)
    run.send_signal(signal.SIGKILL)
    run.wait()
    assert not (tmp_path / "model.safetensors").exists()

    again = start(tmp_path, "resume")
    _, errors = again.communicate(timeout=200)
    assert again.returncode == 0, errors[-2000:]
    expected = load_file(uninterrupted / "model.safetensors")
    actual = load_file(tmp_path / "model.safetensors")
    assert all(torch.equal(actual[name], expected[name]) for name in expected)

    whole, resumed = (read_record(folder / "record") for folder in (uninterrupted, tmp_path))
    columns = ["step", "id", "ppl", "entropy", "quadrant", "keep", "kept_tokens"]
    assert resumed.samples[columns].equals(whole.samples[columns])
    assert resumed.steps.step.tolist() == list(range(1, 41))
