"""Tiny models of the families that our adapters know: at least two sparse layers each, no two sizes alike."""

from __future__ import annotations

from typing import Any

import transformers

_DECODER = {
    "vocab_size": 97,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}

#: Model class, configuration class and settings.
FAMILIES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "switch": (
        "SwitchTransformersForConditionalGeneration",
        "SwitchTransformersConfig",
        {
            "vocab_size": 97,
            "d_model": 32,
            "d_kv": 8,
            "d_ff": 40,
            "num_layers": 2,
            "num_decoder_layers": 2,
            "num_sparse_encoder_layers": 1,
            "num_sparse_decoder_layers": 1,
            "num_heads": 4,
            "num_experts": 5,
            "expert_capacity": 2,
        },
    ),
    "nllb": (
        "NllbMoeForConditionalGeneration",
        "NllbMoeConfig",
        {
            "vocab_size": 97,
            "d_model": 32,
            "encoder_layers": 2,
            "decoder_layers": 2,
            "encoder_ffn_dim": 40,
            "decoder_ffn_dim": 40,
            "encoder_attention_heads": 4,
            "decoder_attention_heads": 4,
            "encoder_sparse_step": 2,
            "decoder_sparse_step": 2,
            "num_experts": 5,
            "max_position_embeddings": 128,
            "moe_eval_capacity_token_fraction": 0.3,
        },
    ),
    "jetmoe": (
        "JetMoeForCausalLM",
        "JetMoeConfig",
        {
            **{key: value for key, value in _DECODER.items() if key != "num_attention_heads"},
            "kv_channels": 8,
            "intermediate_size": 40,
            "num_local_experts": 5,
            "num_experts_per_tok": 2,
        },
    ),
    "llama4": (
        "Llama4ForCausalLM",
        "Llama4TextConfig",
        {
            **_DECODER,
            "head_dim": 8,
            "intermediate_size": 24,
            "intermediate_size_mlp": 40,
            "num_local_experts": 5,
            "num_experts_per_tok": 2,
            "attention_chunk_size": 9,
            "no_rope_layers": [1, 0],
            "floor_scale": 4,
        },
    ),
    "dbrx": (
        "DbrxForCausalLM",
        "DbrxConfig",
        {
            "vocab_size": 97,
            "d_model": 32,
            "n_heads": 4,
            "n_layers": 2,
            "max_seq_len": 128,
            "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0},
            "ffn_config": {"ffn_hidden_size": 24, "moe_num_experts": 5, "moe_top_k": 2},
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        },
    ),
    "longcat": (
        "LongcatFlashForCausalLM",
        "LongcatFlashConfig",
        {
            "vocab_size": 97,
            "hidden_size": 32,
            "num_layers": 2,
            "num_attention_heads": 4,
            "max_position_embeddings": 128,
            "ffn_hidden_size": 40,
            "q_lora_rank": 20,
            "kv_lora_rank": 12,
            "qk_nope_head_dim": 6,
            "qk_rope_head_dim": 8,
            "head_dim": 8,
            "v_head_dim": 10,
            "moe_topk": 3,
            "n_routed_experts": 5,
            "zero_expert_num": 2,
            "expert_ffn_hidden_size": 24,
        },
    ),
    "zaya": (
        "ZayaForCausalLM",
        "ZayaConfig",
        {
            **_DECODER,
            "moe_intermediate_size": 24,
            "num_experts": 4,
            "head_dim": 8,
            "router_hidden_size": 20,
            "tie_word_embeddings": False,
        },
    ),
}

#: Experts without neutral form, exact in plain operators: no block, and a note that says why.
FALLBACKS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "step3p7": (
        "Step3p7TextModel",
        "Step3p7TextConfig",
        {
            **_DECODER,
            "head_dim": 8,
            "intermediate_size": 40,
            "n_routed_experts": 5,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 24,
            "share_expert_dim": 20,
            "query_pre_attn_scalar": 8,
            "mlp_layer_types": ["sparse", "sparse"],
            "swiglu_limits": [0.5, 0.25],
            "layer_types": ["full_attention", "sliding_attention"],
            "sliding_window": 9,
        },
    ),
    "muse_spark": (
        "MuseSparkTextModel",
        "MuseSparkTextConfig",
        {
            **_DECODER,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "head_dim": 8,
            "intermediate_size": 40,
            "sliding_window": 9,
            "moe_intermediate_size": 24,
            "moe_hidden_size": 16,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
        },
    ),
    "doge": (
        "DogeForCausalLM",
        "DogeConfig",
        {
            **_DECODER,
            "intermediate_size": 40,
            "is_moe": True,
            "num_experts": 25,
            # Of equal tokens the pairs of keys (i, j) and (j, i) score the same: with 3, no such tie is at the edge.
            "num_experts_per_tok": 3,
            "keep_window_size": 64,
        },
    ),
}


def config(name: str, **changes: Any) -> Any:
    """The configuration, naming its model class."""
    model, kind, settings = {**FAMILIES, **FALLBACKS}[name]
    return getattr(transformers, kind)(**{**settings, **changes}, architectures=[model])
