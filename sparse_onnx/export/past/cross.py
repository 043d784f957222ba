"""Encoder-decoders with their key/value cache: the decoder as a graph of its own, fed with what the encoder gave.

The names are optimum's. A layer's keys and values of the encoder's tokens go in and come out beside the decoder's own.
Empty ones are computed from ``encoder_hidden_states``; otherwise that input is not read, so that one graph serves the
first token and all others, and the weights are there once.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sparse_onnx.core.errors import ImpossibleError
from sparse_onnx.export import samples
from sparse_onnx.export.past.cross_cache import (
    CACHED,
    HIDDEN,
    IDS,
    MASK,
    CrossDecoder,
    CrossSlot,
    only_new,
    presents,
)
from sparse_onnx.export.past.slots import HINT, own_cache
from sparse_onnx.export.past.source import PastInterface, PastSource
from sparse_onnx.export.samples import Interface, Kind, Spec
from sparse_onnx.export.sources import Source

ENCODER = "encoder_model.onnx"
#: Batch, new tokens, past tokens, the encoder's tokens.
_RUNS: tuple[tuple[int, int, int, int, Kind], ...] = (
    (3, 1, 0, 9, "random"),
    (1, 1, 0, 1, "random"),
    (1, 1, 8, 12, "random"),
    (4, 1, 6, 5, "one"),
    (2, 9, 4, 7, "one"),
    (1, 6, 40, 20, "random"),
    (5, 3, 13, 6, "random"),
    (3, 4, 0, 8, "padded"),
    (2, 1, 9, 10, "padded"),
    (2, 4, 5, 13, "padded"),
)


@dataclasses.dataclass(frozen=True)
class CrossInterface(PastInterface):
    """Inputs by their ONNX names. The encoder's keys are cached where there is a past."""

    @property
    def symbols(self) -> tuple[str, ...]:
        return "batch", "sequence", "past_sequence", "encoder_sequence"

    def complete(self, sizes: Mapping[str, int]) -> Mapping[str, int]:
        return {CACHED: sizes["encoder_sequence"] if sizes["past_sequence"] else 0, **sizes}

    def traced_sizes(self) -> dict[str, int]:
        """With part of the encoder's keys cached, so that the trace takes no length for another."""
        return {**super().traced_sizes(), CACHED: 3}

    def draw(self, sizes: Mapping[str, int], kind: Kind = "random", seed: int = 0) -> dict[str, Tensor]:
        return Interface.draw(self, self.complete(sizes), kind, seed)

    def planned(self) -> list[tuple[dict[str, int], Kind]]:
        return [
            (dict(zip(self.symbols, sizes, strict=True)), kind)
            for *sizes, kind in _RUNS
            if self.longest is None or max(sizes[1] + sizes[2], sizes[3]) <= self.longest
        ]

    def described(self, sizes: Mapping[str, int]) -> str:
        return f"{super().described(sizes)} from {sizes['encoder_sequence']}"

    def run(self, name: str, inputs: dict[str, Tensor], sizes: Mapping[str, int]) -> samples.Run:
        return CrossRun(name, inputs, sizes, self.masks)


class CrossRun(samples.Run):
    """Only the encoder's tokens have padding, and none of the outputs is about them but their keys, which the mask
    leaves out."""

    def kept(self, output: int, shape: tuple[int, ...]) -> np.ndarray:
        return np.ones(shape[:1], np.bool_)


@dataclasses.dataclass(frozen=True)
class CrossSource(PastSource):
    """A decoder with cross-attention; `encoder` is the other half, a model of its own, and `encoder_path` its exported
    file, once there is one."""

    slots: tuple[CrossSlot, ...] = ()
    encoder: Source | None = None
    encoder_path: Path | None = None

    @property
    def decoder(self) -> Any:
        return CrossDecoder.of(self.module)

    def forward(self, inputs: Mapping[str, Tensor]) -> Any:
        """Logits and new cache by the module with transformers' own cache."""
        decoder = self.decoder
        with torch.no_grad():
            cache = decoder.own(self.slots, inputs)
            output = decoder(inputs, cache)
            return output.logits, *presents(cache, self.slots)

    def flat(self, decoder: Any, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The same for a trace, by names of the outputs."""
        cached = next(inputs[slot.past] for slot in self.slots if slot.side == "encoder")
        cache = decoder.growing(self.slots, inputs)
        with only_new(self.module, cached):
            output = decoder(inputs, cache)
        now = presents(cache, self.slots)
        return {"logits": output.logits} | {
            slot.present: value for slot, value in zip(self.slots, now, strict=True)
        }

    def widened(self) -> CrossSource:
        """Without the encoder's file, which is in half precision."""
        assert self.plain is not None
        return with_encoder(self.plain.widened())


def with_encoder(source: Source) -> CrossSource:
    """Both halves of an encoder-decoder of text.

    Raises:
        ImpossibleError: it takes something else than text, or its cache has no such inputs.
    """
    module: Any = source.module
    decoder = CrossDecoder.of(module)
    if not {IDS, "attention_mask"} <= set(source.interface.inputs):
        raise ImpossibleError("--past takes encoders of text, with ids and a mask", HINT)
    text = {
        name: dataclasses.replace(spec, axes={0: "batch", 1: "encoder_sequence"})
        for name, spec in source.interface.inputs.items()
        if name in (IDS, "attention_mask")
    }
    encoder = Source(
        f"{source.name} (encoder)", module.get_encoder(), Interface(text), True, owned=source.owned
    )
    with own_cache():
        with torch.no_grad():
            hidden = encoder.forward({name: spec.example[:1] for name, spec in text.items()})[0]
        slots = decoder.layout(hidden)
    longest = getattr(decoder.text, "max_position_embeddings", None)
    own = {field.name: getattr(source, field.name) for field in dataclasses.fields(source)}
    changed = {
        "interface": CrossInterface(_inputs(decoder, slots, hidden), longest=longest),
        "is_transformers": True,
    }
    return CrossSource(**{**own, **changed}, slots=slots, plain=source, encoder=encoder)


def _inputs(decoder: CrossDecoder, slots: Sequence[CrossSlot], hidden: Tensor) -> dict[str, Spec]:
    """Examples of two sequences: two tokens after three, and four of the encoder."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(hidden.dtype)

    last = int(decoder.text.vocab_size) - 1
    inputs = {
        IDS: Spec(torch.tensor([[0, last], [last, 0]]), {0: "batch", 1: "sequence"}),
        MASK: Spec(torch.ones(2, 4, dtype=torch.int64), {0: "batch", 1: "encoder_sequence"}, True),
        HIDDEN: Spec(random(2, 4, hidden.shape[2]), {0: "batch", 1: "encoder_sequence"}),
    }
    for slot in slots:
        _, heads, _, width = slot.shape
        length = 3 if slot.side == "decoder" else 4
        inputs[slot.past] = Spec(random(2, heads, length, width).to(slot.dtype), {0: "batch", 2: slot.symbol})
    return inputs
