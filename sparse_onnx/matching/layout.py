"""Rows however they are shaped: reshapes looked through, repeats and gathers of rows read as such."""

from __future__ import annotations

import math

import onnx_ir as ir

from sparse_onnx.matching.values import attribute, axes, axis, constant, ints, producer, rank, size

_RESHAPES = ("Reshape", "Squeeze", "Unsqueeze", "Flatten", "Identity")


def flat(value: ir.Value) -> ir.Value:
    """The value whose elements, in row-major order, these are: looks through reshapes."""
    while (below := _unshaped(value)) is not None:
        value = below
    return value


def rows_of(value: ir.Value) -> ir.Value:
    """The same, but only through reshapes that keep the last axis: rows stay rows."""
    while (below := _unshaped(value)) is not None and keeps_last_axis(value):
        value = below
    return value


def same_rows(a: ir.Value, b: ir.Value) -> bool:
    """Whether both hold the same rows in the same order, up to the shape of their leading axes."""
    return rows_of(a) is rows_of(b)


def _unshaped(value: ir.Value) -> ir.Value | None:
    node = producer(value)
    if node is None:
        return None
    source = node.inputs[0] if node.inputs else None
    if node.op_type in _RESHAPES:
        return source
    if node.op_type == "Cast" and source is not None:
        return source if source.dtype is not None and source.dtype == value.dtype else None
    if node.op_type == "Transpose" and source is not None and _moves_only_ones(node, source):
        return source
    return None


def _moves_only_ones(node: ir.Node, source: ir.Value) -> bool:
    """Whether a Transpose keeps the order of all axes longer than 1, so that no element moves."""
    if source.shape is None:
        return False
    order = attribute(node, "perm")
    if order is None:
        order = range(len(source.shape))[::-1]
    long = [at for at in order if source.shape[at] != 1]
    return long == sorted(long)


def keeps_last_axis(value: ir.Value) -> bool:
    """Whether the reshape that computes the value leaves the last axis as it was."""
    node = producer(value)
    if node is None or node.inputs[0] is None:
        return False
    source = node.inputs[0]
    if node.op_type in ("Identity", "Cast"):
        return True
    before, after = size(source, -1), size(value, -1)
    if after is None and node.op_type == "Reshape":
        target = ints(node.inputs[1])
        after = target[-1] if target else None
    if before is not None and after is not None:
        return before == after
    found, dimensions = axes(node), rank(source)
    if node.op_type == "Unsqueeze" and found is not None and dimensions is not None:
        return -1 not in found and dimensions + len(found) - 1 not in found
    if node.op_type == "Squeeze" and found is not None and dimensions is not None:
        return -1 not in found and dimensions - 1 not in found
    return node.op_type == "Flatten" and dimensions == 2 and axis(node, 1) == 1


def repeated(value: ir.Value) -> tuple[ir.Value, int] | None:
    """(x, K) where the value holds each row of x K times in succession, whatever its axes but the last are.

    Expand or Tile of x with an axis of 1 put before its last, or a Gather of rows by such indices. Where the rows are
    single elements, as in a vector, the axis may be put behind the last, and the value be of any shape.
    """
    node, kept = producer(value), True
    while node is not None and node.op_type in _RESHAPES and node.inputs[0] is not None:
        kept = kept and keeps_last_axis(value)
        value = node.inputs[0]
        node = producer(value)
    if node is None:
        return None
    if node.op_type in ("Gather", "GatherND"):
        return _gathered_repeats(value) if kept else None
    if node.op_type not in ("Expand", "Tile") or node.inputs[0] is None:
        return None
    source = node.inputs[0]
    counts = _counts(node, source, value)
    if counts is None:
        return None
    many = [(at, count) for at, count in enumerate(counts) if count != 1]
    if len(many) != 1:
        return None
    at, times = many[0]
    behind = len(counts) - 1 - at
    if behind > 1 or size(source, at) != 1:
        return None
    if behind == 1:
        base = rows_of(source)  # a vector is many rows, and [1, T] repeated is one
        return (base, times) if kept and (rank(base) or 0) > 1 else None
    base = flat(source)  # of a matrix, Expand of [T, D, 1] repeats elements, not rows
    return (base, times) if rank(base) == 1 or size(base, -1) == 1 else None


