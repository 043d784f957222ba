"""Encoder-decoders with their key/value cache: the decoder as a graph of its own, fed with what the encoder gave.

The names are optimum's. A layer's keys and values of the encoder's tokens go in and come out beside the decoder's own.
Empty ones are computed from ``encoder_hidden_states``; otherwise that input is not read, so that one graph serves the
first token and all others, and the weights are there once.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from sparse_onnx.core.errors import ImpossibleError, SparseOnnxError
from sparse_onnx.export import cached_rows, samples
from sparse_onnx.export.failure import first_line
from sparse_onnx.export.past.slots import HINT, Slot, fill, slots_of
from sparse_onnx.export.past.source import PastInterface, PastSource
from sparse_onnx.export.samples import Interface, Kind, Spec
from sparse_onnx.export.sources import Source

ENCODER = "encoder_model.onnx"
IDS, HIDDEN, MASK = "input_ids", "encoder_hidden_states", "encoder_attention_mask"
CACHED = "cached_encoder_sequence"
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
class CrossSlot(Slot):
    """Keys or values of one layer: of the decoder's tokens, or of the encoder's."""

    side: Literal["decoder", "encoder"] = "decoder"

    @property
    def _suffix(self) -> str:
        return f"{self.side}.{self.kind}"

    @property
    def symbol(self) -> str:
        """How the growing axis of `past` is called."""
        return "past_sequence" if self.side == "decoder" else CACHED

    @property
    def total(self) -> str:
        return "total_sequence" if self.side == "decoder" else "encoder_sequence"


@dataclasses.dataclass(frozen=True)
class CrossDecoder:
    """How a model of transformers with encoder and decoder is called with a cache."""

    config: Any
    forward: Any
    cache: str

    @staticmethod
    def of(model: Any) -> CrossDecoder:
        """
        Raises:
            ImpossibleError: the model does not generate, or takes no cache.
        """
        parameters = inspect.signature(type(model).forward).parameters
        name = next((each for each in ("cache", "past_key_values") if each in parameters), None)
        if name is None or not model.can_generate():
            raise ImpossibleError(
                f"--past needs a decoder that generates: {type(model).__name__} has no key/value cache", HINT
            )
        return CrossDecoder(model.config, model.forward, name)

    @property
    def text(self) -> Any:
        """The configuration of the decoder itself."""
        return self.config.get_text_config(decoder=True)

    def __call__(self, inputs: Mapping[str, Tensor], cache: Any) -> Any:
        """The model's output for inputs by their ONNX names; `cache` grows."""
        from transformers.modeling_outputs import MoEModelOutput

        return self.forward(
            encoder_outputs=MoEModelOutput(last_hidden_state=inputs[HIDDEN]),
            attention_mask=inputs[MASK],
            decoder_input_ids=inputs[IDS],
            use_cache=True,
            **{self.cache: cache},
        )

    def empty(self) -> Any:
        """The cache that transformers' `generate` starts with."""
        from transformers import DynamicCache, EncoderDecoderCache

        return EncoderDecoderCache(DynamicCache(config=self.text), DynamicCache(config=self.text))

    def layout(self, hidden: Tensor) -> tuple[CrossSlot, ...]:
        """The tensors of the cache, by running the model on three tokens after the encoder's states `[1, length, D]`.

        Raises:
            ImpossibleError: a layer keeps something else than keys and values of all tokens.
        """
        cache, ids = self.empty(), torch.tensor([[0, 1, 2]])
        mask = torch.ones(hidden.shape[:2], dtype=torch.int64)
        with torch.no_grad():
            output = self({IDS: ids, HIDDEN: hidden, MASK: mask}, cache)
        if getattr(output, self.cache, None) is not cache:
            raise ImpossibleError("the model keeps a cache of its own", HINT)
        sides: dict[Literal["decoder", "encoder"], Any] = {
            "decoder": cache.self_attention_cache,
            "encoder": cache.cross_attention_cache,
        }
        slots = [
            CrossSlot(slot.layer, slot.kind, slot.shape, slot.dtype, side=side)
            for side, half in sides.items()
            for index, layer in enumerate(half.layers)
            for slot in slots_of(index, layer)
        ]
        for slot in slots:
            if slot.kind not in ("key", "value") or getattr(_layer(cache, slot), "sliding_window", None):
                raise ImpossibleError(
                    f"layer {slot.layer} of the decoder keeps something else than the keys of all tokens",
                    HINT,
                )
        return tuple(sorted(slots, key=lambda slot: slot.layer))

    def own(self, slots: Sequence[CrossSlot], tensors: Mapping[str, Tensor]) -> Any:
        """A cache as transformers has it with this past; empty tensors are left out."""
        cache = self.empty()
        for slot in slots:
            if tensors[slot.past].shape[2]:
                fill(_layer(cache, slot), [(slot, tensors[slot.past])])
                if slot.side == "encoder":
                    cache.is_updated[slot.layer] = True
        return cache

    def growing(self, slots: Sequence[CrossSlot], tensors: Mapping[str, Tensor]) -> Any:
        """A cache to which both halves are added, whatever lengths they have."""
        from transformers.cache_utils import DynamicLayer

        class Joined(DynamicLayer):
            def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> Any:
                self.keys = cached_rows.joined(self.keys, key_states, tensors[HIDDEN])
                self.values = cached_rows.joined(self.values, value_states, tensors[HIDDEN])
                return self.keys, self.values

        cache = self.empty()
        for slot in slots:
            if slot.side == "encoder" and type(_layer(cache, slot)) is not Joined:
                cache.cross_attention_cache.layers[slot.layer] = Joined()
            fill(_layer(cache, slot), [(slot, tensors[slot.past])])
        return cache


