"""A step's gradient equals plain arithmetic, for every mode, budget and layout."""

import pytest
import torch
import transformers

import qtuning_kernels as qk
from qtuning_kernels.data.collator import PoolCollator
from qtuning_kernels.data.micro_batches import micro_batches
from qtuning_kernels.data.samples import to_sample
from tests.tiny import ARCHITECTURES, PRUNING, tiny_model, tiny_samples
from tests.training.steps import assert_same_gradients, gradients, plain_gradient

pytestmark = pytest.mark.usefixtures("one_thread")


def our_gradient(model, config, features):
    arguments = transformers.TrainingArguments(
        "unused", per_device_train_batch_size=8, gradient_accumulation_steps=2, use_cpu=True, report_to=[],
    )  # fmt: skip
    trainer = qk.QTuningTrainer(model, arguments, qtuning=config)
    return gradients(trainer, [PoolCollator()(features[:8]), PoolCollator()(features[8:])])


@pytest.fixture
def packed(monkeypatch):
    monkeypatch.setattr("qtuning_kernels.models.scoring.choose_layout", lambda *_: "packed")


@pytest.fixture
def float64_throughout(monkeypatch):
    """Gemma's norm and attention cast to float32 even in a float64 model, which alone costs 1e-8."""
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    monkeypatch.setattr(torch.nn.functional, "softmax", lambda x, dim, dtype=None: torch.softmax(x, dim))


TOKEN_MODES = ["mask", "drop"]


def check_gradient(architecture, token_mode, budget, model=None):
    model = (tiny_model(architecture) if model is None else model).double()
    features = tiny_samples(16)
    samples = [to_sample(s["input_ids"], s["labels"], s["sample_id"]) for s in features]
    config = qk.QTuningConfig(
        **PRUNING,
        token_mode=token_mode,
        micro_batch_tokens=budget,
        score_batch_tokens=budget,
        score_dtype="model",
        record=False,
    )
    loss, grads, plan = our_gradient(model, config, features)
    assert plan.totals.samples_kept == 4
    keep = torch.cat([s.token_mask for s in plan.selections])
    cu_seqlens = torch.tensor([0, *(len(s.label_positions) for s in samples)]).cumsum(0)
    assert 0 < keep.sum() < cu_seqlens[-1]
    assert_same_gradients(grads, plain_gradient(model, samples, keep, cu_seqlens, token_mode))
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
def test_gradient_of_packed_samples(float64_throughout, monkeypatch, packed, architecture, token_mode):
    """Several samples in one row: attention that leaks across them changes the gradient (next test)."""
    made = []

    def recorded(*arguments):
        made.append(micro_batches(*arguments))
        return made[-1]

    monkeypatch.setattr("qtuning_kernels.training.trainer.micro_batches", recorded)
    check_gradient(architecture, token_mode, budget=4096)
    assert [batch.input_ids.shape[0] for batches in made[1:] for batch in batches] == [1, 1]  # made[0] asks the model


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
