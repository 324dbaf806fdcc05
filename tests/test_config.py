"""`QTuningConfig`: the defaults, and a refusal that names the field, the value and what is accepted."""

import dataclasses
import inspect

import pytest

import qtuning_kernels as qk
from qtuning_kernels.pruning.policies.qtuning import QTuning


def test_defaults_are_the_papers_but_for_the_order_of_the_tokens():
    config = qk.QTuningConfig()
    assert (config.sample_ratio, config.token_ratio, config.neighbor_weight) == (0.125, 0.5, 0.5)
    assert (config.token_mode, config.token_order, config.neighbor_reduction) == ("mask", "keep_high", "sum")
    order = inspect.signature(qk.prune_tokens).parameters["order"].default
    assert (order, QTuning(0.5, 0.5).token_order) == (config.token_order, config.token_order)


def test_frozen_and_replaceable():
    config = qk.QTuningConfig(sample_ratio=0.5)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.sample_ratio = 0.25
    assert dataclasses.replace(config, token_ratio=0.7).sample_ratio == 0.5
    with pytest.raises(ValueError, match="token_ratio"):
        dataclasses.replace(config, token_ratio=7)


def test_round_trip_through_plain_values():
    config = qk.QTuningConfig(token_mode="drop", rescore_every=3)
    assert qk.QTuningConfig(**dataclasses.asdict(config)) == config


def test_every_field_is_documented():
    for field in dataclasses.fields(qk.QTuningConfig):
        assert f"\n    {field.name}: " in inspect.getdoc(qk.QTuningConfig), field.name


@pytest.mark.parametrize(
    ("field", "value", "error", "accepted"),
    [
        ("sample_ratio", 0, ValueError, r"a number in \(0, 1\]"),
        ("sample_ratio", 1.5, ValueError, r"a number in \(0, 1\]"),
        ("token_ratio", float("nan"), ValueError, r"a number in \(0, 1\]"),
        ("token_ratio", "half", TypeError, "a number"),
        ("neighbor_weight", 1.1, ValueError, r"a number in \[0, 1\]"),
        ("token_mode", "remove", ValueError, "'mask', 'drop'"),
        ("token_order", "low", ValueError, "'keep_low', 'keep_high'"),
        ("neighbor_reduction", "max", ValueError, "'sum', 'mean'"),
        ("triage_method", "sort", ValueError, "'rank', 'bisect'"),
        ("micro_batch_tokens", 0, ValueError, "an integer of at least 1"),
        ("micro_batch_tokens", 1e3, TypeError, "an integer"),
        ("score_batch_tokens", -1, ValueError, "an integer of at least 1"),
        ("score_dtype", "fp8", ValueError, "'auto', 'float32', 'bfloat16', 'model'"),
        ("matmul", "mkl", ValueError, "'auto', 'default', 'onednn'"),
        ("rescore_every", 0, ValueError, "an integer of at least 1"),
        ("rescore_every", True, TypeError, "an integer"),
        ("selection_scope", "local", ValueError, "'global', 'rank'"),
        ("record", 1, TypeError, "True or False"),
        ("record_tokens", -1, ValueError, "an integer of at least 0"),
    ],
)
def test_bad_values(field, value, error, accepted):
    with pytest.raises(error, match=f"{field} is .*; accepted: {accepted}"):
        qk.QTuningConfig(**{field: value})
