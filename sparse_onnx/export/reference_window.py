"""UnlimitedOCR's attention: every token sees the prompt, and of what was generated the last ones.

A forward that `patches` puts in place, for a cache that keeps all tokens; its first layer of this kind says how long
the prompt is.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_MASK = "create_reference_sliding_window_causal_mask"


def with_reference(self: Any, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """The text model's forward."""
    cache = kwargs.get("cache")
    layer = next((each for each in getattr(cache, "layers", ()) if hasattr(each, "reference_length")), None)
    if layer is None:
        return original(self, *args, **kwargs)
    source: Any = sys.modules[type(self).__module__]
    own = getattr(source, _MASK)
    setattr(source, _MASK, functools.partial(_mask, layer))
    try:
        return original(self, *args, **kwargs)
    finally:
        setattr(source, _MASK, own)


def _mask(layer: Any, config: Any, inputs_embeds: Tensor, attention_mask: Tensor, **_: Any) -> Tensor:
    """What each new token sees `[batch, 1, sequence, past + sequence]`. The length of the prompt is that of what comes
    first, unless it was said before; it stays in the layer."""
    new, past = inputs_embeds.shape[1], layer.keys.shape[2]
    prompt = layer.reference_length
    prompt = torch.where(prompt > 0, prompt, torch.full_like(prompt, 0) + (past + new))
    layer.reference_length = prompt
    key = torch.arange(past + new, device=prompt.device)
    query = (torch.arange(new, device=prompt.device) + past)[None, :, None]
    of_prompt = key < prompt[:, None]
    seen = (key <= query) & (of_prompt[:, None] | (query - key < config.sliding_window))
    # transformers looks up whether a token of the prompt is padding as far behind it as the window has moved.
    moved = (past - prompt - config.sliding_window + 1).clamp(min=0)
    place = torch.where(of_prompt, key + moved[:, None], key).clamp(max=past + new - 1)
    seen = (seen & attention_mask.bool().gather(1, place)[:, None])[:, None]
    if config._attn_implementation != "eager":
        return seen
    least = torch.finfo(inputs_embeds.dtype).min
    return torch.zeros(seen.shape, dtype=inputs_embeds.dtype).masked_fill(~seen, least)
