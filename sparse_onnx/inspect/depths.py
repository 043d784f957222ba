"""Mixture-of-depths: the k best tokens of a sequence go through a block, the others around it.

chosen = TopK(router(x), over the sequence)          one score a token
y      = x, at the chosen tokens plus (or replaced by) block(x[chosen]), often times the score
"""

from __future__ import annotations

import dataclasses
from collections import deque

import onnx_ir as ir

from sparse_onnx.inspect.router_scores import behind
from sparse_onnx.matching.layout import rows_of
from sparse_onnx.matching.linear import Linear, linear
from sparse_onnx.matching.values import attribute, producer, scalar, size, tensor

#: What an index may pass through on its way: reshapes, sorting, coordinates of other axes put beside or added to it.
_RESHAPES = ("Cast", "Expand", "Flatten", "Identity", "Reshape", "Squeeze", "Tile", "Unsqueeze")
_INDEX = ("Add", "Concat", "TopK", *_RESHAPES)
_GATHERS = ("Gather", "GatherElements", "GatherND")
_SCATTERS = ("ScatterElements", "ScatterND")
#: What one score may pass through.
_SCORES = ("Sigmoid", "Softmax", "Tanh", "Softplus", "Relu")
#: Nodes that are followed from an index, and nodes of a block.
_NEAR, _FAR = 64, 5_000


@dataclasses.dataclass(frozen=True)
class Depths:
    """The block: nodes between gather and scatter, tokens of a sequence that take it (None: computed), its numbers."""

    inside: list[ir.Node]
    scatter: ir.Node
    top_k: int | None
    hidden: int | None
    parameters: int


def depths(choice: ir.Node) -> Depths | None:
    """The block whose tokens this TopK chooses; None for any other TopK."""
    if len(choice.outputs) < 2 or not attribute(choice, "largest", 1):
        return None
    router = _router(choice.inputs[0])
    if router is None or _along(choice) == 1:
        return None
    gathers, scatters = _readers(choice.outputs[1])
    rows = [
        node
        for node in gathers
        if node.inputs[0] is not None and rows_of(node.inputs[0]) is rows_of(router.x)
    ]
    for scatter in scatters:
        for gather in rows:
            inside = _between(gather, scatter, (choice, router.node))
            if inside is not None:
                k = scalar(choice.inputs[1])
                return Depths(
                    inside,
                    scatter,
                    None if k is None else int(k),
                    size(router.x, -1),
                    _stored(inside),
                )
    return None


def _router(scores: ir.Value | None) -> Linear | None:
    """The layer of one output a token that the scores come from."""
    value = behind(scores)
    while (node := producer(value, *_SCORES)) is not None:
        value = behind(node.inputs[0])
    found = linear(value)
    if found is None or found.activation is not None:
        return None
    outputs = size(found.weight.source, -2 if found.out_in else -1)
    return found if outputs == 1 else None


def _along(choice: ir.Node) -> int | None:
    return size(choice.inputs[0], attribute(choice, "axis", -1))


def _readers(index: ir.Value) -> tuple[list[ir.Node], list[ir.Node]]:
    """Gathers and scatters that take the index, or one made of it, as theirs."""
    gathers, scatters = [], []
    waiting, seen = deque([index]), {index}
    while waiting and len(seen) < _NEAR:
        value = waiting.popleft()
        for use in value.uses():
            node = use.node
            if node.domain:
                continue
            if node.op_type in _GATHERS and use.idx == 1:
                gathers.append(node)
            elif node.op_type in _SCATTERS and use.idx == 1:
                scatters.append(node)
            elif node.op_type in _INDEX:
                fresh = [item for item in node.outputs if item not in seen]
                seen.update(fresh)
                waiting.extend(fresh)
    return gathers, scatters


def _between(gather: ir.Node, scatter: ir.Node, routing: tuple[ir.Node, ...]) -> list[ir.Node] | None:
    """Nodes from the gathered rows to what is scattered, the routing left out; None where that is no block."""
    inside: dict[ir.Node, None] = {}
    reached = False
    waiting = deque([scatter.inputs[2]])
    while waiting:
        value = waiting.popleft()
        node = None if value is None else value.producer()
        if node is None or node in inside or node in routing:
            continue
        if node is gather:
            reached = True
            continue
        inside[node] = None
        if len(inside) > _FAR:
            return None
        waiting.extend(node.inputs)
    learned = any(_is_weight(item) for node in inside for item in node.inputs)
    return list(reversed(inside)) if reached and learned else None


def _stored(nodes: list[ir.Node]) -> int:
    """Numbers that the nodes store, each once."""
    values = {item for node in nodes for item in node.inputs if item is not None and _is_weight(item)}
    return sum(found.size for found in map(tensor, values) if found is not None)


def _is_weight(value: ir.Value | None) -> bool:
    found = tensor(value)
    return found is not None and found.dtype.is_floating_point() and found.size > 1
