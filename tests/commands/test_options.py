"""The command line: which options there are, and the settings that they make."""

import argparse
import dataclasses
import json
import re
import typing
from pathlib import Path

import pytest
import yaml
from transformers import TrainingArguments

from qtuning_kernels import QTuningConfig
from qtuning_kernels.commands import cli, train
from qtuning_kernels.commands.options import _REFUSED, argument_texts, qtuning_config
from qtuning_kernels.config import POLICY_NAMES

# another value than the default for every field
SETTINGS = {
    "policy": "random", "policy_options": {"token_share": 0.5}, "sample_ratio": 0.25, "token_ratio": 0.75,
    "neighbor_weight": 0.125, "token_mode": "drop",
    "token_order": "keep_high", "neighbor_reduction": "mean", "triage_method": "bisect", "micro_batch_tokens": 64,
    "score_batch_tokens": 128, "score_dtype": "float32", "matmul": "default", "rescore_every": 3,
    "selection_scope": "rank", "record": False, "record_tokens": 7,
}  # fmt: skip
SCORES = {"sample_ratio", "triage_method", "score_batch_tokens", "score_dtype", "matmul"}
PRUNES = {"token_ratio", "neighbor_weight", "token_mode", "token_order", "neighbor_reduction"}


def given(name, value):
    option = f"--{name.replace('_', '-')}"
    if isinstance(value, bool):
        return [option if value else f"--no-{option[2:]}"]
    return [option, json.dumps(value) if isinstance(value, dict) else str(value)]


@pytest.mark.parametrize(
    ("command", "fields"),
    [
        ("train", {field.name for field in dataclasses.fields(QTuningConfig)}),
        ("select", SCORES | PRUNES | {"policy", "policy_options"}),
        ("score", SCORES),
    ],
)
def test_every_setting_is_an_option(command, fields):
    assert qtuning_config(cli.parse([command])) == QTuningConfig()
    chosen = {name: SETTINGS[name] for name in fields}
    arguments = cli.parse([command, *(text for name, value in chosen.items() for text in given(name, value))])
    assert qtuning_config(arguments) == QTuningConfig(**chosen)


def test_help_of_settings_is_their_documentation():
    texts = argument_texts(QTuningConfig)
    assert texts.keys() == SETTINGS.keys()
    assert texts["sample_ratio"] == "share of a selection pool that is kept, in (0, 1]"
    assert texts["micro_batch_tokens"].endswith("in one training forward and backward. A longer sample goes alone")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--policy", "rendom"], "--policy is 'rendom'; accepted: full, random"),
        (["--policy", "nowhere:policy"], "policy is 'nowhere:policy', and it cannot be imported"),
        (["--policy", "json:loads"], "policy is <function loads"),
        (["--policy-options", '{"share": 1}'], "policy_options has ['share']; accepted for qtuning: ["),
        (["--policy", "random", "--policy-options", '{"token_share": 0}'], "token_share is 0; accepted"),
        (["--policy", "rho1"], "--policy rho1 needs the scores of another model; accepted: --reference-model or"),
        (["--reference-scores", "x"], "--policy qtuning reads no scores of another model; accepted: neither"),
    ],
)
@pytest.mark.parametrize("command", ["train", "select"])
def test_a_bad_policy_is_refused_before_anything_is_loaded(command, options, message, capsys):
    assert cli.main([command, "--model", "./nowhere", *options]) == 1
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("command", ["train", "score", "select"])
def test_a_bad_setting_names_the_option_before_anything_is_loaded(command, capsys):
    """`score` used to refuse a ratio after its scoring pass, without the option's name."""
    for option, accepted in (
        ("--sample-ratio", "a number in (0, 1]"),
        ("--score-batch-tokens", "an integer of at least 1"),
    ):
        assert cli.main([command, "--model", "./nowhere", option, "0"]) == 1
        assert f"qtuning: error: {option} is 0" in (error := capsys.readouterr().err)
        assert f"; accepted: {accepted}" in error


def training_arguments(tmp_path, *more):
    return train._training_arguments(cli.parse(["train", *more]), tmp_path)


