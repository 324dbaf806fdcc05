"""`qtuning train` as several processes, started by torchrun and accelerate: one voice, one writer, one verdict."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tests.processes import run_processes

MODULE = ("-m", "qtuning_kernels")
WORKER = (Path(__file__).with_name("sharded_worker.py"),)
STEPS = ["--batch-size", "4", "--use-cpu", "--learning-rate", "0.01", "--max-steps", "3", "--save-steps", "2"]
FIXED = ["--matmul", "default", "--score-dtype", "model"]  # a measurement may choose differently for each run
# "--cpu" would start mpirun, or one process
ACCELERATE = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1",
              "--num_cpu_threads_per_process", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]  # fmt: skip


def succeeded(run):
    assert run.returncode == 0, run.stderr[-3000:]
    return run.stdout


def ours(run):
    return [line for line in run.stderr.splitlines() if line.startswith(("qtuning: ", "qtuning train: "))]


def rows(output, table):
    return [json.loads(line) for line in (output / "record" / table).open()]


def weights(output):
    return load_file(output / "final" / "model.safetensors")


def assert_one_run(output, shown):
    """Two pools of four in each of three steps, of which a quarter is kept; everything said and written once."""
    assert shown.count("24 records read, 0 skipped, 0 truncated") == 1
    assert shown.count("6 of 24 (25.0%)") == 1
    assert sum(line.startswith("step ") for line in shown.splitlines()) == 3
    assert sorted(row["id"] for row in rows(output, "samples.jsonl")) == list(range(24))
    assert [row["step"] for row in rows(output, "steps.jsonl")] == [1, 2, 3]
    assert len(rows(output, "texts.jsonl")) == 24
    assert json.loads((output / "summary.json").read_text())["samples_kept"] == 6


def test_one_voice_one_writer_one_verdict(options, tmp_path):
    output = tmp_path / "run"
    arguments = [*MODULE, "train", *options, *STEPS, "--output", output]
    assert_one_run(output, succeeded(run_processes(*arguments, cwd=tmp_path)))
    assert AutoModelForCausalLM.from_pretrained(output / "final").dtype == torch.float32

    again = run_processes(*arguments, cwd=tmp_path, timeout=120)
    assert again.returncode != 0
    (error,) = ours(again)
    assert f"output '{output}' is not empty; give another --output, or --resume" in error
    assert again.stdout == ""


LEAVING_BADLY = """
import os, sys, time
from qtuning_kernels.commands import cli, train
write = train._write_json
def slowly(path, content):
    time.sleep(4 * (path.name == train.SUMMARY_FILE))
    write(path, content)
train._write_json = slowly
sys.exit(cli.main(sys.argv[1:]) or int(os.environ["RANK"]))
"""


@pytest.mark.slow
def test_what_the_first_writes_is_whole_when_another_ends_badly(options, tmp_path):
    """A launcher ends all processes once one has failed, as one may while Python takes it down."""
    script = tmp_path / "leaving_badly.py"
    script.write_text(LEAVING_BADLY)
    run = run_processes(script, "train", *options, *STEPS, "--output", tmp_path / "run", cwd=tmp_path)
    assert run.returncode != 0
    assert_one_run(tmp_path / "run", run.stdout)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--sample-ratio", "3"], "qtuning: error: --sample-ratio is 3.0; accepted: a number in (0, 1]"),
        (["--batch-size", "much"], "qtuning train: error: argument --batch-size/--per-device-train-batch-size: "),
        (["--data", "no.jsonl"], "qtuning: error: data 'no.jsonl': no such file or folder"),
        (
            ["--fsdp"],
            "qtuning: error: fsdp is set, and accelerate, which has none on CPUs, passes over it; accepted: without it",
        ),
    ],
)
def test_what_fails_in_all_is_said_once(options, tmp_path, more, message):
    """Before the processes meet, where the second could end the first before it has spoken, and after."""
    run = run_processes(*MODULE, "train", *options, *STEPS, *more, "--output", tmp_path / "run", timeout=120)
    assert run.returncode != 0
    assert run.stderr.count(message) == 1
    assert sum(" error: " in line for line in ours(run)) == 1
    assert not list(tmp_path.glob("run/*"))  # and nothing is in the way of another try


@pytest.mark.slow
def test_other_commands_run_in_one_process(options, tmp_path):
    run = run_processes(*MODULE, "score", *options, cwd=tmp_path, timeout=120)
    assert run.returncode != 0
    assert ours(run) == ["qtuning: error: score runs in one process; accepted in several: train"]
    assert not (tmp_path / "plane.parquet").exists()


@pytest.mark.slow
def test_accelerate_launches_it(options, tmp_path):
    """Without --output the first process names the folder for all."""
    shown = succeeded(run_processes(*MODULE, "train", *options, *STEPS, launcher=ACCELERATE, cwd=tmp_path))
    (output,) = (tmp_path / "runs").iterdir()
    assert_one_run(output, shown)


FSDP = ["--fsdp", "--fsdp-config", '{"fsdp_version": 2, "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]}']


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A run of two processes with nothing sharded, made once."""
    made = tmp_path_factory.mktemp("plain") / "run"

    def run(arguments):
        if not made.exists():
            succeeded(run_processes(*MODULE, *arguments, "--output", made))
        return made

    return run


