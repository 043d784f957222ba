"""Sorted rows cut into one segment an expert: how often each id occurs, where its rows begin, which piece is which."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from sparse_onnx.matching.layout import flat
from sparse_onnx.matching.order import Order, constant_fill
from sparse_onnx.matching.values import (
    attribute,
    axes,
    axis,
    constant,
    ints,
    pairs,
    producer,
    rank,
    scalar,
    size,
)

#: Ends of a Slice from here on mean: up to the last row.
_FAR = 2**31 - 1
_COUNTING = frozenset(
    (
        *(ir.DataType.INT32, ir.DataType.INT64, ir.DataType.UINT32, ir.DataType.UINT64),
        *(ir.DataType.FLOAT, ir.DataType.DOUBLE),
    )
)


class Segments:
    """What values say about the rows of each expert, in one order of the slots.

    The rows of expert e are those in ``[start(e), start(e + 1))``, with ``start(e)`` the number of slots whose id is
    smaller than e. `count` and `start` answer with the e that a value is proved to stand for.
    """

    def __init__(self, order: Order, ids: ir.Value, experts: int) -> None:
        self.order, self.ids, self.experts = order, ids, experts
        self.problem = ""
        self._known: dict[tuple[str, int, int], int | bool | None] = {}

    def of(self, value: ir.Value) -> tuple[ir.Value, int] | None:
        """(rows, e) where the value is the rows of expert e."""
        node = producer(value, "Gather", "GatherND", "Slice", "Split")
        if node is None or node.inputs[0] is None:
            return None
        rows = node.inputs[0]
        if node.op_type == "Split":
            return (rows, value.index() or 0) if self._splits_all(node) else None
        if node.op_type == "Slice":
            return self._sliced(node, rows)
        if node.op_type == "Gather" and axis(node, 0) != 0:
            return None
        if node.op_type == "GatherND" and (attribute(node, "batch_dims", 0) or size(node.inputs[1], -1) != 1):
            return None
        counter = None if node.inputs[1] is None else producer(flat(node.inputs[1]), "Range")
        if counter is None or scalar(counter.inputs[2]) != 1:
            return None
        return self._between(rows, counter.inputs[0], counter.inputs[1])

    def _between(
        self, rows: ir.Value, first: ir.Value | None, last: ir.Value | None
    ) -> tuple[ir.Value, int] | None:
        begin, end = self.start(first), self.start(last)
        if begin is None or end is None:
            self.problem = (
                self.problem or "the bounds of its rows are not proved to be sums of the experts' counts"
            )
            return None
        if end != begin + 1:
            self.problem = self.problem or f"its rows are those of experts {begin} to {end - 1}"
            return None
        return rows, begin

    def _sliced(self, node: ir.Node, rows: ir.Value) -> tuple[ir.Value, int] | None:
        begin, end, along, step = [*node.inputs[1:5], None, None][:4]
        if along is not None and ints(along) != [0]:
            return None
        if step is not None and ints(step) != [1]:
            return None
        if along is None and (begin is None or size(begin, 0) != 1):
            return None
        return self._between(rows, begin, end)

    def _splits_all(self, node: ir.Node) -> bool:
        key = ("split", id(node), 0)
        if key not in self._known:
            self._known[key] = self._sizes_are_counts(node)
        return bool(self._known[key])

    def _sizes_are_counts(self, node: ir.Node) -> bool:
        sizes = node.inputs[1] if len(node.inputs) > 1 else None
        if sizes is None or axis(node, 0) != 0:
            return False
        if len(node.outputs) != self.experts:
            self.problem = self.problem or f"the rows are cut into {len(node.outputs)} pieces"
            return False
        for expert in range(self.experts):
            if self._count_in(*_pick(sizes, expert)) != expert:
                self.problem = (
                    self.problem or f"the size of piece {expert} is not proved to be the expert's count"
                )
                return False
        return True

    def start(self, value: ir.Value | None) -> int | None:
        """p where the value is the number of slots with an id smaller than p."""
        if value is None:
            return None
        number = scalar(value)
        if number is not None:
            return 0 if number == 0 else self.experts if number >= _FAR else None
        vector, index = _pick(value, 0)
        key = ("start", id(vector), index)
        if key not in self._known:
            self._known[key] = None
            self._known[key] = self._start(vector, index)
        found = self._known[key]
        return None if found is None else int(found)

    def _start(self, vector: ir.Value, index: int) -> int | None:
        known = constant(vector)
        if known is not None:
            return 0 if index < known.size and known.ravel()[index] == 0 else None
        if vector.dtype not in (None, *_COUNTING):
            return None
        node = producer(vector, "CumSum", "Add", "Sum", "Sub", "ReduceSum")
        if node is None:
            return 1 if self._count_in(vector, index) == 0 else None
        if node.op_type == "CumSum":
            if scalar(node.inputs[1]) not in (0, -1) or attribute(node, "reverse", 0) or rank(vector) != 1:
                return None
            if node.inputs[0] is None or not self._is_histogram(node.inputs[0]):
                return None
            return index if attribute(node, "exclusive", 0) else index + 1
        if node.op_type in ("Add", "Sum") and index == 0:
            for before, count in pairs(node):
                at = self.start(before)
                if at is not None and self._count_in(*_pick(count, 0)) == at:
                    return at + 1
        if node.op_type == "Sub" and index == 0 and node.inputs[1] is not None:
            at = self.start(node.inputs[0])
            if at is not None and at > 0 and self._count_in(*_pick(node.inputs[1], 0)) == at - 1:
                return at - 1
        return 1 if self._count_in(vector, index) == 0 else None

    def _count_in(self, vector: ir.Value, index: int) -> int | None:
        """e where that element is the number of slots of expert e."""
        if self._is_histogram(vector):
            return index if index < self.experts else None
        node = producer(vector, "ReduceSum", "Sub")
        if node is None or index:
            return None
        if node.op_type == "Sub":
            end, begin = self.start(node.inputs[0]), self.start(node.inputs[1])
            return begin if end is not None and begin is not None and end == begin + 1 else None
        return self._counts_one(node)

    def _counts_one(self, node: ir.Node) -> int | None:
        """ReduceSum over everything of (ids == e)."""
        found = axes(node)
        if (
            attribute(node, "noop_with_empty_axes", 0)
            if not found
            else rank(node.inputs[0]) != len(set(found))
        ):
            return None
        equal = _as_numbers(node.inputs[0])
        for value, number in pairs(equal) if equal is not None and equal.op_type == "Equal" else ():
            expert = scalar(number)
            if isinstance(expert, int | float) and self.order.same_ids(value, self.ids, self.experts):
                return int(expert) if expert == int(expert) and 0 <= expert < self.experts else None
        return None

    def _is_histogram(self, value: ir.Value) -> bool:
        value = _behind_casts(value)
        if value.dtype not in (None, *_COUNTING):
            return False
        key = ("histogram", id(value), 0)
        if key not in self._known:
            self._known[key] = self._counts_all(value)
        return bool(self._known[key])

    def _counts_all(self, value: ir.Value) -> bool:
        node = producer(value, "ScatterElements", "ScatterND", "ReduceSum", "Concat")
        if node is None:
            return False
        if node.op_type == "Concat":
            whole = size(value, 0) == self.experts and rank(value) == 1
            return whole and all(self._count_in(*_pick(value, at)) == at for at in range(self.experts))
        if node.op_type != "ReduceSum":
            data, ids, updates = node.inputs[:3]
            if attribute(node, "reduction", "none") != "add" or rank(data) != 1 or ids is None:
                return False
            return self._of_these(size(data, 0), ids) and constant_fill(data, 0) and constant_fill(updates, 1)
        found, dimensions = axes(node), rank(node.inputs[0])
        if found is None or dimensions is None:
            return False
        left = set(range(dimensions)) - {item % dimensions for item in found}
        hot = _as_numbers(node.inputs[0])
        return hot is not None and len(left) == 1 and self._hot(hot, left.pop(), dimensions)

    def _hot(self, node: ir.Node, classes: int, dimensions: int) -> bool:
        """Whether the node is 1 where a slot's id is the index on the axis `classes`, else 0."""
        if node.op_type == "OneHot":
            ids, depth, values = node.inputs[:3]
            off_on = constant(values)
            along = attribute(node, "axis", -1) % dimensions
            if ids is None or along != classes or off_on is None or off_on.ravel().tolist() != [0, 1]:
                return False
            return self._of_these(scalar(depth), ids)
        if node.op_type == "Equal":
            for ids, numbers in pairs(node):
                table = constant(numbers)
                behind = dimensions - 1 - classes
                if (
                    table is None
                    or table.ndim <= behind
                    or rank(ids) != dimensions
                    or size(ids, classes) != 1
                ):
                    continue
                bins = table.shape[table.ndim - 1 - behind]
                if table.size == bins and np.array_equal(table.ravel(), np.arange(bins)):
                    return self._of_these(bins, ids)
            return False
        return node.op_type == "ScatterElements" and self._scattered(node, classes, dimensions)

    def _scattered(self, node: ir.Node, classes: int, dimensions: int) -> bool:
        """Ones at the ids of each token: they count right where a token's ids differ, as those of a TopK do."""
        data, ids, updates = node.inputs[:3]
        if attribute(node, "reduction", "none") != "none" or dimensions != 2 or classes != 1:
            return False
        if (
            axis(node, 0) not in (1, -1)
            or data is None
            or not constant_fill(data, 0)
            or not constant_fill(updates, 1)
        ):
            return False
        top = producer(ids, "TopK")
        if top is None or ids is not self.ids or ids is not top.outputs[1] or axis(top, -1) != 1:
            return False
        bins = size(data, 1)
        return self._of_these(size(node.outputs[0], 1) if bins is None else bins, ids)

    def _of_these(self, bins: int | None, ids: ir.Value) -> bool:
        if bins != self.experts:
            self.problem = self.problem or f"the ids are counted in {bins or 'an unknown number of'} bins"
            return False
        if not self.order.same_ids(ids, self.ids, self.experts):
            self.problem = (
                self.problem or f"what is counted, '{ids.name}', is not proved to be the ids that are sorted"
            )
            return False
        return True


