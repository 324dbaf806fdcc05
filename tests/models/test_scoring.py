"""Scores through a copy of the weights in another precision, and how samples share a forward."""

import copy

import pytest
import torch
import transformers

from qtuning_kernels.models.causal_lm import CausalLM
from qtuning_kernels.models.scoring import choose_layout, keeps_samples_apart, score_samples
from tests.tiny import tiny_model, tiny_samples


def model_nll(model, samples):
    """nll of the answers by the model's own logits, one sample at a time; float32 at least, as its own loss is."""
    nll = []
    with torch.no_grad():
        for sample in samples:
            ids, labels = torch.tensor([sample["input_ids"]]), torch.tensor(sample["labels"])
            logits = model(input_ids=ids).logits[0]
            log_p = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
            (positions,) = (labels != -100).nonzero(as_tuple=True)
            nll.append(-log_p[positions - 1, labels[positions]])
    return torch.cat(nll)


@pytest.mark.parametrize(("dtype", "score_dtype"), [("bfloat16", "float32"), ("float32", "bfloat16")])
def test_frozen_projections_of_adapters_are_converted_with_the_weights(dtype, score_dtype):
    """VeRA's shared matrices are buffers: left as they are, its products have operands of two types."""
    peft = pytest.importorskip("peft")
    dtype, wanted = getattr(torch, dtype), getattr(torch, score_dtype)
    config = peft.VeraConfig(r=8, target_modules=["q_proj", "v_proj"], d_initial=1.0, task_type="CAUSAL_LM")
    model = peft.get_peft_model(tiny_model("llama", dtype), config, autocast_adapter_dtype=False).to(dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "vera_lambda_b" in name:  # 0 at first, which leaves the adapter without effect
                parameter.normal_()
    samples = tiny_samples(8)
    truth = model_nll(copy.deepcopy(model).double(), samples)
    with model.disable_adapter():
        assert (model_nll(model, samples) - truth).abs().max() > 0.1
    own = (model_nll(copy.deepcopy(model).to(wanted), samples) - truth).abs()
    ours = (score_samples(model, samples, score_dtype=score_dtype, matmul="default").nll - truth).abs()
    print(f"largest error {ours.max():.1e}, of the model itself in {score_dtype} {own.max():.1e}")
    assert ours.max() <= 1.5 * own.max()
    assert ours.mean() <= 1.5 * own.mean()
    assert all(b.dtype == dtype for n, b in model.named_buffers() if "vera" in n)


# of a tiny model, what it takes besides vocabulary and sizes; and whether its attention keeps packed samples apart
KEEPS_APART = {
    "llama": ({}, True),
    "qwen3": ({}, True),
    "gpt2": ({}, True),
    "opt": ({"ffn_dim": 48, "word_embed_proj_dim": 32}, False),  # counts positions itself
    "mamba": ({"state_size": 8}, False),
    "jamba": ({"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1,
               "num_experts": 2, "mamba_d_state": 8}, False),  # leaks less than a tenth of what one sequence would
    "bamba": ({"attn_layer_indices": [1], "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8,
               "mamba_n_groups": 1, "mamba_chunk_size": 8}, False),
}  # fmt: skip


@pytest.mark.parametrize("architecture", KEEPS_APART)
def test_packing_is_tried(architecture, monkeypatch):
    """A model whose state or attention leaks from one packed sample to the next is padded, by what it computes."""
    more, apart = KEEPS_APART[architecture]
    config = transformers.AutoConfig.for_model(
        architecture, vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, **more,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config)
    causal_lm = CausalLM(model)
    assert keeps_samples_apart(causal_lm) == apart
    assert keeps_samples_apart(CausalLM(model.bfloat16())) == apart
    assert choose_layout(causal_lm) == "grouped"  # attention without variable lengths, on a CPU
    monkeypatch.setattr(config, "_attn_implementation_internal", "flash_attention_2")
    monkeypatch.setattr("qtuning_kernels.models.scoring.keeps_samples_apart", lambda causal_lm: apart)
    assert choose_layout(causal_lm) == ("packed" if apart else "grouped")
    assert choose_layout(causal_lm, sharded=True) == "grouped"
