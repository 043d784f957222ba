"""DeepSeek-V4's layers, which beside their keys keep one compressed key for each block of tokens.

transformers keeps what the tokens of an unfinished block have left, as many as there are; in ONNX it has the size of a
block less one, with zeros behind. `rate` is the tokens of a block; the names are those of `export.compressors`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

#: Kind of what a compressor keeps -> attribute of transformers' layer.
_ATTRIBUTES = {
    "compressed": "compressed_kv",
    "buffer": "buffer_kv",
    "gate": "buffer_gate",
    "overlap": "overlap_kv",
    "overlap_gate": "overlap_gate",
}


def is_compressing(layer: Any) -> bool:
    return hasattr(layer, "compressed_kv") and hasattr(layer, "compress_rate")


def parts(layer: Any) -> Iterator[tuple[str, tuple[int, ...], torch.dtype]]:
    """Kind, shape and type of each tensor beside the keys; ``.._compressed`` `[batch, blocks, width]` grows."""
    for name, compressed in layer.compressed_kv.items():
        buffer, gate = layer.buffer_kv[name], layer.buffer_gate[name]
        batch, rate, width = len(buffer), layer.compress_rate, compressed.shape[-1]
        yield f"{name}_compressed", tuple(compressed.shape), compressed.dtype
        yield f"{name}_buffer", (batch, rate - 1, buffer.shape[-1]), buffer.dtype
        yield f"{name}_gate", (batch, rate - 1, gate.shape[-1]), gate.dtype
        if hasattr(layer, "overlap_kv"):
            yield f"{name}_overlap", (batch, rate, width), buffer.dtype
            # Gates have a bias by then, which is a float32.
            yield f"{name}_overlap_gate", (batch, rate, width), torch.promote_types(gate.dtype, torch.float32)


def whole() -> Any:
    """A layer that keeps every key, and the rest as `states`, where `export.compressors` looks for it."""
    from transformers import cache_utils

    layer: Any = cache_utils.DynamicLayer()
    layer.states = {}
    return layer


def fill(layer: Any, states: Mapping[str, Tensor]) -> None:
    """Has a layer, whose keys are there, hold what these are after so many tokens."""
    if hasattr(layer, "states"):
        layer.states |= states
        return
    blocks, rest = divmod(layer.keys.shape[2], layer.compress_rate)
    for kind, value in states.items():
        name, _, part = kind.partition("_")
        if part in ("buffer", "gate"):
            getattr(layer, _ATTRIBUTES[part])[name] = value[:, :rest]
        elif blocks or part == "compressed":
            getattr(layer, _ATTRIBUTES[part])[name] = value
        layer.entry_count[name] = blocks


def read(layer: Any, kind: str, before: Tensor | None) -> Tensor:
    """A tensor of `parts`; `before` is that of the past, which stays where there is no whole block yet."""
    name, _, part = kind.partition("_")
    if hasattr(layer, "states"):
        return layer.states[kind]
    value: Tensor | None = getattr(layer, _ATTRIBUTES[part])[name]
    if value is None:
        assert before is not None
        return before
    if part in ("buffer", "gate"):
        value = torch.nn.functional.pad(value, (0, 0, 0, layer.compress_rate - 1 - value.shape[1]))
    return value


def recording(layer: Any) -> Any:
    """The layer, with the keys of the newest tokens as `newest`, more than its window may keep."""
    kind = type(layer)

    class Recording(kind):  # type: ignore[misc, valid-type]
        _layer_type = None  # or transformers would take it for the one of this kind

        def update(self, keys: Tensor, values: Tensor, *args: Any, **kwargs: Any) -> Any:
            self.newest = keys
            return super().update(keys, values, *args, **kwargs)

    layer.__class__ = Recording
    return layer