def wrapping(name, folder):
    """The options that shard by wrapper `name`."""
    if name == "fsdp2":
        return FSDP
    pytest.importorskip("deepspeed")
    zero = {"stage": int(name[-1]), "stage3_param_persistence_threshold": 0}
    options = {"train_micro_batch_size_per_gpu": "auto", "gradient_clipping": "auto", "zero_optimization": zero,
               "zero_allow_untested_optimizer": True}  # fmt: skip
    (folder / "zero.json").write_text(json.dumps(options))
    return ["--deepspeed", folder / "zero.json", "--optim", "adamw_torch"]


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("wrapper", ["fsdp2", "zero2", "zero3"])
def test_wrappers_train_the_same_and_resume(options, plain, tmp_path, wrapper):
    """Sharded by the options alone, against the run of two processes without; then from the second step again."""
    output, arguments = tmp_path / "run", ["train", *options, *STEPS, *FIXED]
    sharded = [*WORKER, *arguments, *wrapping(wrapper, tmp_path)]
    assert_one_run(output, succeeded(run_processes(*sharded, "--output", output)))
    first, expected = weights(output), weights(plain(arguments))
    assert all((first[name] - expected[name]).abs().max() < 2e-5 for name in expected)

    for folder in ("checkpoint-3", "final"):
        shutil.rmtree(output / folder)
    shown = succeeded(run_processes(*WORKER, "train", "--output", output, "--resume"))
    assert shown.count(f"resuming from {output}/checkpoint-2") == 1
    assert all(torch.allclose(weights(output)[name], first[name], rtol=0, atol=1e-7) for name in first)
    assert [row["step"] for row in rows(output, "steps.jsonl")] == [1, 2, 3]


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("wrapper", ["fsdp2", "zero3"])
def test_adapters_of_a_sharded_run_are_merged(options, tmp_path, wrapper):
    """The first process merges by itself, on weights that are whole; the others do not wait for it in vain."""
    pytest.importorskip("peft")
    output, arguments = tmp_path / "run", ["train", *options, *STEPS, *FIXED, "--lora-rank", "2", "--merge"]
    arguments += wrapping(wrapper, tmp_path)
    assert_one_run(output, succeeded(run_processes(*WORKER, *arguments, "--output", output)))
    base, merged = load_file(Path(options[1]) / "model.safetensors"), weights(output)
    assert {name: tensor.shape for name, tensor in merged.items()} == {name: t.shape for name, t in base.items()}
    assert not torch.equal(merged["model.layers.0.mlp.up_proj.weight"], base["model.layers.0.mlp.up_proj.weight"])
    assert torch.equal(merged["model.embed_tokens.weight"], base["model.embed_tokens.weight"])
