"""The command line: which options there are, and the settings that they make."""

import argparse
import dataclasses
import json

import pytest
from transformers import TrainingArguments

from qtuning_kernels import QTuningConfig
from qtuning_kernels.commands import cli, train
from qtuning_kernels.commands.options import _NOT_OPTIONS, add_training_arguments, argument_texts, qtuning_config
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


def test_every_field_of_training_arguments_is_an_option():
    parser = cli.build_parser()
    subparser = cli._subparser(parser, "train")
    add_training_arguments(subparser, shown=True)
    for field in dataclasses.fields(TrainingArguments):
        named = f"--{field.name.replace('_', '-')}" in subparser._option_string_actions
        assert named != (field.name in _NOT_OPTIONS), field.name
    assert "Weight decay" in subparser.format_help()


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
    for wrong in (["--weight-decay", "much"], ["--lr-scheduler-type", "round"], ["--hub-token", "secret"]):
        with pytest.raises(SystemExit) as ended:
            cli.main(["train", *wrong])
        assert ended.value.code == 2
        error = capsys.readouterr().err
        assert wrong[0] in error.splitlines()[-1]
        assert "--adam-beta1" not in error  # the usage stays short


def test_help_is_short_and_help_all_is_not(capsys):
    shown = {}
    for option in ("--help", "--help-all"):
        with pytest.raises(SystemExit) as ended:
            cli.main(["train", option])
        assert ended.value.code == 0
        shown[option] = capsys.readouterr().out
    for text in shown.values():
        assert "--rescore-every" in text
        assert "--learning-rate" in text
    assert "--adam-beta1" not in shown["--help"]
    assert "--adam-beta1" in shown["--help-all"]


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
    config.write_text("no-record: true")
    with pytest.raises(cli.UsageError, match="unknown key 'no-record'"):
        cli.parse(["train", "--config", str(config)])


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