def presents(cache: Any, slots: Sequence[CrossSlot]) -> list[Tensor]:
    """The cache's tensors in the order of the slots."""
    return [slot.read(_layer(cache, slot)) for slot in slots]


def _layer(cache: Any, slot: CrossSlot) -> Any:
    half = cache.self_attention_cache if slot.side == "decoder" else cache.cross_attention_cache
    return half.layers[slot.layer]


@contextlib.contextmanager
def only_new(model: nn.Module, cached: Tensor) -> Iterator[None]:
    """Within the block attention to the encoder computes keys and values of those rows only that are not in the cache
    yet, whose keys are `cached`."""

    def cut(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        states = kwargs.get("key_value_states")
        if states is None:
            return None
        return args, {**kwargs, "key_value_states": cached_rows.rest(states, cached)}

    taking = [
        module
        for module in model.modules()
        if "key_value_states" in inspect.signature(type(module).forward).parameters
    ]
    inner = [module for module in taking if not any(other is not module for other in _within(module, taking))]
    handles = [module.register_forward_pre_hook(cut, with_kwargs=True) for module in inner]
    view = torch.Tensor.view
    torch.Tensor.view = _without_inference(view)  # type: ignore[method-assign]
    try:
        yield
    finally:
        torch.Tensor.view = view  # type: ignore[method-assign]
        for handle in handles:
            handle.remove()


def _without_inference(view: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """`view(*x.shape[:-1], -1, width)` with the number of heads in place of -1, which says nothing of an empty tensor:
    where all rows are cached, none are left."""

    def explicit(self: Tensor, *shape: Any) -> Tensor:
        sizes = shape[0] if len(shape) == 1 and isinstance(shape[0], Sequence) else shape
        inferred = [at for at, size in enumerate(sizes) if type(size) is int and size == -1]
        if inferred == [len(sizes) - 2] and len(sizes) == self.dim() + 1 and type(sizes[-1]) is int:
            sizes = (*sizes[:-2], self.shape[-1] // sizes[-1], sizes[-1])
        return view(self, *(sizes if sizes is not shape else shape))

    return explicit


def _within(module: nn.Module, others: Sequence[nn.Module]) -> Iterator[nn.Module]:
    parts = {id(part) for part in module.modules()}
    return (other for other in others if id(other) in parts)


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

    def flat(self, decoder: CrossDecoder, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
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
        assert self.plain is not None
        return dataclasses.replace(with_encoder(self.plain.widened()), encoder_path=self.encoder_path)


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
    try:
        with torch.no_grad():
            hidden = encoder.forward({name: spec.example[:1] for name, spec in text.items()})[0]
        slots = decoder.layout(hidden)
    except SparseOnnxError:
        raise
    except Exception as error:  # whatever the model raises where it is given a cache
        raise ImpossibleError(
            f"the model does not run with transformers' own cache: {first_line(error)}", HINT
        ) from error
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
