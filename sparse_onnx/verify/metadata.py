"""Lowered blocks of a model as far as its metadata can be believed: other tools rename values and leave it stale."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping

import onnx_ir as ir

from sparse_onnx.blocks.lowered import BLOCKS_KEY, LoweredBlock, lowered_blocks

_NAMES = ("tokens", "expert_index", "expert_weight", "output")


def named_values(model: ir.Model) -> dict[str, ir.Value]:
    """Values of the main graph and its subgraphs whose name no other value has."""
    values: dict[str, ir.Value] = {}
    count: Counter[str] = Counter()
    for graph in model.graphs():
        for value in _values(graph):
            if value.name and values.get(value.name) is not value:
                values[value.name] = value
                count[value.name] += 1
    return {name: value for name, value in values.items() if count[name] == 1}


def _values(graph: ir.Graph) -> Iterator[ir.Value]:
    seen = set(graph.inputs)
    yield from graph.inputs
    yield from (value for value in graph.initializers.values() if value not in seen)
    for node in graph:
        yield from node.outputs


def sound_blocks(model: ir.Model, values: Mapping[str, ir.Value] | None = None) -> list[LoweredBlock]:
    """The lowered blocks whose entries name values that exist."""
    found = lowered_blocks(model)
    if not found:
        return []
    values = named_values(model) if values is None else values
    return [block for block in found if all(getattr(block, name) in values for name in _NAMES)]


def discard_unsound(model: ir.Model) -> None:
    """Takes what is stale out of the metadata of a loaded model."""
    if BLOCKS_KEY in model.metadata_props:
        kept = [vars(block) for block in sound_blocks(model)]
        model.metadata_props[BLOCKS_KEY] = json.dumps(kept)
