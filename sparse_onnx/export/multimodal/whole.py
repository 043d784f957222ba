"""A multimodal model as three functions that follow each other: encode, embed, decode.

All three run the model's own code. `encode` is its `get_image_features`; `embed` its forward up to the call of the
decoder, with features in the place of what the encoder gives; `decode` its forward from embeddings on, with what the
forward hands the decoder besides. What that is, one run of the whole model shows.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import inspect
import sys
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from sparse_onnx.export.multimodal import known
from sparse_onnx.export.multimodal.media import Media, owner

#: Arguments of a forward that say of each token whether it is text, and which a user makes from the ids.
_TYPES = ("mm_token_type_ids", "moe_mm_token_type_ids", "token_type_ids")
#: What the decoder adds to the states of its first layers where there are images.
_DEEP = ("visual_pos_masks", "deepstack_visual_embeds")
#: Features of images for them `[layers, tokens, hidden]`, and the same over all tokens `[layers, batch, sequence,
#: hidden]`.
DEEPSTACK, SPREAD = "deepstack_features", "deepstack_embeds"


@dataclasses.dataclass(frozen=True)
class Whole:
    """How a model is cut.

    `axes` is the number of axes of a multimodal rotary embedding's positions, 0 for one position a token, and None for
    a decoder without positions; `types` are arguments of its forward that decode needs, `extras` what embed gives it
    besides embeddings, with examples, and `deep` the number of layers that image features are added to. `outputs` has
    an encoder's output for each kind of media, and `decoded` the decoder's, after which embed forms its own.
    """

    media: tuple[Media, ...]
    outputs: Mapping[str, Any]
    projects: bool
    decoded: Any = None
    axes: int | None = None
    types: tuple[str, ...] = ()
    extras: Mapping[str, Tensor] = dataclasses.field(default_factory=dict)
    deep: int = 0

    def widened(self) -> Whole:
        """The same for the model in float32."""
        media = [
            dataclasses.replace(each, varying={name: _wide(value) for name, value in each.varying.items()})
            for each in self.media
        ]
        return dataclasses.replace(self, media=tuple(media))

    def encode(self, module: nn.Module, kind: str, **varying: Tensor) -> dict[str, Tensor]:
        """`{kind}_features [tokens, hidden]`, and of images maybe `deepstack_features [layers, tokens, hidden]`."""
        media = next(each for each in self.media if each.kind == kind)
        fixed = {name: known.known(value) for name, value in media.fixed.items()}
        with known.factories():
            output = getattr(owner(module, media.method), media.method)(**varying, **fixed, return_dict=True)
            return self._features(module, kind, output)

    def _features(self, module: Any, kind: str, output: Any) -> dict[str, Tensor]:
        if kind == "image" and self.projects:
            last = output.last_hidden_state
            features = module.multi_modal_projector(last.reshape(-1, last.shape[-1]))
        else:
            features = _joined(_of(output))
        named = {f"{kind}_features": known.unknown(features)}
        deep = getattr(output, DEEPSTACK, None)
        if deep:
            named[DEEPSTACK] = known.unknown(torch.stack([_joined(layer) for layer in deep]))
        return named

    def embed(self, module: nn.Module, input_ids: Tensor, **features: Tensor) -> dict[str, Tensor]:
        """`inputs_embeds [batch, sequence, hidden]`, and the extras by name."""
        arguments: dict[str, Any] = {"input_ids": input_ids}
        if self.axes is not None:
            positions = torch.zeros_like(input_ids)
            arguments["position_ids"] = (
                positions.expand(self.axes, *positions.shape) if self.axes else positions
            )
        with contextlib.ExitStack() as stack:
            for media in self.media:
                given = self._like(media.kind, features)
                place = owner(module, media.method)
                stack.enter_context(_instead(place, media.method, lambda *_, given=given, **__: given))
                stack.enter_context(_unchecked(place))
                arguments |= {name: value.new_zeros(1) for name, value in media.varying.items()} | dict(
                    media.fixed
                )
            if self.projects:
                stack.enter_context(_instead(module.multi_modal_projector, "forward", lambda states: states))
            called = stack.enter_context(_watched(module, instead=self.decoded))
            type(module).forward(module, **arguments)
        named = {"inputs_embeds": called["inputs_embeds"], **{name: called[name] for name in self.extras}}
        if self.deep:
            mask = called["visual_pos_masks"][..., None].expand_as(called["inputs_embeds"])
            empty = torch.zeros_like(called["inputs_embeds"])
            layers = called["deepstack_visual_embeds"]
            named[SPREAD] = torch.stack([empty.masked_scatter(mask, layer) for layer in layers])
        return named

    def _like(self, kind: str, features: Mapping[str, Tensor]) -> Any:
        """An encoder's output with these features."""
        output, value = emptied(self.outputs[kind]), features[f"{kind}_features"]
        if kind == "image" and self.projects:
            output["last_hidden_state"] = value[None]
            return output
        before = _of(self.outputs[kind])
        shaped: Any = (
            (value,) if isinstance(before, (list, tuple)) else value if before.dim() == 2 else value[None]
        )
        first = self.outputs[kind]
        pooled = getattr(first, "pooler_output", None) is not None
        output["pooler_output" if pooled else "last_hidden_state"] = shaped
        if pooled and _is(before, first.last_hidden_state):  # a forward may take either
            output["last_hidden_state"] = shaped
        if getattr(first, "attention_mask", None) is not None:
            output["attention_mask"] = _Everything()
        if self.deep:
            output[DEEPSTACK] = [(layer,) for layer in features[DEEPSTACK].unbind()]
        return output

    def decode(self, module: nn.Module, inputs_embeds: Tensor, attention_mask: Tensor, **others: Any) -> Any:
        """The model's output for embeddings; `others` are positions, token types, extras, and a cache."""
        extras = {name: others.pop(name) for name in self.extras}
        decoder: Any = module.get_decoder()  # type: ignore[operator]
        takes = inspect.signature(type(module).forward).parameters
        with contextlib.ExitStack() as stack:
            if self.deep:
                # Zero where there is text: added to every token instead of to those that a mask picks.
                extras["visual_pos_masks"], extras["deepstack_visual_embeds"] = (
                    None,
                    others.pop(SPREAD).unbind(),
                )
                stack.enter_context(
                    _instead(decoder, "_deepstack_process", lambda states, _, layer: states + layer)
                )
            others |= {name: extras.pop(name) for name in list(extras) if name in takes}
            stack.enter_context(_added(decoder, extras))
            stack.enter_context(_without_ids(module, {"inputs_embeds": inputs_embeds}))
            return type(module).forward(
                module, inputs_embeds=inputs_embeds, attention_mask=attention_mask, **others
            )


