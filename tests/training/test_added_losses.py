"""What a model adds to its loss stays in it: routers of mixtures of experts, regularisers of adapters.

A replaced loss drops it silently (seen: Mixtral's 6.57 became 4.57). With ratios of 1 the first loss and every gradient
equal the plain Trainer's, the routers' included, which without their loss would be another.
"""

import datasets
import pytest
import torch
import transformers

import qtuning_kernels as qk
from qtuning_kernels.data.collator import PoolCollator
from tests.tiny import _SIZES, PRUNING, tiny_samples
from tests.training.steps import gradients

pytestmark = pytest.mark.usefixtures("one_thread")
_MOE = {**_SIZES, "output_router_logits": True, "router_aux_loss_coef": 1.0, "num_experts_per_tok": 2}
MODELS = {
    "mixtral": lambda: transformers.MixtralConfig(**_MOE, num_local_experts=4),
    "qwen3-moe": lambda: transformers.Qwen3MoeConfig(**_MOE, num_experts=4, moe_intermediate_size=16, head_dim=8),
    "olmoe": lambda: transformers.OlmoeConfig(**_MOE, num_experts=4),
    "granite-moe": lambda: transformers.GraniteMoeConfig(**_MOE, num_local_experts=4),
    "gpt-oss": lambda: transformers.GptOssConfig(
        **_MOE, num_local_experts=4, head_dim=8, layer_types=["full_attention"] * 2, rope_parameters=None
    ),
}
KEEP_ALL = {"sample_ratio": 1.0, "token_ratio": 1.0}


def build(name):
    torch.manual_seed(5)
    return transformers.AutoModelForCausalLM.from_config(MODELS[name](), attn_implementation="eager")


def adalora():
    peft = pytest.importorskip("peft")
    torch.manual_seed(5)
    model = transformers.AutoModelForCausalLM.from_config(transformers.LlamaConfig(**_SIZES))
    config = peft.AdaLoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM", total_step=100, orth_reg_weight=5.0)
    return peft.get_peft_model(model, config)


def run(kind, model, folder, **extra):
    arguments = transformers.TrainingArguments(
        str(folder), per_device_train_batch_size=8, use_cpu=True, report_to=[], save_strategy="no"
    )
    samples = datasets.Dataset.from_list(tiny_samples(8))
    trainer = kind(model, arguments, data_collator=PoolCollator(), train_dataset=samples, **extra)
    batch = PoolCollator()(tiny_samples(8))
    batch.pop("sample_id")
    return gradients(trainer, [batch])


def cases():
    for name in MODELS:
        fails = name == "granite-moe" and transformers.__version__.startswith("5.0.")
        reason = "transformers 5.0 finds no router logits of GraniteMoe, and its plain Trainer fails"
        yield pytest.param(lambda name=name: build(name), id=name, marks=pytest.mark.skipif(fails, reason=reason))
    yield adalora


@pytest.mark.parametrize("make", [*cases()])
def test_added_losses_stay(tmp_path, make):
    class Plain(transformers.Trainer):
        _plan = None

    theirs, expected, _ = run(Plain, make(), tmp_path)
    config = qk.QTuningConfig(**KEEP_ALL, record=False, matmul="default")
    trainers = []

    class Ours(qk.QTuningTrainer):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            trainers.append(self)

    ours, actual, _ = run(Ours, make(), tmp_path, qtuning=config)
    assert not trainers[0].fused()
    assert float(ours) == pytest.approx(float(theirs), rel=1e-6)
    assert actual.keys() == expected.keys()
    for name, gradient in actual.items():
        assert torch.allclose(gradient, expected[name], rtol=1e-5, atol=1e-7), name


def test_without_router_logits_the_fused_loss_is_taken(tmp_path):
    model = build("mixtral")
    model.config.output_router_logits = False
    config = qk.QTuningConfig(**PRUNING, record=False, score_dtype="model", matmul="default")
    trainers = []

    class Ours(qk.QTuningTrainer):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            trainers.append(self)

    loss, _, _ = run(Ours, model, tmp_path, qtuning=config)
    assert trainers[0].fused()
    assert torch.isfinite(loss)
