"""Where to cut a multimodal model, found by running it and proved by running the pieces."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sparse_onnx.core.errors import ImpossibleError, UsageError
from sparse_onnx.export.failure import first_line
from sparse_onnx.export.multimodal.media import Media, owner
from sparse_onnx.export.multimodal.prompts import Prompt, prompt
from sparse_onnx.export.multimodal.whole import _DEEP, _TYPES, Whole, called, emptied

_HINT = "leave out --multimodal: its text alone"
#: Largest difference of the pieces in torch from the whole, relative to the largest logit.
_ROUNDING = 1e-4


@torch.no_grad()
def cut(module: Any, media: Sequence[Media]) -> Whole:
    """
    Raises:
        UsageError: an encoder does not take the size that the user gave.
        ImpossibleError: the pieces do not give what the whole model gives, or the decoder takes what no piece gives.
    """
    try:
        return _cut(module, tuple(media))
    except (ImpossibleError, UsageError):
        raise
    except Exception as error:  # whatever the model raises on its own sample inputs
        kinds = " and ".join(each.kind for each in media)
        raise ImpossibleError(
            f"the model does not run on sample {kinds}: {first_line(error)}", _HINT
        ) from error


def _encoded(module: Any, media: Media) -> Any:
    method = getattr(owner(module, media.method), media.method)
    try:
        return method(**media.varying, **media.fixed, return_dict=True)
    except Exception as error:  # whatever the model raises
        reason = f"the model does not run on {media.described}: {first_line(error)}"
        if media.option:
            raise UsageError(reason, f"another {media.option}") from error
        raise ImpossibleError(reason, _HINT) from error


def _cut(module: Any, media: tuple[Media, ...]) -> Whole:
    outputs = {each.kind: _encoded(module, each) for each in media}
    failures = []
    for projects in (True, False) if hasattr(module, "multi_modal_projector") else (False,):
        whole = Whole(media, outputs, projects)
        try:
            return _completed(module, whole)
        except ImpossibleError as error:
            failures.append(error)
    raise failures[0]


def _completed(module: Any, whole: Whole) -> Whole:
    # Others than those whose outputs embed is made from.
    others = {m.kind: {name: value.flip(-1) for name, value in m.varying.items()} for m in whole.media}
    features: dict[str, Tensor] = {}
    for media in whole.media:
        features |= whole.encode(module, media.kind, **others[media.kind])
    lengths = {media.kind: len(features[f"{media.kind}_features"]) for media in whole.media}
    texts = [{media.kind: 1 for media in whole.media}]
    asked = prompt(module.config, whole.media, lengths, texts)
    token_types = types(module, whole.media, asked)
    varying = {name: [value] for named in others.values() for name, value in named.items()}
    seen, output = called(module, **arguments(whole, asked, varying), **token_types)
    if seen.get("inputs_embeds") is None:
        raise ImpossibleError("its decoder does not take embeddings, into which images could go", _HINT)
    whole = dataclasses.replace(whole, axes=_axes(module, seen), decoded=emptied(seen.pop("answer")))
    common = {"inputs_embeds": seen["inputs_embeds"], "attention_mask": asked.attention_mask}
    if whole.axes is not None:
        common["position_ids"] = seen["position_ids"] if whole.axes else asked.positions
    again, _ = called(module, **common, **token_types)
    extras, deep = _extras(seen, again)
    needed = tuple(
        name
        for name in token_types
        if _differs(called(module, **common, **_without(token_types, name))[0], again)
    )
    whole = dataclasses.replace(whole, types=needed, extras=extras, deep=deep)
    _prove(
        module, whole, asked, features, common | {name: token_types[name] for name in needed}, output.logits
    )
    return whole


def types(module: nn.Module, media: Sequence[Media], asked: Prompt) -> dict[str, Tensor]:
    """The kinds of tokens, by each name by which the model's forward takes them."""
    takes = inspect.signature(type(module).forward).parameters
    kinds = asked.types({each.kind: each.token for each in media})
    return {name: kinds for name in _TYPES if name in takes}


def arguments(
    whole: Whole, asked: Prompt, varying: Mapping[str, Sequence[Tensor]] | None = None
) -> dict[str, Any]:
    """What the whole model's forward is called with; `varying` has other media than the samples, by input name."""
    found: dict[str, Any] = {"input_ids": asked.input_ids, "attention_mask": asked.attention_mask}
    for media in whole.media:
        pieces = asked.pieces[media.kind]
        if pieces:
            for name, value in media.varying.items():
                found[name] = torch.cat(list(varying[name]) if varying else [value] * pieces)
            found |= media.repeated(pieces)
    return found


def _axes(module: Any, seen: Mapping[str, Any]) -> int | None:
    takes = inspect.signature(type(module).forward).parameters
    if (
        "position_ids" not in takes
        or "position_ids" not in inspect.signature(module.get_decoder().forward).parameters
    ):
        return None
    positions = seen.get("position_ids")
    return positions.shape[0] if positions is not None and positions.dim() == 3 else 0


def _extras(seen: Mapping[str, Any], again: Mapping[str, Any]) -> tuple[dict[str, Tensor], int]:
    """What the whole model hands its decoder that a forward from embeddings does not, and the number of layers that
    take image features."""
    extras, deep = {}, 0
    batch = seen["inputs_embeds"].shape[:2]
    for name, value in seen.items():
        if name in _DEEP:
            deep = len(value) if name == "deepstack_visual_embeds" and value else deep
        elif name not in ("inputs_embeds", "position_ids", "cache") and not _same(value, again.get(name)):
            if not isinstance(value, Tensor) or value.shape[:2] != batch:
                raise ImpossibleError(
                    f"its decoder takes '{name}' besides embeddings, which belongs to no token", _HINT
                )
            extras[name] = value
    return extras, deep


def _differs(seen: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    names = (seen.keys() | other.keys()) - {"cache", "answer"}
    return any(not _same(seen.get(name), other.get(name)) for name in names)


def _same(left: Any, right: Any) -> bool:
    if isinstance(left, Tensor) or isinstance(right, Tensor):
        return (
            isinstance(left, Tensor)
            and isinstance(right, Tensor)
            and left.shape == right.shape
            and bool(torch.equal(left, right))
        )
    if isinstance(left, dict) and isinstance(right, dict):
        return left.keys() == right.keys() and all(_same(left[key], right[key]) for key in left)
    if isinstance(left, (list, tuple)) and isinstance(right, (list, tuple)):
        return len(left) == len(right) and all(map(_same, left, right))
    return type(left) is type(right) or left is None or right is None


def _without(values: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    return {key: value for key, value in values.items() if key != name}


def _prove(
    module: nn.Module,
    whole: Whole,
    asked: Prompt,
    features: Mapping[str, Tensor],
    common: Mapping[str, Tensor],
    logits: Tensor,
) -> None:
    embedded = whole.embed(module, asked.input_ids, **features)
    answer = whole.decode(module, **{**common, **embedded}).logits
    if answer.shape != logits.shape or float((answer - logits).abs().max()) > _ROUNDING * float(
        logits.abs().max()
    ):
        raise ImpossibleError(
            "its encoder, embeddings and decoder one after the other do not give its answer", _HINT
        )
