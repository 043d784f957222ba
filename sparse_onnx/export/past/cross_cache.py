"""The cache of an encoder-decoder: keys and values of its own tokens and of the encoder's, as optimum names them."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from sparse_onnx.core.errors import ImpossibleError
from sparse_onnx.export import cached_rows
from sparse_onnx.export.past.slots import HINT, Slot, fill, slots_of

IDS, HIDDEN, MASK = "input_ids", "encoder_hidden_states", "encoder_attention_mask"
CACHED = "cached_encoder_sequence"


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
        if id(getattr(output, self.cache, None)) != id(cache):
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
