"""A decoder's trace with the cache as flat tensors."""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from collections.abc import Iterator
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor, nn

from sparse_onnx.export import experts, trace
from sparse_onnx.export.past.cache import presents
from sparse_onnx.export.past.source import PastSource, python_name
from sparse_onnx.export.sources import Source


def trace_with_past(source: PastSource, found: list[experts.Experts], opset: int) -> trace.Traced:
    """`trace.trace` of the model as a function of flat tensors; inputs, outputs and their axes get their ONNX names.

    Raises:
        ImpossibleError: as `trace.trace`.
    """
    flat = Source(source.name, source.module, source.interface.renamed(), is_transformers=True)
    with _flat_forward(source), _copied_mask(source):
        traced = trace.trace(flat, found, opset)
    _name(traced.model.graph, source)
    return dataclasses.replace(traced, program=_ByOnnxNames(traced.program))


class _ByOnnxNames(nn.Module):
    """The traced program with inputs by the names of the graph."""

    def __init__(self, program: Any) -> None:
        super().__init__()
        self.program = program

    def forward(self, **inputs: Tensor) -> Any:
        return self.program(**{python_name(name): value for name, value in inputs.items()})


@contextlib.contextmanager
def _flat_forward(source: PastSource) -> Iterator[None]:
    """Within the block the module takes and gives the cache as tensors by name."""
    module, decoder, slots = source.module, source.decoder, source.slots
    own = vars(module).get("forward")

    def forward(**inputs: Tensor) -> dict[str, Tensor]:
        named = {name: inputs[python_name(name)] for name in source.interface.inputs}
        cache = decoder.full(slots, named)
        output = source.answer(decoder, named, cache)
        now = presents(cache, slots, named)
        return {"logits": output.logits} | {
            slot.present: value for slot, value in zip(slots, now, strict=True)
        }

    module.forward = forward
    try:
        yield
    finally:
        # transformers' own patches leave the attribute behind.
        vars(module).pop("forward", None)
        if own is not None:
            module.forward = own


@contextlib.contextmanager
def _copied_mask(source: PastSource) -> Iterator[None]:
    """Has transformers take the new tokens' part of the mask by index. Its slice is contiguous only where there is no
    past, and the trace would assert that there is one."""
    name = "create_recurrent_attention_mask"

    def masked(inputs_embeds: Tensor, attention_mask: Tensor, **others: Any) -> Tensor:
        new, total = inputs_embeds.shape[1], attention_mask.shape[1]
        return attention_mask.index_select(1, torch.arange(new) + (total - new))

    places = {each.__module__ for each in map(type, source.module.modules())} | {"transformers.masking_utils"}
    patched = [module for place in places if hasattr(module := sys.modules.get(place), name)]
    before = [getattr(module, name) for module in patched]
    for module in patched:
        setattr(module, name, masked)
    try:
        yield
    finally:
        for module, function in zip(patched, before, strict=True):
            setattr(module, name, function)


def _name(graph: ir.Graph, source: PastSource) -> None:
    for value, (name, spec) in zip(graph.inputs, source.interface.inputs.items(), strict=True):
        value.name = name
        value.shape = _shape(value.shape, spec.axes)
    axes = [{0: "batch", 1: "sequence"}]
    for slot in source.slots:
        axes.append({0: "batch"} | ({slot.axis: "total_sequence"} if slot.axis is not None else {}))
    names = ["logits", *(slot.present for slot in source.slots)]
    for value, name, named in zip(graph.outputs, names, axes, strict=True):
        value.name = name
        value.shape = _shape(value.shape, named)


def _shape(shape: ir.Shape | None, axes: dict[int, str] | Any) -> ir.Shape | None:
    """Dynamic axes by name. One that the trace fixed keeps its size, and so fails where it is compared."""
    if shape is None:
        return None
    return ir.Shape(
        [axes[at] if at in axes and not isinstance(dim, int) else dim for at, dim in enumerate(shape)]
    )
