"""Every causal language model type of the installed `transformers`, at tiny size with random weights."""

from typing import Any

import torch
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

MODEL_TYPES = tuple(sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES))
# the sizes that a configuration has under one of these names
_SIZES = {
    "vocab_size unpadded_vocab_size vocab_size_per_layer_input decoder_vocab_size": 96,
    "max_position_embeddings n_positions n_ctx model_max_length max_seq_len max_source_positions context_length "
    "max_target_positions": 128,
    "intermediate_size ffn_dim n_inner d_ff decoder_ffn_dim encoder_ffn_dim ffn_hidden_size dff dim_ff "
    "dense_intermediate_size feed_forward_size intermediate_size_mlp shared_intermediate_size": 48,
    "hidden_size n_embd d_model attention_hidden_size embedding_size word_embed_proj_dim input_embedding_size "
    "output_embedding_size lru_width emb_dim embedding_dim q_lora_rank kv_lora_rank backbone_hidden_size "
    "dim_model_base": 32,
    "moe_intermediate_size shared_expert_intermediate_size expert_ffn_hidden_size shared_experts_intermediate_size "
    "moe_shared_expert_intermediate_size qk_head_dim attention_window_size": 16,
    "head_dim qk_rope_head_dim qk_nope_head_dim v_head_dim swa_head_dim linear_key_head_dim linear_value_head_dim "
    "linear_head_dim index_head_dim dim_head attention_head_dim hidden_size_per_layer_input kv_channels d_head "
    "rotary_dim": 8,
    "num_attention_heads n_head n_heads num_heads decoder_attention_heads encoder_attention_heads num_experts "
    "num_local_experts n_routed_experts moe_num_experts swa_num_attention_heads linear_num_value_heads "
    "num_encoder_attention_heads num_decoder_attention_heads attention_heads": 4,
    "num_hidden_layers n_layer n_layers num_layers decoder_layers encoder_layers num_key_value_heads "
    "num_experts_per_tok num_experts_per_token moe_topk moe_k num_kv_heads swa_num_key_value_heads num_query_groups "
    "linear_num_key_heads num_decoder_layers num_encoder_layers num_blocks index_n_heads": 2,
    "eos_token_id": 3,
    "bos_token_id n_group topk_group num_expert_group": 1,
    "pad_token_id": 0,
}
_SIZE_OF = {name: size for names, size in _SIZES.items() for name in names.split()}
_LATENT = {"qk_rope_head_dim": 8, "head_dim": 8, "num_key_value_heads": 4}  # heads that share a compressed key
_LATENT_TYPES = (
    "axk1 axk2 deepseek_v3 deepseek_v32 glm4_moe_lite glm_moe_dsa longcat_flash minicpm3 sarvam_mla youtu "
    "dots3_note_text"
)
_ROPE = {"rope_type": "default", "rope_theta": 10_000.0}
# what the sizes above contradict, and what the defaults leave out
_OTHERS: dict[str, dict[str, Any]] = dict.fromkeys(_LATENT_TYPES.split(), _LATENT) | {
    "cohere_compass_text": {"rope_parameters": {"full_attention": _ROPE}},
    "dbrx": {"attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10_000.0},
             "ffn_config": {"ffn_hidden_size": 48, "hidden_size": 32}},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "gemma3n_text": {"num_kv_shared_layers": 0},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "zamba": {"num_hidden_layers": 4, "layers_block_type": ["mamba", "hybrid"] * 2,
              "attention_hidden_size": 64, "attention_head_dim": 16},
    "zamba2": {"layers_block_type": ["linear_attention", "hybrid"], "attention_hidden_size": 64,
               "attention_head_dim": 16, "mamba_headdim": 8, "num_key_value_heads": 4},
    "bamba": {"mamba_n_heads": 8, "mamba_d_head": 8},
    "deepseek_v2": _LATENT | {"num_experts_per_tok": 2},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid": {"mamba_n_heads": 8, "mamba_d_head": 8},
    "hunyuan_v1_dense": {"head_dim": 8},
    "hunyuan_v1_moe": {"head_dim": 8},
    "inkling_text": {"unpadded_vocab_size": None},
    "mamba2": {"num_heads": 8, "head_dim": 8},
    "ministral": {"head_dim": 8},
    "nemotron": {"head_dim": 8, "num_key_value_heads": 2},
    "reformer": {"is_decoder": True, "axial_pos_embds_dim": (16, 16), "axial_pos_shape": (8, 16)},
    "zaya": {"num_experts_per_tok": 1},
}  # fmt: skip


def tiny_configuration(model_type: str, **settings: Any) -> Any:
    """The default configuration of a type with the sizes that it has made small, and `settings` on top."""
    kind = CONFIG_MAPPING[model_type]

    def small(values: dict[str, Any]) -> dict[str, Any]:
        found = {}
        for name, value in values.items():
            if isinstance(value, dict) and "config" in name:
                found[name] = small(value) | {key: value[key] for key in ("model_type",) if key in value}
            elif name in _SIZE_OF and value is not None:
                found[name] = _SIZE_OF[name]
        return found

    return kind(**_merged(small(kind().to_dict()), _OTHERS.get(model_type, {})) | settings)


def _merged(values: dict[str, Any], others: dict[str, Any]) -> dict[str, Any]:
    """With those of `others` on top, part by part."""
    nested = {
        name: _merged(values[name], other) for name, other in others.items() if isinstance(values.get(name), dict)
    }
    return values | others | nested


def tiny_architecture(model_type: str, **settings: Any) -> torch.nn.Module:
    """A model of that type in evaluation mode, the same weights on every call.

    Raises:
        MemoryError: 20 million parameters or more.
    """
    configuration = tiny_configuration(model_type, **settings)
    with torch.device("meta"):
        parameters = sum(p.numel() for p in AutoModelForCausalLM.from_config(configuration).parameters())
    if parameters > 2e7:
        raise MemoryError(f"{parameters / 1e6:.0f} million parameters")
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(configuration).eval()
