"""Trimming, dropping and packing keep every label where it was."""

import pytest
import torch

from qtuning_kernels.data.micro_batches import micro_batches
from qtuning_kernels.data.samples import cu_seqlens_of, to_sample
from tests.tiny import tiny_samples


def test_labels_are_predicted_from_the_position_before():
    sample = to_sample([7, 8, 9, 4], [7, -100, 9, 4], 3)
    assert sample.label_positions.tolist() == [2, 3]  # position 0 has nothing before it
    assert sample.labels.tolist() == [9, 4]


def test_id_of_the_content_where_there_is_none():
    first, second = to_sample([1, 2, 3], [1, 2, 3]), to_sample([1, 2, 4], [1, 2, 4])
    assert first.sample_id == to_sample([1, 2, 3], [-100, 2, 3]).sample_id
    assert first.sample_id != second.sample_id
    assert 0 <= first.sample_id < 2**63


def test_dropped_keeps_the_prompt_and_each_end_of_turn():
    """Two turns; of the pruned tokens only those inside an answer leave the sequence."""
    #          prompt       answer          prompt   answer
    tokens = [1, 2, 3, 10, 11, 12, 13, 4, 5, 20, 21]
    labels = [-100] * 3 + [10, 11, 12, 13] + [-100] * 2 + [20, 21]
    keep = torch.tensor([False, True, False, False, True, False])
    dropped = to_sample(tokens, labels, 0).dropped(keep)
    assert dropped.input_ids.tolist() == [1, 2, 3, 11, 13, 4, 5, 20, 21]
    assert dropped.labels.tolist() == [11, 20]
    assert dropped.input_ids[dropped.label_positions].tolist() == [11, 20]


@pytest.mark.parametrize("layout", ["grouped", "padded", "packed"])
@pytest.mark.parametrize("budget", [1, 40, 100, 10**6])
def test_micro_batches_hold_every_target_once(layout, budget):
    samples = [to_sample(s["input_ids"], s["labels"], s["sample_id"]) for s in tiny_samples(11)]
    samples.append(to_sample([5, 6], [-100, -100], 1))  # no target: no place in any batch
    cu_seqlens = cu_seqlens_of(samples)
    seen = torch.zeros(int(cu_seqlens[-1]), dtype=torch.long)
    labels = torch.cat([s.labels for s in samples])
    for batch in micro_batches(samples, budget, layout):
        flat = batch.input_ids.flatten()
        assert flat.numel() <= max(budget, max(len(s.input_ids) for s in samples))
        assert torch.equal(labels[batch.token_index], batch.labels)
        seen[batch.token_index] += 1
        for row, slot in zip(batch.rows.tolist(), batch.token_index.tolist(), strict=True):
            index = int((cu_seqlens <= slot).sum()) - 1
            while cu_seqlens[index + 1] <= slot:
                index += 1
            sample = samples[index]
            before = int(sample.label_positions[slot - int(cu_seqlens[index])]) - 1
            start = row - before
            assert flat[start : row + 1].tolist() == sample.input_ids[: before + 1].tolist()
            if batch.position_ids is not None:
                assert batch.position_ids[0, row] == before
    assert (seen == 1).all()


def test_padding_is_low():
    """Groups of similar length: of 1 to 400 tokens, less than a twentieth is padding."""
    samples = [to_sample([1] * n, [1] * n, n) for n in range(2, 400, 3)]
    batches = micro_batches(samples, 4096)
    positions = sum(batch.input_ids.numel() for batch in batches)
    assert positions < 1.05 * sum(len(s.trimmed().input_ids) for s in samples)
