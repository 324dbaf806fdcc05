"""The embedded model: Llama weights and a byte-level tokenizer out of a GGUF file, as a Hugging Face folder.

Only what SmolLM2 needs is understood; anything else in the file is an error. Weights become float32, which
holds every value of the 4-bit and 8-bit blocks exactly as `gguf` dequantises them.
"""

from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

_TENSORS = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
}
_BLOCK_TENSORS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_CONTROL_TOKEN = 3


def convert_gguf(source: Path, folder: Path) -> None:
    """Write config, weights and tokenizer of `source` into `folder`.

    Args:
        source: a GGUF file of architecture ``llama`` with tied embeddings and the ``smollm`` tokenizer.
        folder: an existing folder, loadable afterwards with `AutoModelForCausalLM` and `AutoTokenizer`.

    Raises:
        ImportError: the package ``gguf`` is not installed.
        ValueError: the file holds another architecture, tokenizer or tensor.
    """
    try:
        from gguf import GGUFReader
    except ImportError:
        raise ImportError("reading GGUF files needs gguf: pip install 'qtuning-kernels[demo]'") from None
    reader = GGUFReader(source)
    meta = {name: field.contents() for name, field in reader.fields.items()}
    for key, accepted in (("general.architecture", "llama"), ("tokenizer.ggml.pre", "smollm")):
        if meta.get(key) != accepted:
            raise ValueError(f"{source.name}: {key} is {meta.get(key)!r}; accepted: {accepted!r}")
    config = _config(meta)
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    weights = {}
    for tensor in reader.tensors:
        name, part = _name(tensor.name)
        weights[name] = _weight(tensor, heads.get(part))
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config.save_pretrained(folder)
    _tokenizer(meta).save_pretrained(folder)


def _config(meta: dict[str, Any]) -> Any:
    from transformers import LlamaConfig

    return LlamaConfig(
        architectures=["LlamaForCausalLM"],
        vocab_size=meta["llama.vocab_size"],
        hidden_size=meta["llama.embedding_length"],
        intermediate_size=meta["llama.feed_forward_length"],
        num_hidden_layers=meta["llama.block_count"],
        num_attention_heads=meta["llama.attention.head_count"],
        num_key_value_heads=meta["llama.attention.head_count_kv"],
        max_position_embeddings=meta["llama.context_length"],
        # float32 in the file: 1e-05 there reads 9.999999747378752e-06
        rms_norm_eps=float(str(np.float32(meta["llama.attention.layer_norm_rms_epsilon"]))),
        rope_parameters={"rope_type": "default", "rope_theta": meta["llama.rope.freq_base"]},
        tie_word_embeddings=True,
        bos_token_id=meta["tokenizer.ggml.bos_token_id"],
        eos_token_id=meta["tokenizer.ggml.eos_token_id"],
        pad_token_id=meta["tokenizer.ggml.padding_token_id"],
        dtype="float32",
    )


def _name(name: str) -> tuple[str, str]:
    """(name in transformers, the part of the GGUF name that says which tensor it is)."""
    stem = name.removesuffix(".weight")
    if stem in _TENSORS:
        return f"{_TENSORS[stem]}.weight", stem
    prefix, _, rest = stem.partition(".")
    block, _, part = rest.partition(".")
    if prefix != "blk" or part not in _BLOCK_TENSORS:
        raise ValueError(f"unknown tensor {name!r}")
    return f"model.layers.{block}.{_BLOCK_TENSORS[part]}.weight", part


def _weight(tensor: Any, heads: int | None) -> np.ndarray:
    from gguf import dequantize

    weight = dequantize(tensor.data, tensor.tensor_type).astype(np.float32, copy=False)
    if heads is not None:
        # GGUF interleaves the two halves that rotary embeddings pair; transformers keeps them apart
        rows, columns = weight.shape
        weight = weight.reshape(heads, rows // heads // 2, 2, columns).swapaxes(1, 2).reshape(rows, columns)
    return np.ascontiguousarray(weight)


def _tokenizer(meta: dict[str, Any]) -> Any:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokens, types = meta["tokenizer.ggml.tokens"], meta["tokenizer.ggml.token_type"]
    merges = [tuple(merge.split(" ")) for merge in meta["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    # what "smollm" stands for: single digits, then GPT-2's pattern over bytes
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    control = [token for token, kind in zip(tokens, types, strict=True) if kind == _CONTROL_TOKEN]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in control])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=tokens[meta["tokenizer.ggml.bos_token_id"]],
        eos_token=tokens[meta["tokenizer.ggml.eos_token_id"]],
        unk_token=tokens[meta["tokenizer.ggml.unknown_token_id"]],
        pad_token=tokens[meta["tokenizer.ggml.padding_token_id"]],
        chat_template=meta["tokenizer.chat_template"],
        model_max_length=meta["llama.context_length"],
        clean_up_tokenization_spaces=False,
    )
