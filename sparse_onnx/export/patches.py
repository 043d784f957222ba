"""Forwards of transformers that no trace can follow, in a form that holds for every size.

transformers' own exporter patches cover most models; here are those whose Python loops over a sequence `scans` cannot
read. Each computes what the original computes; the exported file is compared with the original in any case.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from sparse_onnx.export import compressors, overflow, recurrences, reference_window, rotary, sparse_attention


@contextlib.contextmanager
def replaced(model: nn.Module) -> Iterator[list[str]]:
    """Within the block, classes of the table run their other forward where it applies; gives their names."""
    with contextlib.ExitStack() as stack:
        kinds = {type(module) for module in model.modules()}
        taken = [kind for kind in kinds if kind.__name__ in FORWARDS and ".modeling_" in kind.__module__]
        stack.enter_context(_named_results())
        stack.enter_context(_scattered_rows())
        for kind in taken:
            stack.enter_context(_bound(kind, FORWARDS[kind.__name__]))
        dynamic = {type(module) for module in model.modules() if rotary.is_dynamic(module)}
        for kind in dynamic.difference(taken):
            stack.enter_context(_bound(kind, rotary.dynamic))
        yield sorted(kind.__name__ for kind in {*taken, *dynamic})


@contextlib.contextmanager
def own_windows() -> Iterator[None]:
    """Keeps cache layers with a window as they are: transformers traces them as if they had none, which is right where
    a mask applies the window again. DiffusionGemma's decoder has no such mask. Not for a model that takes a cache:
    the layer counts its tokens in Python."""
    with _own(lambda place, attribute: "DynamicSlidingWindowLayer" in place):
        yield


@contextlib.contextmanager
def own_attention() -> Iterator[None]:
    """Keeps the attention of encoders as it is. transformers traces it for images of one size by other code, which
    leaves dots3_note's normalization of queries and keys out; where the lengths are known its own can be followed."""
    with _own(lambda place, attribute: place.endswith("Attention") and attribute == "forward"):
        yield


@contextlib.contextmanager
def _own(chosen: Callable[[str, str], bool]) -> Iterator[None]:
    """Within the block these places of transformers' code are not traced otherwise."""
    importlib.import_module("transformers.exporters.exporter_dynamo")  # fills the table
    from transformers.exporters import utils

    kept = utils._PATCHES["dynamo"]
    utils._PATCHES["dynamo"] = [patch for patch in kept if not chosen(patch[0], patch[1])]
    try:
        yield
    finally:
        utils._PATCHES["dynamo"] = kept


@contextlib.contextmanager
def _named_results() -> Iterator[None]:
    """transformers' own patches of cummax and cummin give plain tuples, of which models take `.values`."""
    kept = {name: getattr(torch, name) for name in ("cummax", "cummin")}

    def named(name: str) -> Callable[..., Any]:
        kind = getattr(torch.return_types, name)
        return lambda *args, **kwargs: kind(tuple(kept[name](*args, **kwargs)))

    try:
        for name in kept:
            setattr(torch, name, named(name))
        yield
    finally:
        for name, function in kept.items():
            setattr(torch, name, function)


@contextlib.contextmanager
def _scattered_rows() -> Iterator[None]:
    """masked_scatter by rows where the mask is alike along the last axis. transformers' own patch of it gathers the
    source's elements one by one, and fails where there are none: a token without an image keeps its embedding."""
    kept = Tensor.masked_scatter

    def scattered(self: Tensor, mask: Tensor, source: Tensor) -> Tensor:
        alike = mask.dim() == self.dim() and (mask.shape[-1] == 1 or mask.stride(-1) == 0)
        flags = mask[..., :1] if alike else mask.expand_as(self)
        width = self.shape[-1] if alike else 1
        rows = source.reshape(-1, width)
        count = flags.reshape(-1).to(torch.int64).cumsum(0)
        padded = torch.cat([rows, rows.new_zeros(1, width)])  # so that there is one
        taken = padded[(count - 1).clamp(min=0, max=rows.shape[0])].reshape(self.shape)
        return torch.where(flags & (count <= rows.shape[0]).reshape(flags.shape), taken, self)

    Tensor.masked_scatter = scattered  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        Tensor.masked_scatter = kept  # type: ignore[method-assign]


@contextlib.contextmanager
def _bound(kind: type[nn.Module], forward: Callable[..., Any]) -> Iterator[None]:
    original = kind.forward

    def other(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return forward(self, original, *args, **kwargs)

    kind.forward = other  # type: ignore[method-assign]
    try:
        yield
    finally:
        kind.forward = original  # type: ignore[method-assign]


def _experts_by_modality(
    self: Any,
    original: Callable[..., Any],
    hidden_states: Tensor,
    moe_mm_token_type_ids: Tensor | None = None,
) -> Any:
    """Ernie 4.5 VL's experts for text and for images, each of which gets its own tokens only: here each gets all, with
    the others dropped."""
    if moe_mm_token_type_ids is None:
        return original(self, hidden_states)
    tokens = hidden_states.reshape(-1, hidden_states.shape[-1])
    seen = moe_mm_token_type_ids.reshape(-1, 1).bool()
    total, logits = torch.zeros_like(tokens), None
    for part, mine in ((self.text_moe, ~seen), (self.vision_moe, seen)):
        logits, weights, index = part.gate(tokens)
        total = total + part.experts(tokens, torch.where(mine, index, part.num_experts), weights)
    total = total.reshape(hidden_states.shape)
    return (total if self.shared_experts is None else total + self.shared_experts(hidden_states)), logits


#: Class -> what stands in for its forward; called with the original one.
FORWARDS: dict[str, Callable[..., Any]] = {
    "PhimoeRotaryEmbedding": rotary.longrope,
    "Ernie4_5_VLMoeMoeBlock": _experts_by_modality,
    "JambaMambaMixer": recurrences.selective_scan,
    "MiniMaxLightningAttention": recurrences.lightning_attention,
    "DeepseekV4HCACompressor": compressors.heavily_compressed,
    "DeepseekV4CSACompressor": compressors.sparsely_compressed,
    "DeepseekV4Indexer": compressors.indexed,
    "Glm5NextTextIndexer": sparse_attention.pooled_tokens,
    "NllbMoeEncoderLayer": overflow.clamped,
    "NllbMoeDecoderLayer": overflow.clamped,
    "UnlimitedOcrTextModel": reference_window.with_reference,
    "Qwen4ExpTextAttention": sparse_attention.with_new_positions,
    "Qwen4ExpTextQSAIndexer": sparse_attention.chosen_tokens,
}
