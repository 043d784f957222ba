"""UnlimitedOCR's layers, which keep the prompt and a window of what was generated; in ONNX, as elsewhere, every token.

How long the prompt is stands in the first of them, one number a sequence: 0 at first, for as long as what comes first.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

KIND = "reference_length"


def is_referencing(layer: Any) -> bool:
    return hasattr(layer, "prefill_length")


def whole() -> Any:
    """A layer that keeps every key."""
    from transformers import cache_utils

    layer: Any = cache_utils.DynamicLayer()
    layer._layer_type = "reference_sliding_attention"
    return layer


def fill(layer: Any, keys: Tensor, values: Tensor, length: int) -> None:
    """Has a fresh layer of transformers hold these tokens, `length` of which are the prompt."""
    layer.prefill_length = length or None
    if not keys.shape[2]:
        return
    layer.is_initialized = True
    layer.prefill_keys, layer.keys = keys[:, :, :length], keys[:, :, length:]
    layer.prefill_values, layer.values = values[:, :, :length], values[:, :, length:]
    layer.prefill_cumulative_length = layer.prefill_keys.shape[2]
    layer.cumulative_length = layer.keys.shape[2]
    layer.keys, layer.values = (
        each[:, :, -layer.sliding_window + 1 :] for each in (layer.keys, layer.values)
    )


def read(layer: Any, kind: str) -> Tensor:
    if kind == KIND:
        return torch.full((len(layer.prefill_keys),), int(layer.prefill_length), dtype=torch.int64)
    name = f"{kind}s"
    return torch.cat([getattr(layer, f"prefill_{name}"), getattr(layer, name)], dim=2)
