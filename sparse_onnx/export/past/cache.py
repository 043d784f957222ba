"""A decoder's cache as flat tensors, in the names of onnxruntime-genai and optimum.

transformers keeps one object a layer. Sliding windows and chunks keep what lies within the window only; in ONNX all
layers keep every token, since both runtimes feed one past length, and the mask leaves out what is too far back.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sparse_onnx.core.errors import ImpossibleError
from sparse_onnx.export.past import compressed, own_caches, reference
from sparse_onnx.export.past.slots import HINT, Slot, fill, narrow, slots_of

#: What rounding does not explain, relative to the largest logit: where other tokens follow others, and where the same
#: are only followed by others.
_FORGOTTEN, _AHEAD = 1e-1, 1e-2


@dataclasses.dataclass(frozen=True)
class Decoder:
    """How a language model of transformers is called with a cache.

    `forward` is the model's own, whatever stands in its place during a trace. `empty` makes the cache that `generate`
    starts with, or is given where `gives_cache`.
    """

    config: Any
    forward: Any
    cache: str
    takes_positions: bool
    empty: Callable[[], Any]
    gives_cache: bool = False

    @staticmethod
    def of(model: nn.Module) -> Decoder:
        """
        Raises:
            ImpossibleError: the model has no cache of its own.
        """
        config: Any = getattr(model, "config", None)
        generates = getattr(model, "can_generate", None)
        if config is None or generates is None:
            raise ImpossibleError(
                "--past needs a decoder of transformers: this module has no key/value cache", HINT
            )
        parameters = inspect.signature(type(model).forward).parameters
        name = next((each for each in ("cache", "past_key_values") if each in parameters), None)
        if name is None or not generates():
            raise ImpossibleError(
                f"--past needs a decoder that generates: {type(model).__name__} has no key/value cache", HINT
            )
        from transformers import GenerationMixin

        if not isinstance(model, GenerationMixin):
            raise ImpossibleError(
                f"--past needs a decoder that generates token by token: {type(model).__name__} does otherwise",
                HINT,
            )
        empty, gives = own_caches.maker(type(model), config.get_text_config(decoder=True))
        return Decoder(config, model.forward, name, "position_ids" in parameters, empty, gives)

    @property
    def text(self) -> Any:
        """The configuration of the decoder itself."""
        return self.config.get_text_config(decoder=True)

    def __call__(self, ids: Tensor, mask: Tensor, positions: Tensor | None, cache: Any) -> Any:
        """The model's output for ids `[batch, sequence]` and a mask `[batch, past + sequence]`; `cache` grows."""
        arguments = {"input_ids": ids, "attention_mask": mask, self.cache: cache, "use_cache": True}
        if self.takes_positions:
            arguments["position_ids"] = positions
        return self.forward(**arguments)

    @torch.no_grad()
    def layout(self) -> tuple[Slot, ...]:
        """The tensors of the cache, by running the model on three tokens.

        Raises:
            ImpossibleError: a layer keeps something else than keys, values and states, or the model looks ahead.
        """
        cache, ids = self.empty(), torch.tensor([[0, 1, 2]])
        output = self(
            ids, torch.ones_like(ids), torch.arange(3)[None] if self.takes_positions else None, cache
        )
        returned = getattr(output, self.cache, None)
        if id(returned) != id(cache):
            kind = type(returned).__name__
            raise ImpossibleError(f"the model keeps a cache of its own, {kind}", HINT)
        slots = tuple(slot for index, layer in enumerate(cache.layers) for slot in slots_of(index, layer))
        lengths = [slot for slot in slots if slot.kind == reference.KIND]
        slots = tuple(slot for slot in slots if slot not in lengths[1:])  # one for all layers
        if not any(slot.axis for slot in slots):
            raise ImpossibleError("the cache holds no keys and values, from which a past length shows", HINT)
        if self._looks_ahead():
            raise ImpossibleError(
                "the model's attention sees later tokens too, so that what its cache holds changes with each",
                HINT,
            )
        return slots

    def _looks_ahead(self) -> bool:
        """Whether the model says that its attention is not causal, and a token changes what it makes of those before:
        it may say so of images alone. Doge's router mixes all tokens, which is another thing."""
        causal = getattr(self.text, "is_causal", True) is not False
        if causal and not getattr(self.text, "use_bidirectional_attention", None):
            return False
        last = int(self.text.vocab_size) - 1
        ids = torch.tensor([[0, 1, 2, 3], [0, 1, 2, last]])
        positions = torch.arange(4).repeat(2, 1)
        first, second = self(ids, torch.ones_like(ids), positions, self.empty()).logits[:, :-1].float()
        return float((first - second).abs().max()) > _AHEAD * float(first.abs().max())

    @torch.no_grad()
    def continues(self, slots: Sequence[Slot]) -> bool:
        """Whether several tokens after a past see what came before them. Jamba of transformers 5.24 forgets its states
        where more than one token follows."""
        if not any(slot.fixed for slot in slots):
            return True
        ids = torch.arange(9)[None] % int(self.text.vocab_size)
        cache = self.empty()
        for piece in (slice(0, 5), slice(5, 9)):
            split = self(
                ids[:, piece], torch.ones_like(ids[:, : piece.stop]), torch.arange(9)[None, piece], cache
            )
        whole = self(ids, torch.ones_like(ids), torch.arange(9)[None], self.empty())
        expected, actual = (output.logits[:, -1].float() for output in (whole, split))
        return float((expected - actual).abs().max()) <= _FORGOTTEN * float(expected.abs().max())

    def thresholds(self) -> list[int]:
        """Lengths at which a model changes what it does: windows, chunks, blocks that are compressed, the reach of
        short rotary factors."""
        names = ("sliding_window", "compress_rate")
        found = {getattr(layer, name, None) for layer in self.empty().layers for name in names}
        rotary = getattr(self.text, "rope_parameters", None) or {}
        if rotary.get("rope_type") == "longrope":
            found.add(rotary.get("original_max_position_embeddings"))
        return sorted(length for length in found if length)

    def own(self, slots: Sequence[Slot], tensors: Mapping[str, Tensor]) -> Any:
        """A cache of transformers' own layers with this past: what they would hold after these tokens. None of
        the past means a fresh cache."""
        cache = self.empty()
        prompt = next((tensors[slot.past] for slot in slots if slot.kind == reference.KIND), None)
        for layer, named in _by_layer(cache, slots, tensors):
            if prompt is not None and reference.is_referencing(layer):
                reference.fill(layer, named[0][1], named[1][1], int(prompt[0]))
            elif _length(slots, tensors):
                fill(layer, named)
                narrow(layer, _length(slots, tensors))
            if compressed.is_compressing(layer):
                compressed.recording(layer)
            elif hasattr(layer, "record_past") and hasattr(layer, "sliding_window"):
                layer.record_past = True  # or the newest tokens of a long input would be cut, too
        return cache

    def full(self, slots: Sequence[Slot], tensors: Mapping[str, Tensor]) -> Any:
        """A cache whose layers keep every token, and which counts as begun even where the past is empty."""
        from transformers import cache_utils

        kept = {
            cache_utils.DynamicSlidingWindowLayer: cache_utils.DynamicLayer,
            cache_utils.LinearAttentionAndSlidingWindowAttentionLayer: (
                cache_utils.LinearAttentionAndFullAttentionLayer
            ),
        }
        cache = self.empty()
        for index, layer in enumerate(cache.layers):
            if type(layer) in kept:
                states = {"number_of_states": layer.number_of_states} if hasattr(layer, "conv_states") else {}
                cache.layers[index] = kept[type(layer)](**states)
            elif compressed.is_compressing(layer):
                cache.layers[index] = compressed.whole()
            elif reference.is_referencing(layer):
                cache.layers[index] = reference.whole()
        for layer, named in _by_layer(cache, slots, self._begun(slots, tensors)):
            fill(layer, named)
        return cache

    def _begun(self, slots: Sequence[Slot], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The past, in which all tokens before the first are its end, where a layer keeps the last ones (Qwen4): a
        state that is zeros at first would say something else."""
        found = dict(tensors)
        for slot in slots:
            if slot.kind == "conv_state" and not slot.dtype.is_floating_point:
                end = self.text.eos_token_id
                end = end[0] if isinstance(end, list) else end
                begun = torch.arange(1) + _length(slots, tensors) > 0
                found[slot.past] = torch.where(begun, found[slot.past], torch.full((1,), int(end)))
        return found


def presents(
    cache: Any, slots: Sequence[Slot], tensors: Mapping[str, Tensor], tokens: int | None = None
) -> list[Tensor]:
    """The cache's tensors after a forward, in the order of the slots.

    Args:
        cache: after the forward.
        slots: what it holds.
        tensors: the past that it began with.
        tokens: number of new ones, where the cache may have dropped old ones.
    """
    found = []
    for slot in slots:
        layer = cache.layers[slot.layer]
        value = slot.read(layer, tensors.get(slot.past))
        if slot.kind == "key" and hasattr(layer, "newest"):
            value = layer.newest
        if slot.axis is not None and tokens is not None:
            new = value.narrow(slot.axis, value.shape[slot.axis] - tokens, tokens)
            value = torch.cat([tensors[slot.past], new], dim=slot.axis)
        elif slot.kind == "conv_state" and tokens is not None:
            # A layer that records keeps all columns, and adds none where there are too few.
            missing = slot.shape[-1] - value.shape[-1]
            value = torch.nn.functional.pad(value, (missing, 0))
        found.append(value)
    return found


def _by_layer(
    cache: Any, slots: Sequence[Slot], tensors: Mapping[str, Tensor]
) -> Iterator[tuple[Any, list[tuple[Slot, Tensor]]]]:
    for index in dict.fromkeys(slot.layer for slot in slots):
        yield cache.layers[index], [(slot, tensors[slot.past]) for slot in slots if slot.layer == index]


def _length(slots: Sequence[Slot], tensors: Mapping[str, Tensor]) -> int:
    return next(tensors[slot.past].shape[slot.axis] for slot in slots if slot.axis is not None)
