"""Gates looked at in another shape: which axis is the experts', and when a view is one expert's column."""

from __future__ import annotations

import dataclasses
import math

import onnx_ir as ir

from sparse_onnx.matching.dims import Dims
from sparse_onnx.matching.gate import Gate
from sparse_onnx.matching.gate_sources import not_zero
from sparse_onnx.matching.values import attribute, axes, ints


def viewed(value: ir.Value, node: ir.Node, gate: Gate, dims: Dims) -> Gate | None:
    """The gate behind a reshape, a transpose, or a selection of one expert; None where its tokens would be mixed."""
    source, before = node.inputs[0], dims.rank(node.inputs[0])
    if source is None or before is None:
        return None
    op = node.op_type
    if op == "Identity":
        return gate
    if op in ("Unsqueeze", "Squeeze"):
        return _squeezed(node, source, before, gate)
    if op == "Transpose":
        return _turned(node, source, before, gate, dims)
    if op in ("Reshape", "Flatten"):
        return _reshaped(value, source, before, gate, dims)
    if op == "Slice":
        return _sliced(node, before, gate, dims)
    if gate.expert is None or dims.axis(node) != gate.expert:
        return None
    if op == "Gather":
        return _gathered(node, source, gate, dims)
    return _split(value, node, source, gate, dims) if op == "Split" else None


def unproved_column(value: ir.Value, node: ir.Node, dims: Dims) -> Gate | None:
    """One column of a value of which nothing is known. It may be meant as a gate; then this is the flaw."""
    source, before = node.inputs[0], dims.rank(node.inputs[0])
    if source is None or before is None or node.op_type not in ("Slice", "Gather", "Split"):
        return None
    along = before - 1 if node.op_type == "Slice" else dims.axis(node)
    count = None if along is None else dims.size(source, along)
    if (
        along is None
        or count is None
        or count < 2
        or source.dtype is None
        or not source.dtype.is_floating_point()
    ):
        return None
    flaw = not_zero(source)
    return viewed(value, node, Gate(None, None, along, None, math.nan, None, flaw=flaw, experts=count), dims)


def _squeezed(node: ir.Node, source: ir.Value, before: int, gate: Gate) -> Gate | None:
    along = axes(node)
    if along is None:
        return None
    if node.op_type == "Squeeze":
        gone = {at % before for at in along}
        if gate.expert in gone:
            return None
        expert = None if gate.expert is None else gate.expert - sum(at < gate.expert for at in gone)
        return dataclasses.replace(gate, expert=expert)
    new = {at % (before + len(along)) for at in along}
    expert = gate.expert
    if expert is not None:
        for at in sorted(new):
            expert += at <= expert
    return dataclasses.replace(gate, expert=expert)


def _turned(node: ir.Node, source: ir.Value, before: int, gate: Gate, dims: Dims) -> Gate | None:
    order = attribute(node, "perm") or list(range(before))[::-1]
    tokens = [at for at in order if at != gate.expert and dims.size(source, at) != 1]
    if tokens != sorted(tokens):
        return None
    return dataclasses.replace(gate, expert=None if gate.expert is None else list(order).index(gate.expert))


def _reshaped(value: ir.Value, source: ir.Value, before: int, gate: Gate, dims: Dims) -> Gate | None:
    if gate.expert is None:
        return dataclasses.replace(gate, plain=False)
    after, count = dims.rank(value), dims.size(source, gate.expert)
    if after is None or count is None:
        return None
    front = all(dims.size(source, at) == 1 for at in range(gate.expert))
    back = all(dims.size(source, at) == 1 for at in range(gate.expert + 1, before))
    for at in range(after):
        if dims.size(value, at) != count:
            continue
        first = front and all(dims.size(value, other) == 1 for other in range(at))
        last = back and all(dims.size(value, other) == 1 for other in range(at + 1, after))
        if first or last:
            return dataclasses.replace(gate, expert=at, plain=False)
    return None


def _sliced(node: ir.Node, before: int, gate: Gate, dims: Dims) -> Gate | None:
    bounds = [ints(item) for item in node.inputs[1:5]]
    bounds += [None] * (4 - len(bounds))
    start, end, along, step = bounds
    if gate.expert is None or start is None or end is None or len(start) != 1 or step not in (None, [1]):
        return None
    if (0 if along is None else along[0] % before) != gate.expert:
        return None
    count = dims.size(node.inputs[0], gate.expert)
    if count is None:
        return None
    first = start[0] + count if start[0] < 0 else start[0]
    last = min(end[0] + count if end[0] < 0 else end[0], count)
    return _column(gate, first) if last == first + 1 else None


def _gathered(node: ir.Node, source: ir.Value, gate: Gate, dims: Dims) -> Gate | None:
    picked, count = ints(node.inputs[1]), dims.size(source, gate.expert or 0)
    if picked is None or len(picked) != 1 or count is None or not -count <= picked[0] < count:
        return None
    width = dims.rank(node.inputs[1])
    return None if width is None or width > 1 else _column(gate, picked[0] % count)


def _split(value: ir.Value, node: ir.Node, source: ir.Value, gate: Gate, dims: Dims) -> Gate | None:
    lengths = ints(node.inputs[1]) if len(node.inputs) > 1 and node.inputs[1] is not None else None
    count, at = dims.size(source, gate.expert or 0), value.index()
    if lengths is None and count != len(node.outputs):
        return None
    if at is None or (lengths is not None and (lengths[at] != 1 or sum(lengths) != count)):
        return None
    return _column(gate, at if lengths is None else sum(lengths[:at]))


def _column(gate: Gate, expert: int) -> Gate:
    """One expert's column. The fact stays plain: an axis of length 1, or none, takes the experts' place."""
    return dataclasses.replace(gate, expert=None, column=expert)