class _Everything:
    """A mask of features that all count: what a real one picks has a length that no trace knows."""

    def to(self, *_: Any) -> slice:
        return slice(None)


def _wide(value: Tensor) -> Tensor:
    return value.float() if value.is_floating_point() else value


def emptied(output: Any) -> Any:
    """The same kind of output without its tensors."""
    empty = copy.copy(output)
    for name in list(empty.keys()):
        empty[name] = None
    return empty


def _of(output: Any) -> Any:
    pooled = getattr(output, "pooler_output", None)
    return output.last_hidden_state if pooled is None else pooled


def _is(left: Any, right: Any) -> bool:
    return isinstance(left, Tensor) and isinstance(right, Tensor) and torch.equal(left, right)


def _joined(features: Any) -> Tensor:
    parts = [features] if isinstance(features, Tensor) else list(features)
    parts = [part.reshape(-1, part.shape[-1]) for part in parts]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def called(module: nn.Module, **arguments: Any) -> tuple[dict[str, Any], Any]:
    """What the decoder is called with, by name, with its own answer as ``answer``; and the model's output."""
    with _watched(module) as seen, _without_ids(module, arguments):
        output = type(module).forward(module, **arguments)
    return seen, output


@contextlib.contextmanager
def _watched(module: Any, instead: Any = None) -> Iterator[dict[str, Any]]:
    """What the decoder is called with; it does not run where an answer is given, which gets the embeddings for
    states."""
    decoder, seen = module.get_decoder(), dict[str, Any]()
    own = decoder.forward
    names = inspect.signature(own)

    def forward(*args: Any, **kwargs: Any) -> Any:
        bound = names.bind_partial(*args, **kwargs).arguments
        seen.update(
            {name: value for name, value in bound.items() if name != "kwargs"}, **bound.get("kwargs", {})
        )
        if instead is not None:
            answer = copy.copy(instead)
            answer["last_hidden_state"] = seen["inputs_embeds"]
        else:
            answer = seen["answer"] = own(*args, **kwargs)
        return answer

    with _instead(decoder, "forward", forward):
        yield seen


@contextlib.contextmanager
def _unchecked(part: Any) -> Iterator[None]:
    """Without the check that features and their places are equally many, which no ONNX graph can hold and not every
    trace can follow."""
    code = sys.modules[type(part).__module__]
    with contextlib.ExitStack() as stack:
        if hasattr(code, "torch_compilable_check"):
            stack.enter_context(_instead(code, "torch_compilable_check", lambda *_: None))
        stack.enter_context(_Uncounted())
        yield


class _Uncounted(TorchFunctionMode):
    """Gives all elements for those that a mask picks: transformers' forwards count them in that check, and nothing else
    there picks elements."""

    def __torch_function__(
        self, func: Any, kinds: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if (
            func is Tensor.__getitem__
            and isinstance(args[1], Tensor)
            and args[1].dtype == torch.bool
            and args[1].dim() == 3
        ):
            return args[0].flatten()
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def _without_ids(module: Any, arguments: Mapping[str, Any]) -> Iterator[None]:
    """Has a decoder that looks embeddings up in its table, to find ids that it was not given, take the first id for
    all: what it makes of ids is given to it."""
    decoder = module.get_decoder()
    with contextlib.ExitStack() as stack:
        if arguments.get("input_ids") is None:
            ids = torch.zeros_like(arguments["inputs_embeds"][..., 0], dtype=torch.int64)
            if hasattr(decoder, "reverse_embedding"):
                stack.enter_context(_instead(decoder, "reverse_embedding", lambda embeddings: ids))
            if hasattr(decoder, "get_per_layer_inputs"):
                own = decoder.get_per_layer_inputs
                stack.enter_context(
                    _instead(decoder, "get_per_layer_inputs", lambda _, embeddings: own(ids, embeddings))
                )
        yield


@contextlib.contextmanager
def _added(decoder: Any, extras: Mapping[str, Any]) -> Iterator[None]:
    own = decoder.forward
    with _instead(decoder, "forward", lambda *args, **kwargs: own(*args, **{**kwargs, **extras})):
        yield


@contextlib.contextmanager
def _instead(place: Any, name: str, function: Any) -> Iterator[None]:
    """Within the block the object has this function for a method."""
    before = vars(place).get(name)
    setattr(place, name, function)
    try:
        yield
    finally:
        delattr(place, name)
        if before is not None:
            setattr(place, name, before)
