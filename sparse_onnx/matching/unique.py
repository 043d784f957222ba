"""Whether indices that something is scattered to are provably all different.

`indices_unique(indices)` for ScatterND: tuples along the last axis. Distinct elements make distinct tuples, however
they are grouped, and one distinct column makes the tuples distinct. An index may count from the end, so that two
different numbers can be one place: proofs are of numbers of one sign.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from sparse_onnx.graph.external import read_array
from sparse_onnx.matching.choice import Choices
from sparse_onnx.matching.values import attribute, ints, producer, rank, scalar, tensor

#: Constant indices above this many elements are not read to be compared.
_LARGEST_CONSTANT = 1 << 20
_RESHAPES = ("Identity", "Reshape", "Squeeze", "Unsqueeze", "Flatten")
_WIDE = (ir.DataType.INT32, ir.DataType.INT64)


def indices_unique(indices: ir.Value | None) -> bool:
    """Whether the tuples along the last axis of `indices [..., Q]` are provably all different places."""
    indices = _uncast(indices)
    if indices is None:
        return False
    found = tensor(indices)
    if found is not None:
        return found.size <= _LARGEST_CONSTANT and bool(found.shape) and _rows_differ(read_array(found))
    if _places_of(indices) is not None:
        return True
    node = producer(indices, "Concat")
    if node is not None and _joins_columns(node, indices):
        parts = [part for part in node.inputs if part is not None]
        return any(values_unique(part) for part in parts) or _all_rows(parts)
    return values_unique(indices)


def values_unique(value: ir.Value | None) -> bool:
    """Whether all elements of the value are provably different places of an axis, whatever its shape."""
    value = _elements(value)
    if value is None:
        return False
    found = tensor(value)
    if found is not None:
        return found.size <= _LARGEST_CONSTANT and _rows_differ(read_array(found).reshape(-1, 1))
    node = producer(value)
    if node is None:
        return False
    if node.op_type == "Range":
        start, step = scalar(node.inputs[0]), scalar(node.inputs[2])
        return start is not None and step is not None and start >= 0 and step > 0
    if node.op_type == "TopK":  # positions along the sorted axis: of a vector, all different
        return value is node.outputs[1] and rank(node.inputs[0]) == 1
    if node.op_type in ("Slice", "Split") or (node.op_type == "Compress" and "axis" in node.attributes):
        coordinate = _coordinate(value)
        return _coordinate_unique(*coordinate) if coordinate is not None else values_unique(node.inputs[0])
    if node.op_type == "Gather":
        coordinate = _coordinate(value)
        if coordinate is not None:
            return _coordinate_unique(*coordinate)
        data, index = node.inputs
        return rank(data) == 1 and values_unique(data) and values_unique(index)
    if node.op_type == "NonZero":  # of a vector: one row
        return rank(node.inputs[0]) == 1
    return False


def _rows_differ(array: np.ndarray) -> bool:
    if array.dtype.kind not in "iu" or not array.shape[-1]:
        return False
    rows = array.reshape(-1, array.shape[-1])
    for column in rows.T:
        if (column < 0).any() and (column >= 0).any():
            return False  # -1 may be the place of another row's 7
    return len(np.unique(rows, axis=0)) == len(rows)


def _uncast(value: ir.Value | None) -> ir.Value | None:
    """Behind casts between types that hold every index."""
    while value is not None:
        node = producer(value, "Cast", "Identity")
        if node is None or (node.op_type == "Cast" and attribute(node, "to") not in _WIDE):
            return value
        value = node.inputs[0]
    return None


def _elements(value: ir.Value | None) -> ir.Value | None:
    """The value whose elements these are, in some order and shape."""
    while (value := _uncast(value)) is not None:
        node = producer(value, *_RESHAPES, "Transpose")
        if node is None:
            return value
        value = node.inputs[0]
    return None


def _places_of(indices: ir.Value) -> ir.Node | None:
    """The NonZero of which each tuple of `indices` is one place, all coordinates of it."""
    node = producer(indices, "Transpose")
    if node is None:
        return None
    places = producer(_uncast(node.inputs[0]), "NonZero")
    order = attribute(node, "perm")
    return places if order is None or list(order) == [1, 0] else None


def _joins_columns(node: ir.Node, indices: ir.Value) -> bool:
    """Whether a Concat makes each tuple of one element or tuple of each of its inputs."""
    axis = attribute(node, "axis")
    dimensions = rank(indices)
    return axis == -1 or (dimensions is not None and axis == dimensions - 1)


def _coordinate(value: ir.Value | None) -> tuple[ir.Node, int] | None:
    """NonZero, and which of its rows the value's elements are."""
    value = _elements(value)
    node = producer(value, "Gather", "Split", "Slice")
    if node is None or value is None:
        return None
    source = _uncast(node.inputs[0])
    axis = attribute(node, "axis", 0)
    turned = producer(source, "Transpose")
    if turned is not None and list(attribute(turned, "perm", (1, 0))) == [1, 0]:
        source = _uncast(turned.inputs[0])
        axis = {0: 1, 1: 0, -1: 0, -2: 1}.get(axis, axis) if node.op_type != "Slice" else axis
    places = producer(source, "NonZero")
    if places is None:
        return None
    if node.op_type == "Slice":
        return _sliced(node, places, turned is not None)
    if axis not in (0, -2):
        return None
    if node.op_type == "Split":
        return (places, node.outputs.index(value)) if _single_rows(node, places) else None
    which = scalar(node.inputs[1])
    return None if which is None else _row(places, int(which))


