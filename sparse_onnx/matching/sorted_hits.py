"""The slots of an expert as a piece of all slots sorted by expert: ``order[start[e] : start[e + 1]]``.

Or of the tokens of these. A piece is a Slice, an output of a Split, or a Gather by a Range.
"""

from __future__ import annotations

import dataclasses

import onnx_ir as ir

from sparse_onnx.matching.choice import Choices, Index
from sparse_onnx.matching.dims import Dims
from sparse_onnx.matching.integers import quotient
from sparse_onnx.matching.order import Order, order_of
from sparse_onnx.matching.segments import Segments
from sparse_onnx.matching.values import producer, rank

#: Steps of arithmetic from a permutation to the tokens of its slots.
_DEPTH = 16


@dataclasses.dataclass(frozen=True)
class Piece:
    """Slots of an expert in the order of a sort; `kind`: ``s`` the slots themselves, ``T`` their tokens."""

    index: Index
    expert: int
    sort: ir.Node
    kind: str


class Pieces:
    """Reads pieces of one graph's sorts."""

    def __init__(self, choices: Choices, dims: Dims) -> None:
        self.choices, self.dims = choices, dims
        self._sorts: dict[ir.Node, tuple[Order, Index, Segments] | None] = {}
        self._slots: dict[ir.Value, int | None] = {}

    def read(self, value: ir.Value) -> Piece | None:
        node = producer(value, "Slice", "Split", "Gather")
        rows = None if node is None else node.inputs[0]
        if rows is None or rank(rows) != 1 or rank(value) != 1:
            return None
        sort = _sort(rows)
        found = None if sort is None else self._known(sort)
        if found is None:
            return None
        order, index, segments = found
        if rows not in self._slots:
            self._slots[rows] = quotient(rows, order.permutation)
        slots = self._slots[rows]
        if slots is None or slots not in (1, index.top_k):
            return None
        piece = segments.of(value)
        if piece is None or piece[0] is not rows:
            return None
        return Piece(index, piece[1], order.node, "T" if slots == index.top_k else "s")

    def _known(self, sort: ir.Node) -> tuple[Order, Index, Segments] | None:
        if sort not in self._sorts:
            self._sorts[sort] = self._read(sort)
        return self._sorts[sort]

    def _read(self, sort: ir.Node) -> tuple[Order, Index, Segments] | None:
        order = order_of(sort, self.dims)
        chosen = None if order is None else self.choices.shaped(order.keys)
        if order is None or not order.told or chosen is None:
            return None
        index, labels = chosen
        one_each = index.top_k == 1 and all(label in ("T", "1") for label in labels)
        if index.experts is None or index.top_k is None or not (labels == ("s",) or one_each):
            return None
        ids = order.ids(index.experts)
        return None if ids is None else (order, index, Segments(order, ids, index.experts))


def _sort(rows: ir.Value) -> ir.Node | None:
    """The TopK whose permutation the values are computed from."""
    at: ir.Value | None = rows
    for _ in range(_DEPTH):
        node = None if at is None else at.producer()
        if node is None or node.domain or not node.inputs:
            return None
        if node.op_type == "TopK":
            return node if at is node.outputs[1] else None
        at = node.inputs[0]
    return None
