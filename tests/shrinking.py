"""Options that make a family of transformers tiny: general ones by name, and a family's own as data."""

from typing import Any

from tests.families import END

# Few heads of an indexer would leave scores of 0, and which of equals are the largest is not defined.
_BY_NAME = {
    "vocab_size": 260, "max_position_embeddings": 512, "n_positions": 256, "max_seq_len": 256, "context_length": 256,
    "pad_token_id": 257, "bos_token_id": 258, "eos_token_id": END, "initializer_range": 0.2, "is_decoder": True,
    "hidden_size": 32, "n_embd": 32, "d_model": 32, "emb_dim": 32, "embedding_size": 32, "word_embed_proj_dim": 32,
    "num_hidden_layers": 4, "num_layers": 4, "n_layer": 4, "n_layers": 4, "decoder_layers": 4, "num_blocks": 4,
    "num_attention_heads": 4, "n_head": 4, "n_heads": 4, "num_heads": 4, "decoder_attention_heads": 4,
    "attention_heads": 4, "num_key_value_heads": 2, "num_kv_heads": 2, "head_dim": 8, "kv_channels": 8,
    "intermediate_size": 64, "ffn_dim": 64, "decoder_ffn_dim": 64, "ffn_hidden_size": 64, "dim_ff": 64, "dff": 64,
    "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32, "shared_intermediate_size": 32,
    "expert_ffn_hidden_size": 32, "dense_intermediate_size": 32, "moe_shared_expert_intermediate_size": 32,
    "shared_experts_intermediate_size": 32, "intermediate_size_mlp": 64,
    "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "moe_num_experts": 4, "zero_expert_num": 2,
    "num_experts_per_tok": 2, "num_experts_per_token": 2, "moe_k": 2, "moe_topk": 2, "n_group": 1, "topk_group": 1,
    "num_expert_group": 1,
    "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8,
    "index_head_dim": 16, "index_n_heads": 16, "index_topk": 8, "o_lora_rank": 8, "o_groups": 2,
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
    "linear_num_heads": 4, "linear_head_dim": 8, "state_size": 8, "ssm_state_size": 8, "time_step_rank": 4,
    "mamba_d_state": 8, "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_num_heads": 8, "mamba_head_dim": 8,
    "mamba_dt_rank": 4, "mamba_chunk_size": 16, "chunk_size": 16, "n_groups": 1,
    "sliding_window": 16, "window_size": 16, "attention_window_size": 16, "local_attention": 16,
    "sliding_window_size": 16, "attention_chunk_size": 16, "rotary_dim": 8, "layer_group_size": 2,
    "sliding_window_pattern": 2, "_sliding_window_pattern": 2, "global_attn_every_n_layers": 2,
    "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 260, "num_kv_shared_layers": 0, "laurel_rank": 4,
    "swa_num_attention_heads": 4, "swa_num_key_value_heads": 2, "swa_head_dim": 8, "d_rel": 8, "rel_extent": 32,
}  # fmt: skip
"""What is set wherever a configuration has a field of this name with a value in it."""

_HYBRID = {"layer_types": ["linear_attention", "full_attention"] * 2}
_CONV = {"layer_types": ["conv", "full_attention"] * 2}
_OWN: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1, 3]},
    "cpmant": {"dim_head": 8, "prompt_length": 4},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8, "rope_theta": 1e4},
        "ffn_config": {"ffn_hidden_size": 32, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "falcon_h1": {"mamba_d_ssm": 64},
    "gemma3n_text": {
        "intermediate_size": [64] * 4, "activation_sparsity_pattern": [0.0] * 4, "altup_num_inputs": 2,
    },
    # The last two use keys and values of layers before them, as in the family's small models.
    "gemma4_text": {
        "num_kv_shared_layers": 2, "global_head_dim": 8, "layer_types": ["sliding_attention", "full_attention"] * 2,
    },
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "granitemoehybrid": _HYBRID,
    "hunyuan_v1_dense": {"head_dim": 8},
    "hunyuan_v1_moe": {"head_dim": 8},
    "ministral": {"head_dim": 8},
    "nemotron": {"num_key_value_heads": 2, "head_dim": 8},
    "cohere_compass_text": {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4,
                                                                   "mrope_section": [2, 1, 1]}}},
    "qwen4_exp_text": {
        "indexer_n_heads": 16, "indexer_kv_heads": 1, "indexer_head_dim": 8, "indexer_budget": 8,
        "indexer_compress_ratio": 4, "ngram_vocab_size_base": 500, "make_ngram_vocab_size_divisible_by": 4,
        "split_ngram_parts": 1,
    },
    "xmod": {"default_language": "en_XX"},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "kimi_linear": _HYBRID,
    "lfm2": _CONV,
    "lfm2_moe": _CONV | {"num_dense_layers": 1},
    "mamba2": {"num_heads": 8},
    "longcat_flash": {"num_hidden_layers": 8, "routed_scaling_factor": 1.0},
    "minimax": {"block_size": 16},
    "olmo_hybrid": _HYBRID,
    "qwen3_next": _HYBRID,
    "qwen3_5_text": _HYBRID,
    "qwen3_5_moe_text": _HYBRID,
    "recurrent_gemma": {"block_types": ["recurrent", "attention"], "lru_width": 32},
    "reformer": {
        "attn_layers": ["local"] * 4, "axial_pos_shape": [16, 16], "axial_pos_embds_dim": [16, 16],
        "attention_head_size": 8, "feed_forward_size": 64, "local_attn_chunk_length": 16,
    },
    "rembert": {"input_embedding_size": 32, "output_embedding_size": 32},
    "roc_bert": {"shape_embed_dim": 8, "pronunciation_embed_dim": 8},
    "xlnet": {"d_inner": 64, "d_head": 8},
    "zamba": {
        "layers_block_type": ["linear_attention", "hybrid"] * 2, "attention_head_dim": 16, "attention_hidden_size": 64,
    },
    "zamba2": {"layers_block_type": ["linear_attention", "hybrid"] * 2, "num_key_value_heads": 4},
    "zaya": {"num_experts_per_tok": 1, "router_hidden_size": 32},
}  # fmt: skip
"""What a family needs beside."""


def sizes(family: str, kind: Any) -> dict[str, Any]:
    """Options of the family's configuration class."""
    fields = _fields(kind)
    options = {name: value for name, value in _BY_NAME.items() if name in fields}
    if "kv_lora_rank" in fields:
        # Latent attention has keys for every head, whatever its configuration says.
        options["num_key_value_heads"] = options["num_attention_heads"]
    return options | _OWN.get(family, {})


def _fields(kind: Any) -> set[str]:
    """Names of options that have a value by default, or say which tokens are special."""
    before = kind().to_dict()
    return {name for name, value in before.items() if value is not None or name.endswith("token_id")}