# values of fields that take structures, or one of a few texts
FIELDS = {
    "lr_scheduler_type": "linear", "lr_scheduler_kwargs": {"num_cycles": 2}, "optim": "sgd",
    "optim_target_modules": ["q_proj", "v_proj"], "activation_checkpointing_kwargs": {"use_reentrant": False},
    "gradient_checkpointing_kwargs": {"use_reentrant": True}, "liger_kernel_config": {"rope": False},
    "logging_strategy": "epoch", "include_num_input_tokens_seen": "all", "log_level": "error",
    "log_level_replica": "info", "report_to": ["tensorboard", "wandb"], "trackio_static_space_id": False,
    "eval_strategy": "epoch", "include_for_metrics": ["inputs", "loss"], "save_strategy": "epoch",
    "hub_strategy": "end", "accelerator_config": {"split_batches": True},
    "parallelism_config": {"dp_replicate_size": 2}, "dataloader_multiprocessing_context": "spawn",
    "label_names": ["labels", "others"], "train_sampling_strategy": "sequential", "ddp_backend": "gloo",
    "fsdp": True, "fsdp_config": {"fsdp_version": 2}, "deepspeed": {"zero_optimization": {"stage": 2}},
    "debug": ["underflow_overflow"],
}  # fmt: skip
HINTS = typing.get_type_hints(TrainingArguments)


def another(field):
    """A value of the field's type that is not its default."""
    kinds = typing.get_args(HINTS[field.name]) or (HINTS[field.name],)
    if field.name in FIELDS:
        return FIELDS[field.name]
    if bool in kinds:
        return not field.default
    number = next((kind for kind in (int, float) if kind in kinds), None)
    return "some text" if number is None else number(3) if number is int else 0.375


def spelt(name, value):
    """On the command line."""
    if name == "fsdp":
        return ["--fsdp"]
    if isinstance(value, list) and HINTS[name] in (list[str], list[str] | None):
        return [f"--{name.replace('_', '-')}", *value]
    if name == "trackio_static_space_id":
        return ["--trackio-static-space-id", "false"]
    return given(name, json.dumps(value) if isinstance(value, list) else value)


@pytest.mark.parametrize("field", dataclasses.fields(TrainingArguments), ids=lambda field: field.name)
def test_every_field_of_training_arguments_arrives(field, tmp_path, monkeypatch):
    """From the command line, from a file, and under the field's own spelling. A field of a new type fails here."""
    monkeypatch.setattr(TrainingArguments, "__post_init__", lambda self: setattr(self, "deepspeed_plugin", None))
    value, config = another(field), tmp_path / "c.json"
    config.write_text(json.dumps({field.name: value}))
    option, *rest = spelt(field.name, value)
    for arguments in (["--config", str(config)], [option, *rest], [f"--{option[2:].replace('-', '_')}", *rest]):
        arguments = [*arguments, "--output-dir", value] if field.name == "output_dir" else arguments
        if field.name in _REFUSED:
            with pytest.raises(ValueError, match=f"--{field.name.replace('_', '-')} is not taken; accepted: "):
                training_arguments(tmp_path, *arguments)
            continue
        parsed = cli.parse(["train", *arguments])
        made = getattr(train._training_arguments(parsed, parsed.output or tmp_path), field.name)
        if field.name == "parallelism_config":
            made = {"dp_replicate_size": made.dp_replicate_size}
        assert made == value, arguments
        assert type(made) is type(value), arguments


def test_fields_of_training_arguments_by_their_own_names(tmp_path):
    made = training_arguments(
        tmp_path, "--weight-decay", "0.1", "--gradient-checkpointing", "--lr-scheduler-type", "linear",
        "--logging-steps", "5", "--dataloader-num-workers", "2", "--no-logging-nan-inf-filter",
        "--lr-scheduler-kwargs", '{"a": 1}', "--num-train-epochs", "2", "--per-device-train-batch-size", "4",
    )  # fmt: skip
    assert (made.weight_decay, made.logging_steps, made.dataloader_num_workers) == (0.1, 5, 2)
    assert made.lr_scheduler_type == "linear"
    assert made.gradient_checkpointing is True
    assert made.logging_nan_inf_filter is False
    assert made.lr_scheduler_kwargs == {"a": 1}
    assert (made.num_train_epochs, made.per_device_train_batch_size) == (2, 4)


