"""Data-parallel runs over gloo on this machine: the same step as one process with the same pool."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from qtuning_kernels.data.samples import to_sample
from qtuning_kernels.run_record.reader import read_record
from qtuning_kernels.training.distributed import balance_by_tokens
from qtuning_kernels.training.mixin import STATE_FILE
from tests.processes import ROOT, run_processes


def launch(output, processes, *options, timeout=240):
    output.mkdir(exist_ok=True)
    worker = ROOT / "tests/training/distributed_worker.py"
    return run_processes(worker, output, *options, processes=processes, timeout=timeout)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    output = tmp_path_factory.mktemp("runs") / "alone"
    run = launch(output, 1, "--pool", "16")
    assert run.returncode == 0, run.stderr[-2000:]
    return output


def result(output):
    return json.loads((output / "result.json").read_text())


@pytest.mark.parametrize("processes", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_many_processes_take_the_step_of_one(alone, tmp_path, processes):
    output = tmp_path / "many"
    run = launch(output, processes, "--pool", "16")
    assert run.returncode == 0, run.stderr[-2000:]

    def kept(folder):
        samples = read_record(folder / "record").samples
        return [set(rows[rows["keep"]].id) for _, rows in samples.groupby("step")]

    assert kept(output) == kept(alone)
    assert all(len(ids) == 8 for ids in kept(alone))  # two pools a step, four of sixteen each
    expected, actual = load_file(alone / "w"), load_file(output / "w")
    for name, weight in actual.items():
        torch.testing.assert_close(weight, expected[name], rtol=1e-6, atol=1e-9)
    assert result(output)["losses"] == pytest.approx(result(alone)["losses"], rel=1e-4)
    ours, theirs = result(output)["summary"], result(alone)["summary"]
    for name in ("samples_seen", "samples_kept", "tokens_seen", "tokens_kept", "quadrant"):
        assert ours[name] == theirs[name], name


@pytest.mark.slow
def test_many_processes_weigh_the_loss_as_one(tmp_path):
    """A weighted loss is a mean over all tokens of the step, those of the other processes included."""
    for folder, processes in (("alone", 1), ("many", 2)):
        run = launch(tmp_path / folder, processes, "--pool", "16", "--policy", "infobatch")
        assert run.returncode == 0, run.stderr[-2000:]
    expected, actual = (load_file(tmp_path / folder / "w") for folder in ("alone", "many"))
    for name, weight in actual.items():
        torch.testing.assert_close(weight, expected[name], rtol=1e-6, atol=1e-9)
    assert result(tmp_path / "many")["losses"] == pytest.approx(result(tmp_path / "alone")["losses"], rel=1e-4)


def test_each_process_selects_from_its_own_pool(tmp_path):
    """selection_scope="rank": of each of two pools of eight, two are kept by each process. A checkpoint has the scores
    of both: those of rank 0 alone were saved."""
    output = tmp_path / "rank"
    run = launch(output, 2, "--pool", "16", "--scope", "rank", "--rescore-every", "2", "--save-steps", "5")
    assert run.returncode == 0, run.stderr[-2000:]
    assert result(output)["summary"]["samples_kept"] == 5 * 2 * 2 * 2
    seen = set(read_record(output / "record").samples.id)
    with safe_open(output / "checkpoint-5" / STATE_FILE, framework="pt") as state:
        assert {str(i) for i in json.loads(state.metadata()["ids"])} == {str(i) for i in seen}
    assert len(seen) == 5 * 2 * 16


def test_a_process_with_nothing_left_takes_part(tmp_path):
    """A shared pool of two keeps one sample: one process trains, the other joins with a loss of 0."""
    output = tmp_path / "nothing"
    run = launch(output, 2, "--pool", "2", "--accumulation", "1")
    assert run.returncode == 0, run.stderr[-2000:]
    assert result(output)["summary"]["samples_kept"] == 5
    assert all(sorted(pair)[0] == 0 < sorted(pair)[1] for pair in zip(*result(output)["tokens"], strict=True))


@pytest.mark.parametrize("wrapper", ["ddp", pytest.param("fsdp2", marks=pytest.mark.slow)])
def test_collectives_of_a_step(tmp_path, wrapper):
    """Two pools a step, each in several micro-batches: gradients are reduced once. Under FSDP2 each pool's last
    micro-batch reduced them, since the context that defers the ones before ends with reductions on."""
    output = tmp_path / "counted"
    run = launch(output, 2, "--pool", "16", "--accumulation", "2", "--count", "--wrapper", wrapper)
    assert run.returncode == 0, run.stderr[-2000:]
    counts = result(output)["collectives"]
    objects = 3  # scores of the pools, all kept samples, the accounts; of two collectives each: sizes and bytes
    hosts = 2  # numbers of labels, of the batches that came and of those they were cut to
    if wrapper == "ddp":
        assert counts.pop("c10d::allreduce_") == 1  # one bucket of gradients
        assert counts.pop("c10d::broadcast_") == 1  # buffers, before the forward that synchronises
    else:
        assert counts.pop("c10d::_reduce_scatter_base_") == 3  # two layers, and what is around them
        assert counts.pop("c10d::allreduce_") == 1  # the norm of the gradients
        assert counts.pop("c10d::_allgather_base_") > 0  # parameters
        objects += 3  # the number of scoring forwards, and of either pool's micro-batches
    assert counts == {"c10d::allgather_": 2 * objects + hosts}


@pytest.mark.parametrize("processes", [2, 4, 8])
def test_processes_carry_about_equal_numbers_of_tokens(processes):
    """Eight kept samples a process, lengths as in GSM8K (log-normal around 200): the longest load is at
    most a tenth over the mean."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        lengths = (torch.randn(8 * processes, generator=generator) * 0.4 + 5.3).exp().int().tolist()
        shards = balance_by_tokens([to_sample([1] * n, [1] * n, n) for n in lengths], processes)
        loads = [sum(len(s.trimmed().input_ids) for s in hand) for hand in shards]
        assert sum(map(len, shards)) == 8 * processes
        assert max(loads) <= 1.1 * sum(loads) / processes


def test_a_killed_process_ends_the_others(tmp_path):
    run = launch(tmp_path / "killed", 2, "--pool", "16", "--kill-rank", "1", timeout=120)
    assert run.returncode != 0
    assert "SIGKILL" in run.stderr or "Signal 9" in run.stderr
