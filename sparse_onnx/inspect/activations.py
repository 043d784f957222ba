"""Sparsity that is no mixture of experts, named for reports: nothing of it is rewritten.

| kind | what the graph computes |
| --- | --- |
| `topk-activation` | ``W2 scatter(topk(W1 x))``: the k largest inner values are kept, the others are 0 |
| `relu-ffn` | ``W2 f(W1 x)`` or ``W2 (f(Wg x) * W1 x)``; f gives exact zeros: relu, relu2, relu with a threshold |
| `mixture-of-depths` | one score a token; the k best of a sequence go through a block, the others around it |

Only where the graph plainly shows it: constant matrices, the same rows in front of gate and up, zeros that are stored
zeros. What one token uses of a block depends on the token, so its active parameters are not told.
"""

from __future__ import annotations

import dataclasses
import math

import onnx_ir as ir

from sparse_onnx.blocks.lowered import FORM_KEY
from sparse_onnx.core.report import BlockRecord
from sparse_onnx.inspect.depths import Depths, depths
from sparse_onnx.inspect.router_scores import computed, fill, same
from sparse_onnx.matching.halves import half_of
from sparse_onnx.matching.layout import rows_of
from sparse_onnx.matching.linear import Linear, linear
from sparse_onnx.matching.naming import block_name
from sparse_onnx.matching.values import attribute, is_last, pairs, producer, scalar, size, sole_use, tensor

_PRODUCTS = ("MatMul", "Gemm", "FusedMatMul", "FusedGemm", "Einsum")


@dataclasses.dataclass(frozen=True)
class Sparse:
    """A feed-forward block whose inner values are mostly zero.

    Attributes:
        first: its first layers: one, or gate and up.
        last: its last layer.
        activation: `relu`, `relu2`, `thresholded_relu`; None where only a TopK makes the zeros.
        gated: whether the activation is multiplied by another projection.
        top_k: values that are kept; None where their number depends on the token.
    """

    first: tuple[Linear, ...]
    last: Linear
    activation: str | None
    gated: bool = False
    top_k: int | None = None
    kind: str = "relu-ffn"


def activation_records(model: ir.Model) -> list[BlockRecord]:
    """One record a block, in graph order. Nodes of blocks that are lowered already are passed over."""
    found = []
    for graph in model.graphs():
        for node in graph:
            if FORM_KEY in node.metadata_props:
                continue
            if node.op_type in _PRODUCTS:
                block = _read(node)
                if block is not None:
                    found.append(_record(block))
            elif node.op_type == "TopK":
                skipping = depths(node)
                if skipping is not None:
                    found.append(_depths_record(skipping))
    return found


def _read(node: ir.Node) -> Sparse | None:
    added = sole_use(node.outputs[0])
    last = linear(added.outputs[0]) if added is not None and added.op_type == "Add" else None
    last = last or linear(node.outputs[0])
    if last is None or last.activation is not None:
        return None
    inner = rows_of(last.x)
    return _kept_largest(inner, last) or _rectified(inner, last)


def _kept_largest(inner: ir.Value, last: Linear) -> Sparse | None:
    """``ScatterElements(0, TopK's indices, TopK's values)``, relu before or behind; or all values times such a mask."""
    product = computed(inner, "Mul")
    for every, mask in pairs(product) if product is not None else ():
        choice = _scattered(mask, masked=True)
        if choice is not None and same(choice.inputs[0], every):
            return _of_topk(choice, False, last)
    relu = computed(inner, "Relu")
    scatter = computed(inner if relu is None else relu.inputs[0], "ScatterElements")
    choice = None if scatter is None else _scattered(scatter.outputs[0], masked=False)
    if choice is None or scatter is None:
        return None
    return _of_topk(choice, relu is not None or _behind_relu(scatter.inputs[2])[1], last)


def _scattered(value: ir.Value, masked: bool) -> ir.Node | None:
    """The TopK whose largest values (masked: ones in their places) the value holds, and zeros elsewhere."""
    scatter = computed(value, "ScatterElements")
    if scatter is None or not is_last(scatter, 0) or fill(scatter.inputs[0]) != 0:
        return None
    if attribute(scatter, "reduction", "none") not in ("none", "add"):
        return None
    choice = computed(scatter.inputs[1], "TopK")
    if choice is None or not is_last(choice) or not attribute(choice, "largest", 1):
        return None
    if not same(scatter.inputs[1], choice.outputs[1]):
        return None
    if masked:
        return choice if fill(scatter.inputs[2]) == 1 else None
    return choice if same(_behind_relu(scatter.inputs[2])[0], choice.outputs[0]) else None


def _of_topk(choice: ir.Node, relu: bool, last: Linear) -> Sparse | None:
    projected, early = _behind_relu(choice.inputs[0])
    first = _layer(projected)
    if first is None:
        return None
    activation = "relu" if relu or early or first.activation is not None else None
    k = scalar(choice.inputs[1])
    return Sparse((first,), last, activation, top_k=None if k is None else int(k), kind="topk-activation")


def _behind_relu(value: ir.Value | None) -> tuple[ir.Value | None, bool]:
    node = computed(value, "Relu")
    if node is not None:
        return node.inputs[0], True
    return (None if value is None else rows_of(value)), False


def _rectified(inner: ir.Value, last: Linear) -> Sparse | None:
    found = _activated(inner)
    if found is not None:
        first = _layer(found[1])
        return None if first is None or _chosen_rows(first.x) else Sparse((first,), last, found[0])
    product = computed(inner, "Mul")
    for gate, up in pairs(product) if product is not None else ():
        found = _activated(gate)
        if found is None or found[1] is None:
            continue
        layers = _gate_and_up(found[1], up)
        if layers is not None and not _chosen_rows(layers[0].x):
            return Sparse(layers, last, found[0], gated=True)
    return None


