"""Rotary embeddings whose frequencies depend on how far the positions go, by a choice instead of Python's `if`:
forwards that `patches` puts in place."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


def longrope(self: Any, original: Callable[..., Any], x: Tensor, position_ids: Tensor) -> Any:
    """PhiMoE's, whose scale depends on the largest position."""
    parameters = self.config.rope_parameters
    if parameters["rope_type"] == "default":
        return original(self, x, position_ids)
    inv_freq, _ = self.rope_init_fn(self.config)
    scale = torch.where(
        position_ids.max() + 1 > parameters["original_max_position_embeddings"],
        torch.tensor(float(parameters["long_mscale"])),
        torch.tensor(float(parameters["short_mscale"])),
    )
    angles = position_ids[..., None].float() * inv_freq.float()
    angles = torch.cat((angles, angles), dim=-1)
    return (angles.cos() * scale).to(x.dtype), (angles.sin() * scale).to(x.dtype)


def is_dynamic(module: nn.Module) -> bool:
    """Does the module count how far it got, as rope type `dynamic` does?"""
    kinds = getattr(module, "rope_type", None)
    names = kinds.values() if isinstance(kinds, dict) else [kinds]
    return hasattr(module, "original_max_seq_len") and any("dynamic" in str(name) for name in names)


def dynamic(
    self: Any, original: Callable[..., Any], x: Tensor, position_ids: Tensor, layer_type: str | None = None
) -> Any:
    """Rope type `dynamic`: beyond the length of its training the base grows with the largest position. As a new model
    does it: transformers' own keeps the frequencies of the longest sequence until a short one comes."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    given = {} if layer_type is None else {"layer_type": layer_type}
    kind, prefix = (
        (self.rope_type, "") if layer_type is None else (self.rope_type[layer_type], f"{layer_type}_")
    )
    if "dynamic" not in kind:
        return original(self, x, position_ids, **given)
    length = position_ids.max() + 1
    grown, _ = ROPE_INIT_FUNCTIONS[kind](self.config, x.device, seq_len=length, **given)
    usual = getattr(self, f"{prefix}original_inv_freq")
    name = f"{prefix}inv_freq"
    kept = self._buffers[name]
    self._buffers[name] = torch.where(length > self.original_max_seq_len, grown, usual)
    try:
        return inspect.unwrap(original)(self, x, position_ids, **given)
    finally:
        self._buffers[name] = kept
