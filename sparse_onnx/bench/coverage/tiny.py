"""A tiny configuration of any architecture: general rules over the names of its fields.

What decides which code runs stays as the architecture has it - kinds of layers, gates, scoring functions - and
sizes shrink. No two kinds of sizes are alike, so that a transposed weight shows. Layers are picked so that each
combination of per-layer kinds of the full configuration occurs once.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tomllib

from sparse_onnx.bench.coverage.registry import Architecture

VOCABULARY = 160
_HIDDEN, _HEADS, _HEAD = 64, 4, 16
_ROPE, _NOPE = 8, 6
_EXPERTS, _GROUPS, _TOP_GROUPS, _TOP = 8, 4, 2, 3
_LAYERS, _MOST_LAYERS = 2, 6

#: Field name -> tiny value; the first pattern that matches the whole name counts. None leaves it as it is.
_RULES: tuple[tuple[str, Any], ...] = (
    (r".*(_token_id|_token_index|_start_token|_token)", None),
    (r"(unpadded_)?vocab_size.*|.*_vocab_size", VOCABULARY),
    (
        r"num_hidden_layers|num_layers|n_layers|depth|encoder_layers|num_decoder_layers|decoder_layers",
        _LAYERS,
    ),
    (r"num_sparse_(en|de)coder_layers|(en|de)coder_sparse_step|decoder_sparse_step", 1),
    (r"zero_expert_num", 2),
    (r".*shared_expert.*(intermediate_size|_dim)|share_expert_dim|shared_intermediate_size", 28),
    (r"expert_capacity", 64),
    (r"n_shared_experts|num_shared_experts|moe_num_shared_experts", 1),
    (r"(moe_)?(num|n)_(local_|routed_)?experts", _EXPERTS),
    (r"num_experts_per_tok(en)?|moe_top_?k|moe_k|top_k_experts|moe_top_k", _TOP),
    (r"n_group|num_expert_group", _GROUPS),
    (r"topk_group", _TOP_GROUPS),
    (r"(moe_intermediate_size|expert_ffn_hidden_size|moe_hidden_size)", 24),
    (r"(num_|n_)?key_value_heads|num_key_value_heads|swa_num_key_value_heads|kv_n_heads", 2),
    (r"num_attention_heads_per_layer", None),
    # Sums of clipped scores: with few heads many are 0, and which of equal scores are the largest is anybody's choice.
    (r"index(er)?_n_heads", 16),
    (
        r".*attention_heads|num_heads|n_heads|linear_num_heads|mamba_n(um)?_heads|mamba_num_heads",
        _HEADS,
    ),
    (r"linear_num_key_heads", 2),
    (r"linear_num_value_heads", 4),
    (r"q_lora_rank|o_lora_rank", 20),
    (r"kv_lora_rank", 12),
    (r"qk_rope_head_dim", _ROPE),
    (r"qk_nope_head_dim", _NOPE),
    (r"qk_head_dim", _ROPE + _NOPE),
    (r"v_head_dim", 10),
    (r"index_head_dim", 16),
    (
        r"linear_(key_|value_)?head_dim|mamba_head_dim|mamba_d_head|kv_channels|d_kv|swa_head_dim|head_dim",
        _HEAD,
    ),
    (r"hidden_size_per_layer_input", 12),
    (r"router_hidden_size", 20),
    (
        r"hidden_size|d_model|.*_hidden_size|output_dim|out_hidden_size|.*_output_dim|output_proj_dims",
        _HIDDEN,
    ),
    (r"adapter_(in|out)_dim|adapter_input_size|projector_(in|out)put_dim|.*projection_hidden_dim", _HIDDEN),
    (r"intermediate_size|.*intermediate_size.*|.*ffn_(dim|hidden_size)|d_ff|mlp_dim", 40),
    (r".*window(_size)?(_infer)?|index_topk|index_budget|indexer_budget", 9),
    (r"max_position_embeddings|max_seq_len|model_max_length|max_source_positions|rel_extent", 128),
    (r"image_size|max_image_size", 16),
    (r"patch_size", 4),
    (r"num_position_embeddings", 16),
    (r"mamba_d_state|ssm_state_size", 8),
    (r"mamba_chunk_size|chunk_size|block_size|index_block_size|attention_chunk_size", 4),
    (r"(mamba_)?n_groups|o_groups|mamba_n_groups", 2),
    (r"mamba_expand|expand", 1),
    (r"enable_moe_block|is_moe", True),
    (r"first_k_dense_replace|num_dense_layers|moe_layer_start_index", 1),
)
#: What some configurations leave open, and their models need.
_SET = r"head_dim|.*experts|num_experts_per_tok|.*top_?k.*|moe_intermediate_size|topk_group|n_group"
#: Whatever else is that large names a size: a width, a length, a number of entries.
_LARGE, _SHRUNK = 96, 32
_KEPT = re.compile(
    r".*(_id|_index|_seed|seed|theta|_rate|position_id_per_seconds|sampling_rate|temperature)s?"
)


def write(architecture: Architecture, folder: Path) -> Path:
    """A folder with config.json as users have it, `architectures` named."""
    config = tiny(architecture.name)
    config.architectures = [architecture.model_class]
    folder.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(folder)
    return folder


def tiny(model_type: str) -> Any:
    """transformers' configuration object."""
    from transformers import AutoConfig

    return shrunk(AutoConfig.for_model(model_type), exceptions())