def test_defaults_of_training(tmp_path):
    made = training_arguments(tmp_path)
    assert (made.lr_scheduler_type, made.warmup_steps, made.logging_steps) == ("cosine", 0.03, 1)
    assert (made.per_device_train_batch_size, made.learning_rate, made.save_steps, made.seed) == (16, 2e-5, 50, 42)
    assert (made.max_steps, made.bf16, made.report_to, made.weight_decay) == (-1, False, [], 0.0)


def test_a_value_that_a_field_does_not_take_ends_with_2(capsys):
    for wrong in (["--weight-decay", "much"], ["--lr-scheduler-type", "round"]):
        with pytest.raises(SystemExit) as ended:
            cli.main(["train", *wrong])
        assert ended.value.code == 2
        error = capsys.readouterr().err
        assert wrong[0] in error.splitlines()[-1]
        assert "--adam-beta1" not in error  # the usage stays short


def shown(capsys, *arguments):
    with pytest.raises(SystemExit) as ended:
        cli.main(arguments)
    assert ended.value.code == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("command", [None, *cli._subparsers(cli.build_parser())])
def test_help_fits_two_screens(command, monkeypatch, capsys):
    """Of 24 lines of 80 columns."""
    monkeypatch.setenv("COLUMNS", "80")
    lines = shown(capsys, *filter(None, [command]), "--help").splitlines()
    assert len(lines) <= 48
    assert max(map(len, lines)) <= 80


@pytest.mark.parametrize("command", ["train", "score", "select"])
def test_help_all_shows_every_option(command, capsys):
    whole, short = shown(capsys, command, "--help-all"), shown(capsys, command, "--help")
    for field in SETTINGS if command == "train" else SCORES:
        assert f"--{field.replace('_', '-')}" in whole
    assert "--score-dtype" not in short
    assert "--attn-implementation" in short
    if command == "train":
        for field in dataclasses.fields(TrainingArguments):
            named = re.search(rf"--{field.name.replace('_', '-')}(?![\w-])", whole) is not None
            assert named != (field.name in _REFUSED), field.name
        assert "Weight decay" in whole
        assert "(default: cosine)" in " ".join(whole.split())
        assert "--adam-beta1" not in short
        for option in ("--learning-rate", "--gradient-checkpointing", "--lora-target", "--merge", "--help-all"):
            assert option in short


def test_config_files_take_the_same_names(tmp_path):
    config = tmp_path / "c.yaml"
    config.write_text(
        "weight-decay: 0.1\nlr_scheduler_kwargs: {num_cycles: 2}\nrecord: false\nrescore_every: 2\n"
        "num_train_epochs: 3\ngradient_checkpointing: true\n"
    )
    arguments = cli.parse(["train", "--config", str(config), "--rescore-every", "4"])
    assert qtuning_config(arguments) == QTuningConfig(record=False, rescore_every=4)
    made = train._training_arguments(arguments, tmp_path)
    assert (made.weight_decay, made.lr_scheduler_kwargs, made.num_train_epochs) == (0.1, {"num_cycles": 2}, 3)
    assert made.gradient_checkpointing is True
    config.write_text("report_to: [tensorboard]\nlabel_names: labels\nlora-target: [q_proj]\n")
    arguments = cli.parse(["train", "--config", str(config)])
    assert (arguments.report_to, arguments.label_names) == (["tensorboard"], ["labels"])
    assert arguments.lora_target == ["q_proj"]
    config.write_text("epochs: 1\nnum_train_epochs: 2\n")
    with pytest.raises(cli.UsageError, match="num_train_epochs is a second value of --epochs"):
        cli.parse(["train", "--config", str(config)])
    config.write_text("weight_decay: [0.1]")
    with pytest.raises(cli.UsageError, match=r"weight_decay is \[0.1\]; accepted: one text or number"):
        cli.parse(["train", "--config", str(config)])
    config.write_text("no-record: true")
    with pytest.raises(cli.UsageError, match="unknown key 'no-record'"):
        cli.parse(["train", "--config", str(config)])


