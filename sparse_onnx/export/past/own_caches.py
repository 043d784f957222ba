"""The cache that a model starts with, where it is not transformers' `DynamicCache`."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

from torch import Tensor


def maker(model: type, config: Any) -> tuple[Callable[[], Any], bool]:
    """What makes an empty cache for a model of this class and configuration of its text, and whether `generate` has to
    be given one, because its own would be another."""
    own = getattr(sys.modules[model.__module__], "MiniMaxCache", None)
    if own is not None:
        return functools.partial(_with_layers(own), config), True
    return functools.partial(_default, config), False


def _default(config: Any) -> Any:
    from transformers import DynamicCache

    return DynamicCache(config=config)


def _with_layers(own: type) -> Callable[[Any], Any]:
    """MiniMax's cache, with the states of linear attention in layers of their own.

    transformers keeps them beside the layers, among which an empty one stands for each. Where that is the first one, as
    in MiniMax-Text-01, it takes the past for empty: masks do not fit then, and it raises.
    """
    from transformers import cache_utils

    class Layered(own):  # type: ignore[misc]
        def __init__(self, config: Any) -> None:
            super().__init__()
            kinds = {"linear_attention": cache_utils.LinearAttentionLayer}
            self.layers: list[Any] = [
                kinds.get(kind, cache_utils.DynamicLayer)() for kind in config.layer_types
            ]
            self.layer_class_to_replicate = None

        def get_linear_cache(self, layer_idx: int) -> Tensor | None:
            state: Tensor | None = self.get_recurrent_state(layer_idx)
            return state

        def set_linear_cache(self, layer_idx: int, linear_cache: Tensor) -> None:
            self.update_recurrent_state(linear_cache, layer_idx)
            self.layers[layer_idx].has_previous_state[0] = True

    return Layered
