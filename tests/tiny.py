"""Tiny, randomly initialised models of the architectures that differ in what stands around the head."""

from pathlib import Path

import torch
import transformers

from tests.tiny_tokenizer import byte_tokenizer

VOCABULARY = 97
_SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_CONFIGS = {
    "llama": lambda: transformers.LlamaConfig(**_SIZES),
    "llama-tied": lambda: transformers.LlamaConfig(**_SIZES, tie_word_embeddings=True),
    "qwen": lambda: transformers.Qwen3Config(**_SIZES, head_dim=8),
    # a small cap, so that leaving it out would show
    "gemma2": lambda: transformers.Gemma2Config(**_SIZES, head_dim=8, final_logit_softcapping=0.5),
    "granite": lambda: transformers.GraniteConfig(**_SIZES, logits_scaling=0.125),
    "gpt2": lambda: transformers.GPT2Config(
        vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=128, bos_token_id=1,
        eos_token_id=2, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    ),
}  # fmt: skip
ARCHITECTURES = tuple(_CONFIGS)

PRUNING = {"sample_ratio": 0.25, "token_ratio": 0.5}


def tiny_model(architecture: str = "llama-tied", dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    """The same weights on every call; larger than usual, so that perplexities differ."""
    torch.manual_seed(1234)
    model = transformers.AutoModelForCausalLM.from_config(_CONFIGS[architecture]())
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4)
    return model.to(dtype)


def byte_model(folder: Path) -> Path:
    """A tiny random model and a tokenizer of bytes, as files in `folder`, which it returns."""
    tokenizer = byte_tokenizer(None)
    torch.manual_seed(3)
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256, tie_word_embeddings=True,
        bos_token_id=0, eos_token_id=1, pad_token_id=1,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def tiny_samples(count: int = 16, seed: int = 0, longest: int = 24) -> list[dict]:
    """Prompts and answers of differing lengths, some answers repetitive, as the data module gives them."""
    generator = torch.Generator().manual_seed(seed)

    def draw(low, high):
        return int(torch.randint(low, high, (), generator=generator))

    samples = []
    for sample_id in range(count):
        prompt, answer = draw(2, 8), draw(1, longest)
        words = draw(2, VOCABULARY)
        tokens = torch.randint(3, 3 + words if words < VOCABULARY - 3 else VOCABULARY, (prompt + answer,),
                               generator=generator).clamp(max=VOCABULARY - 1).tolist()  # fmt: skip
        samples.append(
            {"input_ids": tokens, "labels": [-100] * prompt + tokens[prompt:], "sample_id": 1000 + sample_id}
        )
    return samples