def _counts(node: ir.Node, source: ir.Value, result: ir.Value) -> list[int] | None:
    """How often each axis of the input is repeated; None where that is not a set of constants."""
    dimensions = rank(source)
    if dimensions is None:
        return None
    target = ints(node.inputs[1])
    if node.op_type == "Tile":
        return target if target is not None and len(target) == dimensions else None
    if target is not None and len(target) <= dimensions:
        target = [1] * (dimensions - len(target)) + target
        counts = []
        for at, wanted in enumerate(target):
            have = size(source, at)
            if wanted == 1 or wanted == have:
                counts.append(1)
            elif have == 1:
                counts.append(wanted)
            else:
                return None
        return counts
    if source.shape is None or result.shape is None or len(result.shape) != dimensions:
        return None
    counts = []
    for before, after in zip(source.shape, result.shape, strict=True):
        if before == after and (isinstance(before, int) or before.value is not None):
            counts.append(1)
        elif before == 1 and isinstance(after, int):
            counts.append(after)
        else:
            return None
    return counts


def _gathered_repeats(value: ir.Value) -> tuple[ir.Value, int] | None:
    read = gathered(value)
    if read is None:
        return None
    data, index = read
    repeats = repeated(index)
    if repeats is None:
        table = constant(flat(index))
        if table is None or size(data, 0) is None or table.size % max(1, size(data, 0) or 1):
            return None
        rows = size(data, 0) or 1
        times = table.size // rows
        return (data, times) if table.ravel().tolist() == [at // times for at in range(table.size)] else None
    base, times = repeats
    counter = producer(base, "Range")
    if counter is None or [_first(counter.inputs[0]), _first(counter.inputs[2])] != [0, 1]:
        return None
    return (data, times) if counts_rows(counter.inputs[1], data) else None


def counts_rows(value: ir.Value | None, data: ir.Value) -> bool:
    """Whether the value is the number of rows of data along its first axis: from a Shape of it, or a constant."""
    if value is None:
        return False
    value = flat(value)
    rows = size(data, 0)
    if rows is not None and _first(value) == rows:
        return True
    node = producer(value, "Gather", "Slice", "Squeeze")
    if node is not None and node.op_type == "Gather" and _first(node.inputs[1]) in (0,):
        value, node = flat(node.inputs[0]), None  # type: ignore[arg-type]
    shape = producer(value, "Shape")
    if shape is None or shape.inputs[0] is None:
        return False
    return attribute(shape, "start", 0) == 0 and (
        shape.inputs[0] is data or (data.shape is not None and _same_first(shape.inputs[0], data))
    )


def _same_first(a: ir.Value, b: ir.Value) -> bool:
    if a.shape is None or b.shape is None or not len(a.shape) or not len(b.shape):
        return False
    first, second = a.shape[0], b.shape[0]
    return first == second and (isinstance(first, int) or first.value is not None)


def _first(value: ir.Value | None) -> int | None:
    found = ints(value) if value is not None else None
    return found[0] if found is not None and len(found) == 1 else None


def gathered(value: ir.Value) -> tuple[ir.Value, ir.Value] | None:
    """(data, index) where the value is rows data[index], by Gather on axis 0 or GatherND with one index a row."""
    node = producer(value, "Gather", "GatherND")
    if node is None or node.inputs[0] is None or node.inputs[1] is None:
        return None
    data, index = node.inputs[0], node.inputs[1]
    if node.op_type == "Gather":
        return (data, index) if axis(node, 0) == 0 else None
    if attribute(node, "batch_dims", 0) != 0 or not _ends_with_one(index):
        return None
    return data, index


def _ends_with_one(index: ir.Value) -> bool:
    if size(index, -1) == 1:
        return True
    node = producer(index, "Unsqueeze")
    if node is not None and node.inputs[0] is not None:
        found, dimensions = axes(node), rank(node.inputs[0])
        return found is not None and (-1 in found or dimensions in found)
    node = producer(index, "Reshape")
    target = ints(node.inputs[1]) if node is not None else None
    return bool(target) and target[-1] == 1  # type: ignore[index]


def elements(value: ir.Value) -> int | None:
    """Number of elements of a static shape."""
    if value.shape is None or not value.shape.is_static():
        return None
    return math.prod(value.shape.numpy())
