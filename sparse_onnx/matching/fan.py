"""How tokens reach their slots: each token's row, K times in succession."""

from __future__ import annotations

import onnx_ir as ir

from sparse_onnx.matching.dims import Dims
from sparse_onnx.matching.integers import quotient
from sparse_onnx.matching.layout import flat, gathered, repeated
from sparse_onnx.matching.slots import Projection, rows_behind
from sparse_onnx.matching.values import constant, ints, producer, rank, scalar, size


def token_rows(first: Projection, index: ir.Value, dims: Dims) -> tuple[ir.Value, int] | None:
    """(tokens, K) where slot s of the projection reads row s // K of tokens ``[.., inputs]``; None where unproved."""
    x = first.layer.x
    if first.fan != 1:
        return x, first.fan
    below = flat(x)
    node = producer(below, "Expand", "Tile", "Gather", "GatherND")
    source = None if node is None else node.inputs[0]
    if node is None or source is None:
        return x, 1
    if node.op_type in ("Expand", "Tile"):
        counts = ints(node.inputs[1])
        if counts is not None and set(counts) == {1} and len(counts) <= (rank(source) or 0):
            return rows_behind(source), 1
        read = repeated(below)
        return None if read is None or size(read[0], -1) != first.inputs else read
    return _rows_taken(below, first.inputs, index, dims) or (x, 1)


def _rows_taken(value: ir.Value, width: int, index: ir.Value, dims: Dims) -> tuple[ir.Value, int] | None:
    """``tokens[arange(T K) // K]``, or by a constant or expanded table of the same content."""
    read = gathered(value)
    if read is None or rank(read[0]) != 2 or size(read[0], -1) != width:
        return None
    data, rows = read
    counter = producer(_counter(rows), "Range")
    if counter is None or producer(flat(rows), "Expand", "Tile") is not None:
        return repeated(value)
    if [scalar(counter.inputs[0]), scalar(counter.inputs[2])] != [0, 1]:
        return None
    top_k = quotient(rows, counter.outputs[0])
    if top_k is None:
        return None
    slots = counter.outputs[0]
    whole = dims.as_many(slots, top_k, data, None) or dims.as_many(slots, 1, index, 1)
    return (data, top_k) if whole else None


def _counter(value: ir.Value) -> ir.Value | None:
    """The only value that is not constant at the root of integer arithmetic."""
    at: ir.Value | None = value
    for _ in range(64):
        node = None if at is None else producer(at)
        if node is None or node.op_type == "Range":
            return at
        changing = [item for item in node.inputs if item is not None and constant(item) is None]
        at = changing[0] if changing else None
    return None
