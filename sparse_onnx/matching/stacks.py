"""Values of several experts side by side: stacked along an axis of their own."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from sparse_onnx.matching.dims import Dims
from sparse_onnx.matching.values import attribute, axes, producer


def _row(piece: ir.Value, dims: Dims) -> ir.Value:
    """``[.., 1, D]`` as the ``[.., D]`` that it was made of."""
    node, dimensions = producer(piece, "Unsqueeze"), dims.rank(piece)
    along = None if node is None else axes(node)
    if (
        node is None
        or along is None
        or dimensions is None
        or dimensions - 1 in {at % dimensions for at in along}
    ):
        return piece
    return node.inputs[0] or piece


def stacked(value: ir.Value, at: int, dims: Dims) -> list[ir.Value] | None:
    """The pieces ``[.., D]`` that are stacked along the axis `at` from the right, in order."""
    node, dimensions = producer(value, "Concat", "Reshape", "Transpose", "Cast"), dims.rank(value)
    if node is None or dimensions is None or not 1 <= at <= dimensions or node.inputs[0] is None:
        return None
    inputs = [item for item in node.inputs if item is not None]
    if node.op_type == "Cast":
        return stacked(inputs[0], at, dims) if inputs[0].dtype == value.dtype else None
    if node.op_type == "Concat":
        if (
            len(inputs) < 2
            or dims.axis(node) != dimensions - at
            or any(dims.size(item, -at) != 1 for item in inputs)
        ):
            return None
        return [_row(piece, dims) for piece in inputs] if at > 1 else _without_last(inputs, dims)
    if node.op_type == "Transpose":
        order = attribute(node, "perm") or list(range(dimensions))[::-1]
        front = order[dimensions - at]
        tokens = [item for item in order if item != front]
        return stacked(inputs[0], dimensions - front, dims) if tokens == sorted(tokens) else None
    joined = producer(inputs[0], "Concat")
    if joined is None:
        return None
    parts = [item for item in joined.inputs if item is not None]
    if (
        len(parts) < 2
        or dims.size(value, -at) != len(parts)
        or not all(dims.same(parts[0], p) for p in parts)
    ):
        return None
    if dims.axis(joined) == (dims.rank(inputs[0]) or 0) - 1 and at == 2:
        return (
            parts
            if dims.size(parts[0], -1) is not None and dims.size(parts[0], -1) == dims.size(value, -1)
            else None
        )
    return (
        parts
        if dims.axis(joined) == 0 and at == dimensions and dims.size(value, -1) == dims.size(inputs[0], -1)
        else None
    )


def _without_last(pieces: Sequence[ir.Value], dims: Dims) -> list[ir.Value] | None:
    """Pieces ``[.., D, 1]`` as the ``[.., D]`` that they were made of."""
    found = []
    for piece in pieces:
        node = producer(piece, "Unsqueeze", "Reshape")
        source = None if node is None else node.inputs[0]
        if source is None or (dims.rank(source) or 0) + 1 != dims.rank(piece):
            return None
        if dims.size(source, -1) is None or dims.size(source, -1) != dims.size(piece, -2):
            return None
        found.append(source)
    return found
