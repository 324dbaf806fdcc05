"""Who multiplies: decided by time and error as measured, restored afterwards, the same after a resume."""

from contextlib import suppress

import pytest
import torch

import qtuning_kernels as qk
from qtuning_kernels.models import matmul
from qtuning_kernels.models.matmul import MatmulTimes, choose_precision, float32_matmul, layer_shapes, time_products
from tests.tiny import tiny_model

EXACT = {"default": 4e-7, "onednn": 9e-7, "bfloat16": 3e-3}


def times(default, onednn, bfloat16, error=EXACT):
    return MatmulTimes({"default": default, "onednn": onednn, "bfloat16": bfloat16}, error)


@pytest.mark.parametrize(
    ("measured", "expected"),
    [
        (times(8.0, 4.0, 3.0), ("onednn", "bfloat16")),
        (times(8.0, 4.0, 5.0), ("onednn", "model")),
        (times(5.0, 7.9, 7.8), ("default", "model")),
        (times(8.0, 7.9, 7.9), ("default", "model")),  # within the noise
        # with matrix units for bfloat16 the switch rounds its operands: twice as fast, and wrong by 1e-3
        (times(8.0, 4.0, 4.0, {**EXACT, "onednn": 3e-3}), ("default", "bfloat16")),
    ],
)
def test_the_fastest_exact_one_is_chosen(monkeypatch, measured, expected):
    monkeypatch.setattr(matmul, "time_products", lambda shapes, rows: measured)
    precision = choose_precision(tiny_model("llama"))
    assert (precision.matmul, precision.score_dtype) == expected
    assert precision.times is measured
    under_autocast = choose_precision(tiny_model("llama"), autocast=True)
    assert under_autocast.score_dtype == "model"


@pytest.mark.parametrize("score_dtype", ["model", "float32", "bfloat16"])
@pytest.mark.parametrize("choice", ["default", "onednn"])
def test_each_can_be_forced(monkeypatch, choice, score_dtype):
    monkeypatch.setattr(matmul, "time_products", lambda shapes, rows: times(1.0, 9.0, 9.0))
    precision = choose_precision(tiny_model("llama"), matmul=choice, score_dtype=score_dtype)
    assert (precision.matmul, precision.score_dtype) == (choice, score_dtype)


def test_onednn_is_refused_where_it_rounds_its_operands(monkeypatch):
    rounding = times(8.0, 2.0, 2.0, {**EXACT, "onednn": 3e-3})
    monkeypatch.setattr(matmul, "time_products", lambda shapes, rows: rounding)
    with pytest.raises(ValueError, match=r"whose .* error of 3.0e-03 .*; accepted: at most 4 times"):
        choose_precision(tiny_model("llama"), matmul="onednn")


def test_nothing_is_measured_for_a_model_in_half_precision(monkeypatch):
    monkeypatch.setattr(matmul, "time_products", None)
    assert choose_precision(tiny_model("llama").bfloat16()).score_dtype == "model"
    with pytest.raises(ValueError, match=r"and the model torch\.bfloat16 on cpu"):
        choose_precision(tiny_model("llama").bfloat16(), matmul="onednn")


def test_the_measurement_is_of_the_model_s_own_layers():
    """The widest and the narrowest layer of the backbone, and the head: here one library was 1.4 times as fast as the
    other for it and nearly equal for the layers, so that noise decided."""
    model = tiny_model("llama")
    *shapes, head = layer_shapes(model)
    assert head == tuple(model.lm_head.weight.shape)
    sizes = [shape[0] * shape[1] for shape in shapes]
    weights = {tuple(m.weight.shape) for m in model.model.modules() if isinstance(m, torch.nn.Linear)}
    assert set(shapes) <= weights
    assert sizes == [min(a * b for a, b in weights), max(a * b for a, b in weights)]


def test_errors_are_measured_against_float64():
    measured = time_products([(48, 32), (32, 64)], rows=40)
    assert measured.error["default"] < 1e-6
    assert 1e-4 < measured.error["bfloat16"] < 1e-1
    assert all(value > 0 for value in measured.milliseconds.values())


def test_the_switch_is_put_back():
    before = torch.backends.mkldnn.matmul.fp32_precision
    with suppress(RuntimeError), float32_matmul("onednn"):
        assert torch.backends.mkldnn.matmul.fp32_precision == "bf16"
        raise RuntimeError("a step that fails")
    assert torch.backends.mkldnn.matmul.fp32_precision == before


def test_scoring_leaves_the_switch_alone_afterwards():
    before = torch.backends.mkldnn.matmul.fp32_precision
    samples = [{"input_ids": [1, 2, 3], "labels": [-100, 2, 3]}] * 2
    assert qk.QTuningConfig(matmul="onednn").matmul == "onednn"
    from qtuning_kernels.models.scoring import score_samples

    score_samples(tiny_model("llama"), samples)
    assert torch.backends.mkldnn.matmul.fp32_precision == before
