"""One optimiser step of a trainer, by its public methods, up to the gradient."""

import torch


def gradients(trainer, batches):
    """The loss and the gradients of a step over these batches of the dataloader, and its plan."""
    model = trainer.model
    model.zero_grad()
    cut, count = trainer.get_batch_samples(iter(batches), len(batches), torch.device("cpu"))
    assert len(cut) == len(batches)
    trainer.current_gradient_accumulation_steps = len(cut)
    loss = sum(trainer.training_step(model, batch, count) for batch in cut)
    return loss, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}, trainer._plan


def plain_gradient(model, samples, keep, cu_seqlens, token_mode="mask"):
    """One sample at a time, full logits, cross-entropy of the kept tokens over their number."""
    model.zero_grad()
    total = 0.0
    for index, sample in enumerate(samples):
        kept = keep[cu_seqlens[index] : cu_seqlens[index + 1]]
        if not kept.any():
            continue
        sample = sample.dropped(kept) if token_mode == "drop" else sample.masked(kept)
        logits = model(input_ids=sample.input_ids.unsqueeze(0)).logits[0]
        log_p = torch.log_softmax(logits, -1)
        total = total - log_p[sample.label_positions - 1, sample.labels].sum()
    (total / keep.sum()).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same_gradients(actual, expected, bound=1e-9):
    assert actual.keys() == expected.keys()
    for name, gradient in actual.items():
        scale = expected[name].abs().max().clamp(min=1e-6)
        assert ((gradient - expected[name]).abs().max() / scale).item() < bound, name