def _sliced(node: ir.Node, places: ir.Node, turned: bool) -> tuple[ir.Node, int] | None:
    """One row by `Slice`: from `which` to `which + 1`."""
    if len(node.inputs) < 4:
        return None
    (starts, ends, axes) = (ints(value) for value in node.inputs[1:4])
    if axes not in ([1], [-1]) if turned else axes not in ([0], [-2]):
        return None
    if not starts or not ends or (ends[0] != starts[0] + 1 and not (starts[0] == -1 and ends[0] > 1 << 30)):
        return None
    return _row(places, starts[0])


def _row(places: ir.Node, which: int) -> tuple[ir.Node, int] | None:
    dimensions = rank(places.inputs[0])
    if which < 0:
        return None if dimensions is None else (places, which + dimensions)
    return places, which


def _single_rows(node: ir.Node, places: ir.Node) -> bool:
    sizes = ints(node.inputs[1]) if len(node.inputs) > 1 and node.inputs[1] is not None else None
    if sizes is not None:
        return all(size == 1 for size in sizes)
    dimensions = rank(places.inputs[0])
    return dimensions == len(node.outputs) if dimensions is not None else len(node.outputs) == 2


def _coordinate_unique(places: ir.Node, row: int) -> bool:
    """Whether a mask is true at most once along its other axes: a token's experts are different ones."""
    mask = places.inputs[0]
    if rank(mask) == 1:
        return row == 0
    grid = None if mask is None else Choices().grid(mask)
    if grid is None or not grid.index.distinct or len(grid.experts) != 1 or not 0 <= row < len(grid.labels):
        return False
    tokens = {label for label in grid.index.labels if label[0] in "tT"}
    others = [label for at, label in enumerate(grid.labels) if at != row]
    return (
        grid.labels[row] in ("t0", "T") and len(tokens) == 1 and all(label in ("k", "1") for label in others)
    )


def _all_rows(parts: list[ir.Value]) -> bool:
    """Whether the columns are all coordinates of the same places."""
    found = [_coordinate(part) for part in parts]
    known = [item for item in found if item is not None]
    if len(known) < len(found) or any(places is not known[0][0] for places, _ in known):
        return False
    dimensions = rank(known[0][0].inputs[0])
    return dimensions is not None and {row for _, row in known} == set(range(dimensions))