def _behind_casts(value: ir.Value) -> ir.Value:
    """Casts between types that hold every number of slots; float16 rounds them from 2049 on."""
    value = flat(value)
    while (node := producer(value, "Cast")) is not None and node.inputs[0] is not None:
        target = ir.DataType(attribute(node, "to"))
        if target not in _COUNTING:
            break
        value = flat(node.inputs[0])
    return value


def _as_numbers(value: ir.Value | None) -> ir.Node | None:
    """The operator behind casts, and behind a choice of 1 and 0."""
    node = producer(value)
    while node is not None:
        chooses = node.op_type == "Where" and [scalar(item) for item in node.inputs[1:3]] == [1, 0]
        if not chooses and node.op_type not in ("Cast", "Identity"):
            break
        node = producer(node.inputs[0])
    return node


def _pick(value: ir.Value, index: int) -> tuple[ir.Value, int]:
    """(vector, i): the element of a computed vector that element `index` of the value is."""
    while True:
        value = _behind_casts(value)
        step = _picked(value, index)
        if step is None:
            return value, index
        value, index = step


def _picked(value: ir.Value, index: int) -> tuple[ir.Value, int] | None:
    node = producer(value, "Concat", "Slice", "Gather", "Split", "Pad")
    if node is None or node.inputs[0] is None:
        return None
    source = node.inputs[0]
    if node.op_type == "Concat":
        for part in node.inputs:
            length = size(part, 0)
            if part is None or length is None or rank(part) != 1:
                return None
            if index < length:
                return part, index
            index -= length
        return None
    if rank(source) != 1:
        return None
    length = size(source, 0)
    if node.op_type == "Gather":
        picked = ints(node.inputs[1])
        return _within(source, picked[index], length) if picked is not None and index < len(picked) else None
    if node.op_type == "Slice":
        bounds = [ints(item) if item is not None else None for item in node.inputs[1:5]] + [None, None]
        begin, step = bounds[0], bounds[3]
        first = _within(source, begin[0], length) if begin and step in (None, [1]) else None
        return None if first is None else (source, first[1] + index)
    if length is None:
        return None
    if node.op_type == "Split":
        sizes = node.inputs[1] if len(node.inputs) > 1 else None
        at, pieces = value.index() or 0, len(node.outputs)
        if sizes is None:
            return (source, at * (length // pieces) + index) if length % pieces == 0 else None
        lengths = ints(sizes)
        return (source, sum(lengths[:at]) + index) if lengths is not None else None
    pads = ints(node.inputs[1])
    if pads is None or len(pads) != 2 or min(pads) < 0 or not pads[0] <= index < pads[0] + length:
        return None
    return (source, index - pads[0]) if attribute(node, "mode", "constant") == "constant" else None


def _within(source: ir.Value, index: int, length: int | None) -> tuple[ir.Value, int] | None:
    """Element `index` of a vector; one counted from its end only where its length is known."""
    if index < 0:
        return None if length is None or index < -length else (source, index + length)
    return source, index
