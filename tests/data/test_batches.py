"""A batch taken apart and put together again is the same batch, whatever its kind; other batches are refused."""

import re

import pytest
import torch
from transformers import DataCollatorWithFlattening

from qtuning_kernels.data.batches import put_together, take_apart
from qtuning_kernels.data.collator import PoolCollator
from tests.tiny import tiny_samples


def padded(side, extra=True):
    batch = PoolCollator(pad_token_id=9)(tiny_samples(5))
    if extra:
        batch["token_type_ids"] = batch["attention_mask"] * 3
        batch["position_ids"] = torch.arange(batch["labels"].shape[1]).expand_as(batch["labels"]).clone()
        batch["group"] = torch.arange(5) * 2
    if side == "left":
        widths = batch["attention_mask"].sum(1).tolist()
        for name, column in batch.items():
            if column.dim() == 2:
                batch[name] = torch.stack([torch.cat([x[n:], x[:n]]) for x, n in zip(column, widths, strict=True)])
    return batch


def padding_free():
    features = [{"input_ids": s["input_ids"], "labels": s["labels"]} for s in tiny_samples(5)]
    return dict(DataCollatorWithFlattening(return_flash_attn_kwargs=True, return_seq_idx=True)(features))


def trl_packed():
    """Rows of several samples each, flattened by TRL's collator with their lengths."""
    pytest.importorskip("trl")
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    samples = tiny_samples(6)
    rows = [
        {
            "input_ids": [t for s in group for t in s["input_ids"]],
            "labels": [t for s in group for t in s["labels"]],
            "seq_lengths": [len(s["input_ids"]) for s in group],
        }
        for group in (samples[:2], samples[2:5], samples[5:])
    ]
    return DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True)(rows)


@pytest.mark.parametrize("side", ["left", "right"])
def test_samples_of_padded_rows(side):
    samples, kind = take_apart(padded(side))
    assert kind.padding_side == side
    for sample, feature in zip(samples, tiny_samples(5), strict=True):
        assert sample.input_ids.tolist() == feature["input_ids"]
        assert sample.sample_id == feature["sample_id"]
        assert sample.labels.tolist() == [label for label in feature["labels"][1:] if label != -100]
        assert (sample.columns["token_type_ids"] == 3).all()
    assert [sample.values["group"] for sample in samples] == [0, 2, 4, 6, 8]


@pytest.mark.parametrize("make", [padding_free, trl_packed])
def test_samples_of_a_padding_free_row(make):
    """Taken for one sample, the row would have one perplexity, and half of it would be pruned as one answer."""
    samples, kind = take_apart(make())
    assert kind.padding_free
    expected = tiny_samples(6 if make is trl_packed else 5)
    assert [sample.input_ids.tolist() for sample in samples] == [feature["input_ids"] for feature in expected]
    for sample, feature in zip(samples, expected, strict=True):
        assert sample.labels.tolist() == [label for label in feature["labels"][1:] if label != -100]


@pytest.mark.parametrize("make", [lambda: padded("left"), lambda: padded("right"), padding_free, trl_packed])
def test_together_again(make):
    batch = make()
    again = put_together(*take_apart(batch))
    batch.pop("sample_id", None)
    assert again.keys() == batch.keys()
    for name, column in batch.items():
        if name == "position_ids" and "attention_mask" in batch:
            real = batch["attention_mask"].bool()
            assert torch.equal(again[name][real], column[real])
        elif isinstance(column, torch.Tensor):
            assert torch.equal(again[name], column), name
            assert again[name].dtype == column.dtype, name
        else:
            assert again[name] == column, name


def test_kept_samples_are_trimmed_and_masked():
    samples, kind = take_apart(padded("right"))
    kept = [samples[3].masked(torch.arange(len(samples[3].labels)) < 2), samples[1]]
    batch = put_together(kept, kind)
    longest = max(int(kept[0].label_positions[-1]), int(kept[1].label_positions[-1])) + 1
    assert batch["input_ids"].shape == (2, longest)
    assert (batch["labels"] != -100).sum(1).tolist() == [2, len(samples[1].labels)]
    assert batch["group"].tolist() == [6, 2]
    assert "sample_id" not in batch  # no model knows it


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": None}, "'labels' among the columns"),
        ({"labels": torch.zeros(5, 3)}, "labels [5, 3]; accepted: [B, L] both"),
        ({"pixel_values": torch.zeros(7, 3)}, "a column 'pixel_values' of shape [7, 3], which cannot be divided"),
        ({"images": torch.zeros(5, 3, 4)}, "a column 'images' of shape [5, 3, 4], which cannot be divided"),
        ({"attention_mask": torch.zeros(5, 1, 9, 9)}, "a column 'attention_mask' of shape [5, 1, 9, 9]"),
        ({"shift_labels": "labels"}, "a column 'shift_labels'"),
        ({"num_items": 3}, "a column 'num_items' of type int"),
        ({"cu_seq_lens_q": torch.tensor([0, 3])}, "['cu_seq_lens_q'] beside an attention_mask"),
    ],
)
def test_refused(change, message):
    batch = padded("right", extra=False)
    for name, value in change.items():
        if value is None:
            batch.pop(name)
        else:
            batch[name] = batch[value].clone() if isinstance(value, str) else value
    with pytest.raises(ValueError, match=re.escape(message)):
        take_apart(batch)


def test_an_attention_mask_with_a_hole_is_refused():
    hole = torch.tensor([[1, 0, 1, 0]])
    with pytest.raises(ValueError, match="attention_mask of row 0 has a hole"):
        take_apart({"input_ids": hole, "labels": hole, "attention_mask": hole})


def test_padded_rows_of_several_samples_are_refused():
    batch = padded("right", extra=False)
    batch["position_ids"] = torch.arange(batch["labels"].shape[1]).expand_as(batch["labels"]) % 4
    with pytest.raises(ValueError, match="position_ids of row 0 start again beside an attention_mask"):
        take_apart(batch)


def test_contradicting_boundaries_are_refused():
    batch = padding_free()
    batch["cu_seq_lens_q"] = batch["cu_seq_lens_q"] + torch.tensor([0, 1, 0, 0, 0, 0], dtype=torch.int32)
    with pytest.raises(ValueError, match="accepted: the same samples"):
        take_apart(batch)
