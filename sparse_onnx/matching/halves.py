"""The two halves of a gated projection: first and last, or every second of its outputs."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir

from sparse_onnx.graph.external import read_array
from sparse_onnx.matching.values import ints, is_last, producer, rank, size, tensor

Skip = Callable[[ir.Value], ir.Value]


def half_of(value: ir.Value, skip: Skip) -> tuple[ir.Value, int] | None:
    """(whole, part) of one half of a projection: part 0, 1 first and last half; 2, 3 even and odd elements."""
    node = producer(value, "Split", "Slice", "Gather", "Squeeze")
    if node is None or node.inputs[0] is None:
        return None
    if node.op_type == "Squeeze":
        return _pair_of(value, skip)
    source = node.inputs[0]
    if node.op_type == "Split":
        if len(node.outputs) != 2 or not is_last(node, 0):
            return None
        lengths = ints(node.inputs[1]) if len(node.inputs) > 1 and node.inputs[1] is not None else None
        if lengths is not None and (len(lengths) != 2 or lengths[0] != lengths[1]):
            return None
        if size(source, -1) is not None and (size(source, -1) or 0) % 2:
            return None
        return skip(source), value.index() or 0
    if node.op_type == "Slice":
        return _sliced(node, source, skip)
    part = _columns(node, source) if node.op_type == "Gather" else None
    return _pair_of(value, skip) if part is None else (skip(source), part)


def _columns(node: ir.Node, source: ir.Value) -> int | None:
    """Part 0 to 3, as of `_half_of`, that a Gather of constant columns takes."""
    columns, width = tensor(node.inputs[1]), size(source, -1)
    if columns is None or width is None or width % 2 or not is_last(node, 0):
        return None
    if len(columns.shape) != 1 or columns.size != width // 2:
        return None
    picked = read_array(columns)
    every = np.arange(width)
    for part, wanted in enumerate((every[: width // 2], every[width // 2 :], every[::2], every[1::2])):
        if np.array_equal(picked % width, wanted):
            return part
    return None


def _sliced(node: ir.Node, source: ir.Value, skip: Skip) -> tuple[ir.Value, int] | None:
    bounds = [ints(item) if item is not None else None for item in node.inputs[1:5]]
    bounds += [None] * (4 - len(bounds))
    start, end, along, step = bounds
    width, dimensions = size(source, -1), rank(source)
    if (
        not start
        or not end
        or len(start) != 1
        or along not in ([-1], [None if dimensions is None else dimensions - 1])
    ):
        return None
    if width is None:  # that it is even shows when the weights are known
        every_second = step == [2] and start[0] in (0, 1) and end[0] >= 2**31 - 1
        return (skip(source), 2 + start[0]) if every_second else None
    if width % 2:
        return None
    first = start[0] + width if start[0] < 0 else start[0]
    last = min(end[0] + width if end[0] < 0 else end[0], width)
    if step in (None, [1]):
        halves = {(0, width // 2): 0, (width // 2, width): 1}
        part = halves.get((first, last))
    elif step == [2] and first in (0, 1) and last >= width - 1 + first:
        part = 2 + first
    else:
        part = None
    return None if part is None else (skip(source), part)


def _pair_of(value: ir.Value, skip: Skip) -> tuple[ir.Value, int] | None:
    """One of two along a last axis of 2 that a Reshape made: ``[..., 2 I] -> [..., I, 2] -> [..., I]``."""
    node = producer(value, "Gather", "Squeeze")
    piece = 0
    if node is None:
        return None
    if node.op_type == "Gather":
        picked = ints(node.inputs[1])
        if picked is None or len(picked) != 1 or rank(node.inputs[1]) != 0 or not is_last(node, 0):
            return None
        piece, source = picked[0] % 2, node.inputs[0]
    else:
        split = producer(node.inputs[0], "Split")
        if split is None or len(split.outputs) != 2 or not is_last(split, 0) or size(node.inputs[0], -1) != 1:
            return None
        assert node.inputs[0] is not None
        piece, source = node.inputs[0].index() or 0, split.inputs[0]
    if source is None or size(source, -1) != 2:
        return None
    shaped = producer(source, "Reshape")
    if shaped is None or shaped.inputs[0] is None:
        return None
    whole, width, pairs = shaped.inputs[0], size(shaped.inputs[0], -1), size(source, -2)
    if width is None or pairs is None or width != 2 * pairs:
        return None
    return skip(whole), 2 + piece
