"""The parts of a model, for one architecture of each kind of head."""

import pytest
import torch
import transformers

from qtuning_kernels.models.causal_lm import CausalLM, backbone
from qtuning_kernels.models.scoring import score_samples
from tests.models.tiny_architectures import tiny_architecture
from tests.tiny import ARCHITECTURES, tiny_model, tiny_samples


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_parts_give_the_model_s_logits(architecture):
    CausalLM(tiny_model(architecture)).check()


def test_scaling_is_read_from_the_configuration():
    gemma, granite = CausalLM(tiny_model("gemma2")), CausalLM(tiny_model("granite"))
    assert (gemma.logit_scale, gemma.softcap) == (1.0, 0.5)
    assert (granite.logit_scale, granite.softcap) == (8.0, None)
    cohere = transformers.CohereConfig(
        vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=4, logit_scale=0.25, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    causal_lm = CausalLM(transformers.AutoModelForCausalLM.from_config(cohere))
    assert causal_lm.logit_scale == 0.25
    causal_lm.check()


@pytest.mark.parametrize(
    ("kind", "sizes", "scaling"),
    [
        ("recurrent_gemma", {"lru_width": 32, "attention_window_size": 16, "logits_soft_cap": 0.5}, (1.0, 0.5)),
        ("xlstm", {"num_heads": 2, "output_logit_soft_cap": 0.5}, (1.0, 0.5)),
        ("inkling_text", {"head_dim": 8, "logits_mup_width_multiplier": 0.25}, (4.0, None)),
        ("minicpm3", {"dim_model_base": 8}, (0.25, None)),
        ("llama4_text", {"head_dim": 8, "intermediate_size_mlp": 48}, (1.0, None)),  # get_decoder() is the model
    ],
)
def test_scaling_under_other_names_and_a_decoder_that_is_the_model(kind, sizes, scaling):
    model = tiny_architecture(kind, **sizes)
    causal_lm = CausalLM(model)
    assert (causal_lm.logit_scale, causal_lm.softcap) == scaling
    causal_lm.check()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_that_sees_later_tokens_is_refused(dtype):
    """Its parts give its logits, so nothing else tells that the token to predict is among what it reads.

    In bfloat16 the weights are as large as trained ones: with weights of 0.02 attention hardly shows in its 8 bits.
    """
    model = tiny_architecture("bert-generation", is_decoder=False, initializer_range=0.2).to(dtype)
    with pytest.raises(ValueError, match="the logits of BertGenerationDecoder depend on later tokens"):
        CausalLM(model).check()
    with pytest.raises(ValueError, match="depend on later tokens"):
        score_samples(model, tiny_samples(2))
    CausalLM(tiny_architecture("bert-generation", is_decoder=True).to(dtype)).check()


@pytest.mark.parametrize(("architecture", "attribute"), [("gemma2", "softcap"), ("granite", "logit_scale")])
def test_check_finds_a_head_that_it_does_not_know(architecture, attribute):
    causal_lm = CausalLM(tiny_model(architecture))
    setattr(causal_lm, attribute, None if attribute == "softcap" else 1.0)
    with pytest.raises(ValueError, match="this architecture is not supported"):
        causal_lm.check()


def test_forward_runs_inside_the_wrappers():
    """What wraps the model sees its forward called, and afterwards the model is as before."""
    model = tiny_model()
    calls = []

    class Wrapper(torch.nn.Module):
        def __init__(self, module):
            super().__init__()
            self.module = module

        def forward(self, **inputs):
            calls.append(sorted(inputs))
            return self.module(**inputs)

    causal_lm = CausalLM(model)
    tokens = torch.tensor([[5, 6, 7]])
    rows = torch.tensor([2, 0])
    hidden = causal_lm.forward(Wrapper(model), tokens, None, rows, lambda hidden, *_: hidden)
    assert torch.equal(hidden, backbone(model.model, tokens)[0, rows])
    assert calls == [["input_ids", "position_ids"]]
    assert model(input_ids=tokens).logits.shape == (1, 3, 97)
    assert "forward" not in model.__dict__


def test_refuses_what_it_cannot_serve():
    encoder_decoder = transformers.T5ForConditionalGeneration(
        transformers.T5Config(vocab_size=50, d_model=16, d_ff=16, num_layers=1, num_heads=2, d_kv=8)
    )
    with pytest.raises(ValueError, match="decoder-only, got the encoder-decoder T5"):
        CausalLM(encoder_decoder)
    with pytest.raises(ValueError, match="must have a backbone and a language-model head"):
        CausalLM(tiny_model().model)
    with pytest.raises(ValueError, match="transformers causal language model, got Linear"):
        CausalLM(torch.nn.Linear(2, 2))


def test_adapter_on_the_head_is_refused():
    """Its weight alone is not what the head computes, and a fresh adapter is 0, so no comparison shows it."""
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(tiny_model("llama"), peft.LoraConfig(target_modules=["lm_head", "q_proj"]))
    with pytest.raises(ValueError, match="an adapter sits on the language-model head"):
        CausalLM(model)


def test_prompt_learning_is_refused():
    peft = pytest.importorskip("peft")
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    with pytest.raises(ValueError, match="model uses prompt learning"):
        CausalLM(peft.get_peft_model(tiny_model("llama"), config))