def test_the_papers_settings_are_accepted(tmp_path):
    """examples/paper.yaml through the real parser, which refuses unknown keys; docs/method.md has the values."""
    file = Path(__file__).parents[2] / "examples" / "paper.yaml"
    arguments = cli.parse(["train", "--config", str(file)])
    expected = {"sample_ratio": 0.125, "token_ratio": 0.5, "neighbor_weight": 0.5, "triage_method": "bisect"}
    config = qtuning_config(arguments)
    assert config == QTuningConfig(**expected, token_mode="drop", token_order="keep_low", selection_scope="rank")
    made = train._training_arguments(arguments, tmp_path)
    assert (made.per_device_train_batch_size, made.gradient_accumulation_steps, made.num_train_epochs) == (8, 4, 3)
    assert (made.learning_rate, made.lr_scheduler_type, made.warmup_steps) == (1e-4, "cosine", 0)
    assert (arguments.lora_rank, arguments.cutoff, made.gradient_checkpointing) == (8, 2048, True)
    for name, value in yaml.safe_load(file.read_text()).items():
        option = cli._subparsers(cli.build_parser())["train"]._option_string_actions.get(f"--{name.replace('_', '-')}")
        assert getattr(arguments, option.dest if option else name) == value


def test_the_papers_settings_train(model, data, tmp_path):
    file, output = Path(__file__).parents[2] / "examples" / "paper.yaml", tmp_path / "run"
    given = ["--model", str(model), "--data", str(data), "--output", str(output)]
    assert cli.main(["train", "--config", str(file), *given]) == 0
    summary = json.loads((output / "summary.json").read_text())
    assert (summary["steps"], summary["samples_seen"], summary["samples_kept"]) == (3, 3 * 24, 3 * 3)  # 1 of each 8
    assert (output / "final" / "adapter_model.safetensors").exists()


def test_a_resumed_run_goes_on_with_every_option(tmp_path):
    chosen = ["--weight-decay", "0.1", "--no-record", "--token-mode", "drop", "--lr-scheduler-kwargs", '{"a": 1}']
    first = cli.parse(["train", *chosen, "--output", str(tmp_path)])
    (tmp_path / train.OPTIONS_FILE).write_text(json.dumps(train._options(first)))
    again = cli.parse(["train", "--output-dir", str(tmp_path), "--resume"])
    assert again == argparse.Namespace(**vars(first) | {"resume": True})


@pytest.mark.parametrize("command", ["score", "select"])
@pytest.mark.parametrize("link", ["itself", "symbolic", "hard"])
@pytest.mark.parametrize("given", ["data", "model", "config"])
def test_an_output_that_is_an_input_is_refused(command, link, given, options, model, data, tmp_path, capsys):
    """Each command ended with 0 and its input was gone."""
    config = tmp_path / "c.yaml"
    config.write_text("sample-ratio: 0.5\n")
    file = {"data": data, "model": model / "model.safetensors", "config": config}[given]
    output, before = tmp_path / "output", file.read_bytes()
    if link == "itself":
        output = file
    elif link == "symbolic":
        output.symlink_to(file)
    else:
        output.hardlink_to(file)
    assert cli.main([command, *options, "--config", str(config), "--output", str(output)]) == 1
    error = capsys.readouterr().err
    assert f"output '{output}' is a file of the input" in error
    assert file.read_bytes() == before


@pytest.mark.parametrize("option", ["--reference-scores", "--reference-model"])
def test_a_reference_is_an_input_too(option, options, model, data, tmp_path, capsys):
    scores = tmp_path / "scores.parquet"
    assert cli.main(["score", *options, "--output", str(scores)]) == 0
    given, file = (scores, scores) if option == "--reference-scores" else (model, model / "model.safetensors")
    before = file.read_bytes()
    arguments = ["select", *options, "--policy", "rho1", option, str(given), "--output", str(file)]
    assert cli.main(arguments) == 1
    assert f"output '{file}' is a file of the input" in capsys.readouterr().err
    assert file.read_bytes() == before


def test_a_run_without_record(options, tmp_path, capsys):
    output = tmp_path / "run"
    assert cli.main(["train", *options, "--no-record", "--report", "--output", str(output)]) == 1
    assert "--report draws the record of the run; accepted: without --no-record" in capsys.readouterr().err
    assert cli.main(["train", *options, "--no-record", "--max-steps", "1", "--output", str(output)]) == 0
    assert not (output / "record").exists()
    assert "qtuning report" not in capsys.readouterr().out


def test_every_policy_is_listed(capsys):
    assert cli.main(["policies"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines if not line.startswith(" ")] == list(POLICY_NAMES)
    assert sum("QTuningTrainer only" in line for line in lines) == 4
