"""What the host waits for in a step on a GPU, on a device of the tests' own that computes on the CPU."""

import json

import pytest
import torch
import transformers

from qtuning_kernels.data.micro_batches import nothing
from qtuning_kernels.training.accounting import Clock
from tests.processes import run_processes


@pytest.fixture(scope="module")
def step():
    if transformers.__version__.startswith("5.0."):
        pytest.skip("the tests' own device has no empty_strided, with which transformers 5.0 makes its masks")
    done = run_processes("-m", "tests.training.fake_gpu_worker", processes=1)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_a_step_on_the_device_is_that_of_the_host(step):
    assert step["on_device"] == "fakegpu"
    assert step["error"] < 1e-5
    assert step["same"]


def test_the_host_waits_for_the_scores_and_for_the_loss(step):
    """transformers looks for packed samples once a forward; of our own there is one copy, and the loss at the end."""
    ours = {phase: [x for x in step[phase] if x.endswith("ours")] for phase in ("scoring", "training", "ending")}
    assert ours == {
        "scoring": ["_to_copy by ours"], "training": [], "ending": ["_local_scalar_dense by ours"],
    }  # fmt: skip
    theirs = [x for phase in ("scoring", "training") for x in step[phase] if x.endswith("transformers")]
    assert len(theirs) <= step["forwards"]
    assert step["copies"] >= 4 * step["forwards"]


def test_nothing_on_the_device_is_float64(step):
    """Apple's GPUs have none, Intel's some not."""
    assert step["float64"] == []


def test_the_check_can_fail(step):
    waits, float64 = step["noticed"]
    assert waits == ["index by ours", "_to_copy by ours", "blocking copy to the device by ours"]
    assert "_to_copy" in float64


def test_the_clock_waits_once_for_all_phases(monkeypatch):
    """Marks are made in the device's queue; nothing waits before the seconds are read."""
    made = []

    class Event:
        def __init__(self, device, enable_timing):
            assert enable_timing
            made.append(self)
            self.number, self.waits = len(made), 0

        def record(self):
            self.recorded = True

        def synchronize(self):
            self.waits += 1

        def elapsed_time(self, other):
            return 1000.0 * (other.number - self.number)

    monkeypatch.setattr(torch, "Event", Event)
    clock = Clock(torch.device("cuda"))
    with clock.phase("score"):  # marks 1 and 6
        with clock.phase("select"):  # 2 and 3
            pass
        with clock.phase("train"):  # 4 and 5
            pass
    start = clock.now()  # 7
    clock.since(start, "optimizer")
    clock.data = 0.25
    assert all(event.recorded and not event.waits for event in made)
    expected = {"data": 0.25, "score": 5.0, "select": 1.0, "train": 1.0, "optimizer": 1.0}
    assert {name: value for name, value in clock.seconds.items() if value} == expected


def test_batches_go_to_the_device_from_memory_that_stays(monkeypatch):
    """A copy from memory that may be moved waits, whatever ``non_blocking`` says."""
    pinned, sent = [], []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda x: pinned.append(x) or x)
    monkeypatch.setattr(torch.Tensor, "to", lambda x, device, non_blocking: sent.append((x, non_blocking)) or x)
    batch = nothing()
    batch.to("cuda")
    assert len(pinned) == len(sent) == sum(x is not None for x in batch)
    assert all(x is y and asynchronous for x, (y, asynchronous) in zip(pinned, sent, strict=True))
