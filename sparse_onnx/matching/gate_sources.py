"""Small values that gates are made of: uniform fills, counters, chosen indices, k-th largest scores."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from sparse_onnx.matching.layout import keeps_last_axis
from sparse_onnx.matching.values import attribute, constant, ints, is_last, producer, rank, scalar, size

SOFT_MIXTURE = "soft mixture: every expert takes part in every token"
_SHAPED = ("Expand", "Tile", "Reshape", "Squeeze", "Unsqueeze", "Cast", "Identity", "Flatten")
_CARRIERS = ("Cast", "Identity", "Reshape", "Squeeze", "Unsqueeze", "Flatten")
_PICKS = ("Slice", "Gather", "Squeeze", "Unsqueeze", "Reshape", "ReduceMin", "Split", "Expand", "Cast")


def not_zero(value: ir.Value) -> str:
    return f"the gates '{value.name}' are not proved to be zero for experts that a token did not choose"


def uniform(value: ir.Value | None, left: int = 12) -> float | None:
    """The number that every element of the value is; None where they may differ."""
    if value is None or left == 0:
        return None
    array = constant(value)
    if array is not None:
        if array.size == 0 or array.dtype.kind not in "biufV" or not bool((array == array.flat[0]).all()):
            return None
        return float(array.flat[0])
    node = producer(value)
    if node is None:
        return None
    if node.op_type == "ConstantOfShape":
        fill = attribute(node, "value")
        return 0.0 if fill is None else float(fill.numpy().reshape(()).item())
    if node.op_type in _SHAPED:
        inner = uniform(node.inputs[0], left - 1)
        to_bool = node.op_type == "Cast" and attribute(node, "to") == ir.DataType.BOOL
        return float(inner != 0) if to_bool and inner is not None else inner
    if node.op_type == "Mul" and any(scalar(item) == 0 for item in node.inputs):
        return 0.0
    return None


def arange(value: ir.Value | None) -> tuple[int, int] | None:
    """(E, axis from the right) of the numbers 0..E-1 along one axis, all others of length 1."""
    array = constant(value)
    if array is not None and array.dtype.kind in "iu":
        long = [at for at, length in enumerate(array.shape) if length != 1]
        if len(long) != 1 or array.ravel().tolist() != list(range(array.size)):
            return None
        return array.size, array.ndim - long[0]
    node = producer(value, "Range", "Unsqueeze", "Reshape", "Cast")
    if node is None or value is None:
        return None
    if node.op_type == "Range":
        first, last, step = (scalar(item) for item in node.inputs)
        return (int(last), 1) if (first, step) == (0, 1) and last is not None else None
    inner, dimensions = arange(node.inputs[0]), rank(value)
    if inner is None or dimensions is None:
        return None
    long = [at for at in range(dimensions) if size(value, at) != 1]
    return (inner[0], dimensions - long[0]) if len(long) == 1 else None


def from_top_values(bound: ir.Value, scores: ir.Value) -> bool:
    """Whether the bound is one of the largest scores, as a TopK over the same scores gives them."""
    value: ir.Value | None = bound
    for _ in range(8):
        node = producer(value, "TopK", *_PICKS)
        if node is None:
            return False
        if node.op_type == "TopK":
            return value is node.outputs[0] and node.inputs[0] is scores
        value = node.inputs[0]
    return False


def experts_of(ids: ir.Value) -> int | None:
    """E where the indices are proved to lie in 0..E-1: a TopK's or ArgMax's over an axis of that length, a table's."""
    value: ir.Value | None = ids
    while (node := producer(value, *_CARRIERS)) is not None:
        if node.op_type == "Cast" and attribute(node, "to") not in (ir.DataType.INT32, ir.DataType.INT64):
            return None
        value = node.inputs[0]
    node = producer(value, "TopK", "ArgMax", "Concat", "Gather", "Slice")
    if node is None or value is None:
        return None
    if node.op_type == "TopK":
        return size(node.inputs[0], attribute(node, "axis", -1)) if value is node.outputs[1] else None
    if node.op_type == "ArgMax":
        return size(node.inputs[0], attribute(node, "axis", 0))
    if node.op_type == "Concat":
        found = {experts_of(item) for item in node.inputs if item is not None}
        return found.pop() if len(found) == 1 else None
    table = _table(node.inputs[0])
    if node.op_type == "Gather" and table is not None:
        return int(table.max()) + 1 if table.size and table.min() >= 0 else None
    return None if node.inputs[0] is None else experts_of(node.inputs[0])


def _table(value: ir.Value | None) -> np.ndarray | None:
    if value is None or value.const_value is None or not value.is_initializer() or value.is_graph_input():
        return None
    array = value.const_value.numpy()
    return array if array.dtype.kind in "iu" else None


def distinct(ids: ir.Value, slots: int) -> bool:
    """Whether the entries along the last axis of `ids` are proved to differ: all of a TopK's over its last axis."""
    if slots == 1:
        return True
    value: ir.Value | None = ids
    while (node := producer(value, *_CARRIERS)) is not None and value is not None:
        source = node.inputs[0]
        # Indices `[.., K, 1]`, for a comparison with all experts, are those of `[.., K]`.
        appended = node.op_type == "Unsqueeze" and size(value, -1) == 1 and size(source, -1) == slots
        if not appended and not keeps_last_axis(value):
            return False
        value = source
    node = producer(value, "TopK")
    if node is None or value is not node.outputs[1]:
        return False
    at, dimensions = attribute(node, "axis", -1), rank(value)
    if not is_last(node):
        behind = None if dimensions is None else range(at % dimensions + 1, dimensions)
        return (
            behind is not None
            and size(value, at) == slots
            and all(size(value, other) == 1 for other in behind)
        )
    return ints(node.inputs[1]) == [slots] or size(value, -1) == slots
