"""A step's gradient equals plain arithmetic, for every mode, budget and layout."""

import pytest
import torch

import qtuning_kernels as qk
from qtuning_kernels.data.samples import to_sample
from qtuning_kernels.models.causal_lm import CausalLM
from qtuning_kernels.training.step import QTuningStep
from tests.tiny import ARCHITECTURES, PRUNING, tiny_model, tiny_samples

pytestmark = pytest.mark.usefixtures("one_thread")


def plain_gradient(model, samples, keep, cu_seqlens, token_mode):
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


def our_gradient(model, samples, config, backward=lambda loss: loss.backward()):
    model.zero_grad()
    step = QTuningStep(model, CausalLM(model), config, torch.device("cpu"))
    plan = step.plan([samples[:8], samples[8:]])
    loss = step.train(plan, backward)
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return loss, grads, plan


@pytest.fixture
def packed(monkeypatch):
    monkeypatch.setattr("qtuning_kernels.training.step.layout_for", lambda model: "packed")
    monkeypatch.setattr("qtuning_kernels.models.scoring.layout_for", lambda model: "packed")


@pytest.fixture
def float64_throughout(monkeypatch):
    """Gemma's norm and attention cast to float32 even in a float64 model, which alone costs 1e-8."""
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    monkeypatch.setattr(torch.nn.functional, "softmax", lambda x, dim, dtype=None: torch.softmax(x, dim))


TOKEN_MODES = ["mask", "drop"]


def check_gradient(architecture, token_mode, budget, model=None):
    model = (tiny_model(architecture) if model is None else model).double()
    samples = [to_sample(s["input_ids"], s["labels"], s["sample_id"]) for s in tiny_samples(16)]
    config = qk.QTuningConfig(
        **PRUNING,
        token_mode=token_mode,
        micro_batch_tokens=budget,
        score_batch_tokens=budget,
        score_dtype="model",
        matmul="default",
    )
    loss, grads, plan = our_gradient(model, samples, config)
    assert plan.totals.samples_kept == 4
    keep = torch.cat([s.token_mask for s in plan.selections])
    cu_seqlens = torch.tensor([0, *(len(s.label_positions) for s in samples)]).cumsum(0)
    assert 0 < keep.sum() < cu_seqlens[-1]
    expected = plain_gradient(model, samples, keep, cu_seqlens, token_mode)
    assert grads.keys() == expected.keys()
    for name, gradient in grads.items():
        scale = expected[name].abs().max().clamp(min=1e-6)
        assert ((gradient - expected[name]).abs().max() / scale).item() < 1e-9, name
    return loss, plan


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("token_mode", TOKEN_MODES)
def test_gradient_equals_the_plain_computation(float64_throughout, architecture, token_mode):
    check_gradient(architecture, token_mode, budget=4096)


@pytest.mark.parametrize("token_mode", TOKEN_MODES)
@pytest.mark.parametrize("budget", [1, 30, 60])
def test_gradient_for_any_micro_batch_budget(token_mode, budget):
    check_gradient("llama-tied", token_mode, budget)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("token_mode", TOKEN_MODES)
def test_gradient_of_packed_samples(float64_throughout, packed, architecture, token_mode):
    """Several samples in one row: attention that leaks across them changes the gradient (next test)."""
    _, plan = check_gradient(architecture, token_mode, budget=4096)
    assert len(plan.batches) == 1
    assert plan.batches[0].input_ids.shape[0] == 1


def test_a_leak_between_packed_samples_would_show(packed, monkeypatch):
    """The same without position ids that start again: one long sequence, and the comparison must fail."""
    from qtuning_kernels.models import causal_lm

    own = causal_lm.backbone
    monkeypatch.setattr(causal_lm, "backbone", lambda decoder, ids, positions=None: own(decoder, ids, None))
    with pytest.raises(AssertionError):
        check_gradient("llama-tied", "mask", budget=4096)


def test_lora_gradient():
    peft = pytest.importorskip("peft")
    torch.manual_seed(3)
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    model = peft.get_peft_model(tiny_model("llama"), config)
    for token_mode in TOKEN_MODES:
        check_gradient(None, token_mode, 60, model=model)
    assert all(p.grad is None for n, p in model.named_parameters() if "lora" not in n)
