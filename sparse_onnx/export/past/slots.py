"""What the layers of transformers' caches hold, as named tensors: read, written, and filled with a past."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from sparse_onnx.core.errors import ImpossibleError, SparseOnnxError
from sparse_onnx.export.failure import first_line
from sparse_onnx.export.past import compressed, reference

HINT = "export it without --past"
#: Kinds of slots that grow with each token -> the axis, and where a layer of transformers keeps them.
_GROWING = {
    "key": (2, "keys"),
    "value": (2, "values"),
    "indexer_key": (1, "indexer_keys"),
    "indexer_position": (1, "indexer_position_ids"),
}
_STATES = ("conv_state", "recurrent_state")


@contextlib.contextmanager
def own_cache() -> Iterator[None]:
    """Within the block the model runs with a cache of transformers; whatever it raises there is its refusal of one.

    Raises:
        ImpossibleError: it raises.
    """
    try:
        yield
    except SparseOnnxError:
        raise
    except Exception as error:
        raise ImpossibleError(
            f"the model does not run with transformers' own cache: {first_line(error)}", HINT
        ) from error


@dataclasses.dataclass(frozen=True)
class Slot:
    """One tensor of the cache, with the batch in axis 0.

    `kind` is ``key`` and ``value`` `[batch, heads, length, width]``, ``indexer_key`` `[batch, length, width]` and
    ``indexer_position`` `[batch, length]`, which grow with each token, or ``conv_state`` and ``recurrent_state``, which
    do not; `index` counts the states of one layer. Of `compressed.parts` that which grows has a `rate`, the tokens of a
    block; ``reference_length`` `[batch]` is that of the prompt. `alone` says that the layer has no other state or key,
    as LFM2's convolutions.
    """

    layer: int
    kind: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    index: int = 0
    alone: bool = False
    rate: int = 0

    @property
    def axis(self) -> int | None:
        """The axis that grows with each token."""
        return _GROWING[self.kind][0] if self.kind in _GROWING else None

    @property
    def growing(self) -> int | None:
        """The axis that grows at all."""
        return 1 if self.rate else self.axis

    @property
    def symbol(self) -> str:
        """How the growing axis of `past` is called."""
        return blocks_axis(self.rate) if self.rate else "past_sequence"

    @property
    def axes(self) -> dict[int, str]:
        """Names of the dynamic axes of `past`."""
        return {0: "batch"} | ({} if self.growing is None else {self.growing: self.symbol})

    @property
    def fixed(self) -> bool:
        """Whether it does not grow, and so is zeros at first."""
        return self.growing is None

    @property
    def past(self) -> str:
        return f"past_conv.{self.layer}" if self.alone else f"past_key_values.{self.layer}.{self._suffix}"

    @property
    def present(self) -> str:
        return f"present_conv.{self.layer}" if self.alone else f"present.{self.layer}.{self._suffix}"

    @property
    def total(self) -> str:
        """How the growing axis of `present` is called."""
        return self.symbol.replace("past", "total")

    @property
    def _suffix(self) -> str:
        return f"{self.kind}_{self.index}" if self.index else self.kind

    @property
    def is_part(self) -> bool:
        """Whether it is one of `compressed.parts`."""
        return self.kind.startswith(("compressor_", "indexer_")) and self.kind not in _GROWING

    def read(self, layer: Any, before: Tensor | None = None) -> Tensor:
        """From a layer of a cache; `before` is the past's."""
        if self.is_part:
            return compressed.read(layer, self.kind, before)
        if reference.is_referencing(layer):
            return reference.read(layer, self.kind)
        if self.kind == reference.KIND:
            return layer.reference_length
        if self.kind == "indexer_position":
            return layer.indexer_position_ids[0]
        if self.axis is not None:
            return getattr(layer, _GROWING[self.kind][1])
        return getattr(layer, f"{self.kind}s")[self.index]


def blocks_axis(rate: int) -> str:
    """Name of an axis that has one entry for each whole block of so many tokens of the past."""
    return f"past_blocks_{rate}"


def slots_of(index: int, layer: Any) -> Iterator[Slot]:
    """
    Raises:
        ImpossibleError: the layer keeps something else than keys, values and states.
    """
    from transformers import cache_utils

    known = (
        cache_utils.DynamicLayer,
        cache_utils.DynamicSlidingWindowLayer,
        cache_utils.DynamicIndexedLayer,
        cache_utils.LinearAttentionLayer,
        cache_utils.LinearAttentionAndFullAttentionLayer,
        cache_utils.LinearAttentionAndSlidingWindowAttentionLayer,
    )
    if isinstance(layer, cache_utils.DummyLayer):
        return
    if compressed.is_compressing(layer):
        yield Slot(index, "key", tuple(layer.keys.shape), layer.keys.dtype)  # values are the same
        for kind, shape, dtype in compressed.parts(layer):
            rate = layer.compress_rate if kind.endswith("_compressed") else 0
            yield Slot(index, kind, shape, dtype, rate=rate)
        return
    if reference.is_referencing(layer):
        for kind, value in (("key", layer.prefill_keys), ("value", layer.prefill_values)):
            yield Slot(index, kind, tuple(value.shape), value.dtype)
        yield Slot(index, reference.KIND, (1,), torch.int64)
        return
    if type(layer) not in known:
        raise ImpossibleError(
            f"layer {index} keeps a {type(layer).__name__} in the cache, which neither onnxruntime-genai nor "
            "optimum has inputs for",
            HINT,
        )
    for kind, (_, attribute) in _GROWING.items():
        value = getattr(layer, attribute, None)
        if value is not None:
            value = value[0] if kind == "indexer_position" else value
            yield Slot(index, kind, tuple(value.shape), value.dtype)
    states = [
        (kind, number, value)
        for kind in _STATES
        for number, value in getattr(layer, f"{kind}s", {}).items()
        if value is not None
    ]
    alone = len(states) == 1 and states[0][0] == "conv_state" and getattr(layer, "keys", None) is None
    for kind, number, value in states:
        yield Slot(index, kind, tuple(value.shape), value.dtype, number, alone)


def fill(layer: Any, named: Sequence[tuple[Slot, Tensor]]) -> None:
    """Has a fresh layer hold these tensors."""
    parts = {slot.kind: value for slot, value in named if slot.is_part}
    if parts:
        named = named[: -len(parts)]
        layer.keys = layer.values = named[0][1]
        compressed.fill(layer, parts)
    for slot, value in named:
        layer.device, layer.dtype = value.device, value.dtype
        if slot.kind in ("key", "value"):
            setattr(layer, f"{slot.kind}s", value)
            layer.is_initialized = True
        elif slot.kind == "indexer_key":
            layer.indexer_keys, layer.is_indexer_initialized = value, True
            layer.indexer_device, layer.indexer_dtype = value.device, value.dtype
        elif slot.kind == reference.KIND:
            layer.reference_length = value
        elif slot.kind == "indexer_position":
            # Time, height and width, which are one in a text.
            layer.indexer_position_ids = value.expand(3, *value.shape)
        else:
            # Layers write their states in place.
            getattr(layer, f"{slot.kind}s")[slot.index] = value.clone()
            getattr(layer, f"is_{slot.kind}s_initialized")[slot.index] = True
            layer.has_previous_state[slot.index] = True
            if slot.kind == "conv_state":
                layer.conv_kernel_size[slot.index] = slot.shape[-1]


def narrow(layer: Any, length: int) -> None:
    """Leaves a sliding window what transformers leaves it after `length` tokens."""
    window = getattr(layer, "sliding_window", None)
    if window is not None:
        layer.keys = layer.keys[:, :, -window + 1 :]
        layer.values = layer.values[:, :, -window + 1 :]
        layer.cumulative_length = length