def shrunk(full: Any, exceptions: Mapping[str, Mapping[str, Any]]) -> Any:
    special = dict(exceptions.get(full.model_type or type(full).__name__, {}))
    special.pop("why", None)
    full.allow_global_per_layer_attribute_access = True
    names = [field.name for field in dataclasses.fields(full)]
    values: dict[str, Any] = {}
    for name in names:
        value = getattr(full, name, None)
        if hasattr(value, "model_type"):
            values[name] = shrunk(value, exceptions)
        elif (small := _smaller(name, value)) is not None:
            values[name] = small
    values |= _special_tokens(full, names)
    values |= _picked_layers(full, names, values)
    values |= _heads(full, names)
    values |= _rope(full, values, special)
    values |= special
    return type(full)(**values)


def _heads(full: Any, names: list[str]) -> dict[str, Any]:
    """Heads that relate to each other as in the full configuration: keys of their own for each query or shared, a
    head as wide as its rotary part or as both its parts."""
    values: dict[str, Any] = {}
    heads, keys = (getattr(full, name, None) for name in ("num_attention_heads", "num_key_value_heads"))
    if "num_key_value_heads" in names and keys is not None and (keys == heads or keys == 1):
        values["num_key_value_heads"] = _HEADS if keys == heads else 1
    rope, nope = (getattr(full, name, None) for name in ("qk_rope_head_dim", "qk_nope_head_dim"))
    if rope is not None and nope is not None and "head_dim" in names:
        if full.head_dim in (None, rope):
            values["head_dim"] = _ROPE
        elif full.head_dim == rope + nope:
            values["head_dim"] = _ROPE + _NOPE
    return values


def _smaller(name: str, value: Any) -> Any:
    """The tiny value, or None: as it is."""
    if isinstance(value, (dict, str)) or name.startswith("_"):
        return None
    if name.endswith("_only_layers"):
        return [0] if value else None
    for pattern, small in _RULES:
        if re.fullmatch(pattern, name):
            unset = value is None and not re.fullmatch(_SET, name)
            return None if unset else _like(value, small)
    if isinstance(value, int) and value >= _LARGE and not _KEPT.fullmatch(name):
        return _SHRUNK
    if isinstance(value, (list, tuple)) and all(type(each) is int for each in value):
        return [min(each, _SHRUNK) for each in value] if max(value, default=0) >= _LARGE else None
    return None


def _like(value: Any, small: Any) -> Any:
    """The tiny value in the form of the full one: a pair of sizes stays a pair, a switch a switch."""
    if small is None or (isinstance(value, bool) is not isinstance(small, bool) and value is not None):
        return None
    if isinstance(value, (list, tuple)) and all(isinstance(each, int) for each in value):
        return [small] * len(value)
    if isinstance(value, int) and not isinstance(value, bool) and 0 < value < small:
        return small if small == _EXPERTS else None
    return small


def _special_tokens(full: Any, names: list[str]) -> dict[str, Any]:
    """Distinct ids at the end of the vocabulary; padding, begin and end first."""
    values: dict[str, Any] = {}
    following = VOCABULARY - 1
    for name in names:
        value = getattr(full, name, None)
        if not re.fullmatch(r".*(_token_id|_token_index)", name) or not isinstance(value, (int, list)):
            continue
        first = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}.get(name)
        if first is None:
            first, following = following, following - 1
        values[name] = [first] if isinstance(value, list) else first
    return values


def _picked_layers(full: Any, names: list[str], values: dict[str, Any]) -> dict[str, Any]:
    """One layer for each combination of per-layer kinds, in order; nothing where all layers are of one kind."""
    count = getattr(full, "num_hidden_layers", None)
    if not isinstance(count, int):
        return {}
    lists = {
        name: list(value)
        for name in names
        if isinstance(value := getattr(full, name, None), (list, tuple)) and len(value) == count > 1
    }
    if not lists:
        return {}
    first: dict[tuple[Any, ...], int] = {}
    for layer, kinds in enumerate(zip(*lists.values(), strict=True)):
        first.setdefault(kinds, layer)
    layers = sorted(first.values())[:_MOST_LAYERS]
    while len(layers) < _LAYERS:
        layers.append(layers[-1])
    picked: dict[str, Any] = {name: [items[layer] for layer in layers] for name, items in lists.items()}
    if "num_attention_heads_per_layer" in picked:
        picked["num_attention_heads_per_layer"] = [_HEADS] * len(layers)
    for name in ("num_hidden_layers", "num_layers", "n_layers"):
        if name in names:
            picked[name] = len(layers)
    return picked


def _rope(full: Any, values: dict[str, Any], special: Mapping[str, Any]) -> dict[str, Any]:
    """Sections of a multimodal rotary embedding that add up to the tiny half of a head."""
    parameters = getattr(full, "rope_parameters", None)
    if not isinstance(parameters, dict):
        return {}
    text = json.dumps(parameters)
    if "mrope_section" not in text:
        return {}
    factor = parameters.get("partial_rotary_factor", 1.0)
    head = special.get("head_dim", values.get("qk_rope_head_dim", values.get("head_dim", _HEAD)))
    half = int(head * factor) // 2
    sections = len(parameters["mrope_section"])
    rest = half - (sections - 1) * max(1, half // 4)
    return {"rope_parameters": {**parameters, "mrope_section": [rest] + [max(1, half // 4)] * (sections - 1)}}


def exceptions() -> dict[str, dict[str, Any]]:
    with open(Path(__file__).with_name("exceptions.toml"), "rb") as file:
        return tomllib.load(file)
