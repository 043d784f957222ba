"""Tiny configurations of language models, two layers of experts each, no two sizes alike."""

from __future__ import annotations

from pathlib import Path

import transformers

_COMMON = {
    "vocab_size": 97,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}

CONFIGS: dict[str, tuple[str, dict[str, object]]] = {
    "mixtral": ("Mixtral", {"intermediate_size": 48, "num_local_experts": 5}),
    "qwen2_moe": (
        "Qwen2Moe",
        {
            "intermediate_size": 40,
            "moe_intermediate_size": 24,
            "shared_expert_intermediate_size": 28,
            "num_experts": 6,
            "num_experts_per_tok": 3,
        },
    ),
    "qwen3_moe": (
        "Qwen3Moe",
        {
            "intermediate_size": 40,
            "moe_intermediate_size": 24,
            "num_experts": 6,
            "num_experts_per_tok": 3,
            "head_dim": 8,
            "norm_topk_prob": True,
        },
    ),
    "olmoe": ("Olmoe", {"intermediate_size": 24, "num_experts": 6, "num_experts_per_tok": 3}),
    "granitemoe": (
        "GraniteMoe",
        {
            "intermediate_size": 24,
            "num_local_experts": 6,
            "num_experts_per_tok": 3,
            "embedding_multiplier": 1.2,
            "logits_scaling": 1.3,
            "residual_multiplier": 0.9,
            "attention_multiplier": 0.3,
        },
    ),
    "gpt_oss": (
        "GptOss",
        {
            "intermediate_size": 40,
            "num_local_experts": 5,
            "num_experts_per_tok": 2,
            "head_dim": 8,
            "sliding_window": 9,
            "layer_types": ["sliding_attention", "full_attention"],
        },
    ),
    "deepseek_v3": (
        "DeepseekV3",
        {
            "intermediate_size": 40,
            "moe_intermediate_size": 24,
            "n_routed_experts": 8,
            "n_group": 4,
            "topk_group": 2,
            "num_experts_per_tok": 3,
            "n_shared_experts": 1,
            "first_k_dense_replace": 1,
            "num_hidden_layers": 3,
            "num_key_value_heads": 4,
            "q_lora_rank": 20,
            "kv_lora_rank": 12,
            "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 6,
            "v_head_dim": 10,
            "head_dim": 8,
        },
    ),
    "phimoe": ("Phimoe", {"intermediate_size": 40, "num_local_experts": 5}),
    "nemotron_h": (
        "NemotronH",
        {
            "hybrid_override_pattern": "*E",
            "n_routed_experts": 6,
            "n_shared_experts": 1,
            "moe_intermediate_size": 24,
            "num_experts_per_tok": 2,
            "head_dim": 8,
            "moe_shared_expert_intermediate_size": 20,
            "n_group": 1,
            "topk_group": 1,
            "intermediate_size": 40,
        },
    ),
    "lfm2_moe": (
        "Lfm2Moe",
        {
            "intermediate_size": 40,
            "moe_intermediate_size": 24,
            "num_hidden_layers": 3,
            "num_experts": 6,
            "num_experts_per_tok": 2,
            "num_dense_layers": 1,
            "layer_types": ["conv", "full_attention", "conv"],
        },
    ),
    "t5": ("T5", {"d_model": 32, "d_kv": 8, "d_ff": 40, "num_layers": 2, "num_heads": 4}),
}

_TASKS = {"t5": "ForConditionalGeneration"}


def write_config(name: str, folder: Path, **changes: object) -> Path:
    """A folder with nothing but config.json."""
    family, settings = CONFIGS[name]
    settings = {**_COMMON, **settings, **changes, "architectures": [family + _TASKS.get(name, "ForCausalLM")]}
    folder.mkdir(parents=True, exist_ok=True)
    getattr(transformers, f"{family}Config")(**settings).save_pretrained(folder)
    return folder