def _gate_and_up(gate: ir.Value, up: ir.Value) -> tuple[Linear, ...] | None:
    """Two layers over the same rows, or one whose halves they are."""
    first, second = _layer(gate), _layer(up)
    if first is not None and second is not None:
        return (first, second) if rows_of(first.x) is rows_of(second.x) else None
    halves = half_of(rows_of(gate), rows_of), half_of(rows_of(up), rows_of)
    if halves[0] is None or halves[1] is None or halves[0][0] is not halves[1][0]:
        return None
    whole = _layer(halves[0][0])
    return None if whole is None or whole.activation is not None or halves[0] == halves[1] else (whole,)


def _activated(value: ir.Value) -> tuple[str, ir.Value | None] | None:
    """(the activation, what it reads) where the value is one that gives exact zeros."""
    node = computed(value, "Mul", "Pow")
    if node is not None:
        squared = node.op_type == "Pow" and scalar(node.inputs[1]) == 2
        if squared or (node.op_type == "Mul" and same(node.inputs[0], node.inputs[1])):
            found = _rectifier(node.inputs[0])
            return ("relu2", found[1]) if found is not None and found[0] == "relu" else None
    return _rectifier(value)


def _rectifier(value: ir.Value | None) -> tuple[str, ir.Value | None] | None:
    node = computed(value, "Relu", "ThresholdedRelu", "Max", "Clip", "Where", "Mul")
    if node is None:
        fused = _layer(value)
        is_relu = fused is not None and fused.activation is not None and fused.activation[0] == "Relu"
        return ("relu", value) if is_relu else None
    if node.op_type in ("Relu", "ThresholdedRelu"):
        return "relu" if node.op_type == "Relu" else "thresholded_relu", node.inputs[0]
    if node.op_type == "Clip":
        low = scalar(node.inputs[1]) if len(node.inputs) == 2 else None
        return ("relu", node.inputs[0]) if low == 0 else None
    if node.op_type == "Max":
        return next((("relu", a) for a, b in pairs(node) if fill(b) == 0), None)
    return _above_threshold(node)


def _above_threshold(node: ir.Node) -> tuple[str, ir.Value | None] | None:
    """``Where(x > t, x, 0)``, ``Where(x <= t, 0, x)`` and ``x * (x > t)``, t at least 0."""
    tests: tuple[str, ...] = ("Greater", "GreaterOrEqual")
    if node.op_type == "Where":
        mask, kept, other = node.inputs
        if fill(kept) == 0:
            kept, other, tests = other, kept, ("Less", "LessOrEqual")
        tried = [(kept, mask)] if fill(other) == 0 else []
    else:
        casts = [(kept, producer(other, "Cast")) for kept, other in pairs(node)]
        tried = [(kept, cast.inputs[0]) for kept, cast in casts if cast is not None]
    for kept, mask in tried:
        above = producer(mask, *tests)
        if above is None or not same(above.inputs[0], kept):
            continue
        threshold = scalar(above.inputs[1])
        if threshold is not None and threshold >= 0:
            return "relu" if threshold == 0 else "thresholded_relu", kept
    return None


def _layer(value: ir.Value | None) -> Linear | None:
    return None if value is None else linear(rows_of(value))


def _chosen_rows(rows: ir.Value) -> bool:
    """Whether these are some rows of others: then the block is an expert's, or skipped by other tokens."""
    node = computed(rows, "Gather", "GatherND", "GatherElements")
    return node is not None and tensor(node.inputs[0]) is None


def _record(block: Sparse) -> BlockRecord:
    sizes = [_sizes(layer) for layer in (*block.first, block.last)]
    first = sizes[0]
    halved = 2 if block.gated and len(block.first) == 1 else 1
    return BlockRecord(
        name=_name([layer.node for layer in (*block.first, block.last)], block.last.node, block.kind),
        kind=block.kind,
        spelling=block.kind,
        experts=None,
        top_k=block.top_k,
        hidden=None if first is None else first[0],
        inner=None if first is None else first[1] // halved,
        activation=block.activation,
        gated=block.gated,
        router=None,
        form=None,
        parameters=_parameters(block),
        active_parameters=None,
    )


def _sizes(layer: Linear) -> tuple[int, int] | None:
    """(inputs, outputs)."""
    rows, columns = size(layer.weight.source, -2), size(layer.weight.source, -1)
    if rows is None or columns is None:
        return None
    return (columns, rows) if layer.out_in else (rows, columns)


def _parameters(block: Sparse) -> int | None:
    total = 0
    for layer in (*block.first, block.last):
        sizes = _sizes(layer)
        if sizes is None:
            return None
        total += math.prod(sizes) + (0 if layer.bias is None else sizes[1])
    return total


def _depths_record(found: Depths) -> BlockRecord:
    return BlockRecord(
        name=_name(found.inside, found.scatter, "mixture-of-depths"),
        kind="mixture-of-depths",
        spelling="mixture-of-depths",
        experts=None,
        top_k=found.top_k,
        hidden=found.hidden,
        inner=None,
        activation=None,
        gated=None,
        router=None,
        form=None,
        parameters=found.parameters,
        active_parameters=None,
    )


def _name(nodes: list[ir.Node], anchor: ir.Node, kind: str) -> str:
    """The module's name, as far as the exporter tells; else the kind and the node."""
    name = block_name(nodes, anchor)
    return f"{kind}{name.removeprefix('moe')}" if name == block_name([], anchor) else name
