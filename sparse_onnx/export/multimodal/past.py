"""The decoder of a multimodal model with its key/value cache: embeddings and past in, logits and present out."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from sparse_onnx.core.errors import ImpossibleError
from sparse_onnx.export.multimodal.parts import positions
from sparse_onnx.export.multimodal.whole import Whole
from sparse_onnx.export.past.cache import HINT, Decoder, Slot
from sparse_onnx.export.past.slots import own_cache
from sparse_onnx.export.past.source import PastInterface, PastSource, states_of
from sparse_onnx.export.samples import Kind, Spec
from sparse_onnx.export.sources import Source

#: Tokens of the example: two sequences of two, after three.
_NEW, _PAST = 2, 3


@dataclasses.dataclass(frozen=True)
class EmbedsInterface(PastInterface):
    """Embeddings instead of ids; positions may have several axes."""

    def draw(self, sizes: Mapping[str, int], kind: Kind = "random", seed: int = 0) -> dict[str, Tensor]:
        drawn = super().draw(sizes, kind, seed)
        spec = self.inputs.get("position_ids")
        if spec is not None:
            shape = torch.Size(spec.shape(self.complete(sizes)))
            drawn["position_ids"] = positions(drawn["attention_mask"], shape, seed)
        return drawn


@dataclasses.dataclass(frozen=True)
class TextPast(PastSource):
    """A decoder that is given embeddings and what goes with them; `whole` says how it is called."""

    generates: ClassVar[bool] = False
    whole: Whole | None = None

    @property
    def decoder(self) -> Decoder:
        return decoder_of(self.module)

    def answer(self, decoder: Decoder, inputs: Mapping[str, Tensor], cache: Any) -> Any:
        assert self.whole is not None
        past = {slot.past for slot in self.slots}
        given: dict[str, Any] = {name: value for name, value in inputs.items() if name not in past}
        return self.whole.decode(self.module, **given, **{decoder.cache: cache}, use_cache=True)

    def widened(self) -> TextPast:
        assert self.whole is not None and self.plain is not None
        return with_past(self.plain.widened(), self.whole)


def decoder_of(module: Any) -> Decoder:
    """How the whole model is called with ids and a cache, whatever stands in the place of its forward."""
    return dataclasses.replace(Decoder.of(module), forward=functools.partial(type(module).forward, module))


def with_past(plain: Source, whole: Whole) -> TextPast:
    """The decoder without cache, as a source, with its cache among inputs and outputs.

    Raises:
        ImpossibleError: it has none, or one that has no such inputs.
    """
    decoder = decoder_of(plain.module)
    with own_cache():
        slots = decoder.layout()
        continues = decoder.continues(slots)
    if any(slot.rate or not slot.dtype.is_floating_point for slot in slots):
        raise ImpossibleError("the cache holds more than keys, values and states", HINT)
    if not continues:
        raise ImpossibleError(
            "transformers' own code for this model forgets its state where several tokens follow a past", HINT
        )
    longest = getattr(decoder.text, "max_position_embeddings", None)
    interface = EmbedsInterface(
        _inputs(plain, slots), tuple(decoder.thresholds()), longest, states=states_of(slots)
    )
    own = {field.name: getattr(plain, field.name) for field in dataclasses.fields(plain)}
    return TextPast(**{**own, "interface": interface}, slots=slots, plain=plain, whole=whole)


def _inputs(plain: Source, slots: tuple[Slot, ...]) -> dict[str, Spec]:
    inputs: dict[str, Spec] = {}
    for name, spec in plain.interface.inputs.items():
        if name == "attention_mask":
            mask = torch.ones(2, _PAST + _NEW, dtype=torch.int64)
            inputs[name] = Spec(mask, {0: "batch", 1: "total_sequence"}, True)
        else:
            inputs[name] = Spec(_two_of_two(spec), spec.axes)
    generator = torch.Generator().manual_seed(0)
    for slot in slots:
        axes = {0: "batch"} | ({slot.axis: "past_sequence"} if slot.axis is not None else {})
        shape = [_PAST if axis == slot.axis else size for axis, size in enumerate(slot.shape)]
        inputs[slot.past] = Spec(torch.randn(2, *shape[1:], generator=generator).to(slot.dtype), axes)
    return inputs


def _two_of_two(spec: Spec) -> Tensor:
    """Two sequences of two tokens of an example of one sequence, whose text ends behind the second token."""
    batch = next(axis for axis, name in spec.axes.items() if name == "batch")
    tokens = spec.example.narrow(batch + 1, 0, 2 * _NEW)
    shape = list(tokens.shape)
    shape[batch : batch + 2] = [2, _NEW]
    return tokens.reshape(shape).contiguous()
