"""The three parts of a cut model as sources: what each takes, and inputs drawn for it."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from sparse_onnx.export.multimodal.prompts import plain_ids, prompt
from sparse_onnx.export.multimodal.whole import DEEPSTACK, SPREAD, Whole
from sparse_onnx.export.samples import Interface, Kind, Spec
from sparse_onnx.export.sources import Source

#: Batch, sequence, and tokens of each kind of media in them.
_RUNS: tuple[tuple[int, int, int, Kind], ...] = (
    (3, 11, 6, "random"),
    (1, 1, 0, "random"),
    (1, 5, 3, "random"),
    (4, 1, 0, "random"),
    (4, 3, 2, "random"),
    (2, 9, 7, "one"),
    (1, 40, 20, "random"),
    (5, 3, 0, "random"),
)
#: Pieces of sound at once: others than are traced.
_PIECES = (3, 1, 5, 4, 7, 6)
#: How far the axes of a position drift apart.
_APART = 5


@dataclasses.dataclass(frozen=True)
class EmbeddingInterface(Interface):
    """Ids with as many places for media as there are features."""

    tokens: Mapping[str, int] = dataclasses.field(default_factory=dict)
    ordinary: tuple[int, ...] = ()

    def draw(self, sizes: Mapping[str, int], kind: Kind = "random", seed: int = 0) -> dict[str, Tensor]:
        drawn, generator = super().draw(sizes, kind, seed), torch.Generator().manual_seed(seed)
        text = torch.tensor(self.ordinary)[
            torch.randint(len(self.ordinary), drawn["input_ids"].shape, generator=generator)
        ]
        ids = text.flatten() if kind != "one" else torch.full_like(text, self.ordinary[0]).flatten()
        places = torch.randperm(len(ids), generator=generator)
        if sum(sizes[f"{name}_tokens"] for name in self.tokens) > len(ids):
            raise ValueError("more features than tokens")
        for name, token in self.tokens.items():
            count = sizes[f"{name}_tokens"]
            ids[places[:count]], places = token, places[count:]
        return {**drawn, "input_ids": ids.reshape(text.shape)}

    def planned(self) -> list[tuple[dict[str, int], Kind]]:
        plan: list[tuple[dict[str, int], Kind]] = []
        for batch, sequence, tokens, kind in _RUNS:
            sizes = {"batch": batch, "sequence": sequence}
            for number, name in enumerate(self.tokens):
                sizes[f"{name}_tokens"] = (tokens + number) // len(self.tokens)
            plan.append((sizes, kind))
        return plan

    def traced_sizes(self) -> dict[str, int]:
        sizes = iter((5, 3, 4))
        return {"batch": 2, "sequence": 7} | {f"{name}_tokens": next(sizes) for name in self.tokens}


class SoundInterface(Interface):
    """Random sound only: an encoder that centres each bin over time leaves nothing but rounding of sound that hardly
    varies. A piece is long, so that there are few at once."""

    def planned(self) -> list[tuple[dict[str, int], Kind]]:
        if len(self.symbols) == 1:
            return [({self.symbols[0]: pieces}, "random") for pieces in _PIECES]
        return [(sizes, "random") for sizes, _ in super().planned()]


@dataclasses.dataclass(frozen=True)
class TextInterface(Interface):
    """Positions follow from the mask; those of images and text apart where each has several axes."""

    def draw(self, sizes: Mapping[str, int], kind: Kind = "random", seed: int = 0) -> dict[str, Tensor]:
        drawn = super().draw(sizes, kind, seed)
        if "position_ids" in drawn:
            drawn["position_ids"] = positions(drawn["attention_mask"], drawn["position_ids"].shape, seed)
        return drawn


def positions(mask: Tensor, shape: torch.Size, seed: int = 0) -> Tensor:
    """`[batch, sequence]`, or `[axes, batch, sequence]`, for the last tokens of a mask `[batch, all]`."""
    base = (mask.cumsum(1) - 1).clamp(min=0)[:, -shape[-1] :]
    if len(shape) == 2:
        return base.contiguous()
    generator = torch.Generator().manual_seed(seed)
    return base + torch.randint(_APART, shape, generator=generator)


def encoder(source: Source, whole: Whole, kind: str, *, several: bool) -> Source:
    """Encodes one image or piece of sound, or where there is nothing fixed `several` at once, along axis 0."""
    media = next(each for each in whole.media if each.kind == kind)
    axes = {0: f"{kind}s", **media.open_axes} if several and not media.fixed else {}
    inputs = {
        name: Spec(torch.cat([value, value.flip(-1)]) if axes else value, axes)
        for name, value in media.varying.items()
    }
    return _part(source, SoundInterface(inputs) if kind == "audio" else Interface(inputs))


def embedding(source: Source, whole: Whole) -> Source:
    module: Any = source.module
    with torch.no_grad():
        features: dict[str, Tensor] = {}
        for media in whole.media:
            features |= whole.encode(module, media.kind, **media.varying)
    ordinary = tuple(plain_ids(module.config))
    example = torch.tensor([[ordinary[0], ordinary[-1]], [ordinary[-1], ordinary[0]]])
    inputs = {"input_ids": Spec(example, {0: "batch", 1: "sequence"})}
    for media in whole.media:
        name = f"{media.kind}_features"
        inputs[name] = Spec(features[name], {0: f"{media.kind}_tokens"})
    if DEEPSTACK in features:
        inputs[DEEPSTACK] = Spec(features[DEEPSTACK], {1: "image_tokens"})
    tokens = {media.kind: media.token for media in whole.media}
    asked = prompt(
        module.config,
        whole.media,
        {k: len(features[f"{k}_features"]) for k in tokens},
        [dict.fromkeys(tokens, 1)],
    )
    inputs["input_ids"] = dataclasses.replace(inputs["input_ids"], example=asked.input_ids)
    return _part(source, EmbeddingInterface(inputs, tokens, ordinary))


def text(source: Source, whole: Whole, embedded: Mapping[str, Tensor], types: Mapping[str, Tensor]) -> Source:
    """`embedded` is what embed gives for a sample, `types` the token types of it."""
    return _part(source, TextInterface(text_inputs(whole, embedded, types)))


def text_inputs(whole: Whole, embedded: Mapping[str, Tensor], types: Mapping[str, Tensor]) -> dict[str, Spec]:
    embeds = embedded["inputs_embeds"]
    mask = torch.ones(embeds.shape[:2], dtype=torch.int64)
    tokens = {0: "batch", 1: "sequence"}
    inputs = {"inputs_embeds": Spec(embeds, tokens), "attention_mask": Spec(mask, tokens, True)}
    if whole.axes is not None:
        shape = (whole.axes, *mask.shape) if whole.axes else mask.shape
        inputs["position_ids"] = Spec(
            positions(mask, torch.Size(shape)), {1: "batch", 2: "sequence"} if whole.axes else tokens
        )
    for name in whole.types:
        inputs[name] = Spec(types[name], tokens)
    for name in whole.extras:
        inputs[name] = Spec(embedded[name], tokens)
    if whole.deep:
        inputs[SPREAD] = Spec(embedded[SPREAD], {1: "batch", 2: "sequence"})
    return inputs


def _part(source: Source, interface: Interface) -> Source:
    return dataclasses.replace(source, interface=interface, notes=())


@contextlib.contextmanager
def as_part(source: Source, function: Any) -> Iterator[None]:
    """Within the block the module of the source runs `function(module, **inputs)` for its forward, with the arguments
    that the source's interface names. A deep copy of the module runs it on itself."""
    module: Any = source.module
    bound = functools.partial(function, module)
    names = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY) for name in source.interface.inputs]
    bound.__signature__ = inspect.Signature(names)  # type: ignore[attr-defined]
    module.forward = bound
    try:
        yield
    finally:
        vars(module).pop("forward", None)
