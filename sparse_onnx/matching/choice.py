"""Which expert each slot of a routing chose: 0/1 values that compare expert indices with an expert's number."""

from __future__ import annotations

import dataclasses

import numpy as np
import onnx_ir as ir

from sparse_onnx.matching.labels import MOVES, Labels, moved, picked
from sparse_onnx.matching.values import (
    attribute,
    axes,
    constant,
    ints,
    is_last,
    pairs,
    producer,
    rank,
    scalar,
    size,
)

_COMPARISONS = frozenset(
    [
        "Equal",
        "Greater",
        "GreaterOrEqual",
        "Less",
        "LessOrEqual",
        "Not",
        "And",
        "Or",
        "Xor",
        "Where",
        "ReduceMax",
    ]
)


@dataclasses.dataclass(frozen=True)
class Index:
    """Expert indices as their router computes them.

    Attributes:
        value: ``[..., K]``, or ``[...]`` where each token has just one expert and the axis K is left out.
        labels: ``t0, t1, ..`` for the tokens' axes (``T`` if there is one only), then ``k``; a K of 1 is ``1``.
        top_k: K; None where the graph does not tell it.
        experts: E by the axis over which the router chose; None where it does not say.
        distinct: whether a token's experts are proved to be different ones.
        column: (indices of all slots, number of the slot) where these are those of one slot of each token.
    """

    value: ir.Value
    labels: Labels
    top_k: int | None
    experts: int | None
    distinct: bool
    column: tuple[ir.Value, int] | None = None


@dataclasses.dataclass(frozen=True)
class Grid:
    """A 0/1 value, element by element: whether a slot of `index` chose an expert.

    Attributes:
        index: the indices.
        labels: of the value's axes: those of `Index`, ``T`` for all tokens flattened, ``s`` for all slots, ``S`` for
            all slots with the tokens as the faster axis, ``e`` for the experts in `experts`, ``d<n>`` for an axis of n
            along which it is repeated.
        experts: the experts' numbers along ``e``; just one where there is no such axis.
        summed: ``k`` was reduced: whether (or how often) the token chose the expert in any slot.
    """

    index: Index
    labels: Labels
    experts: tuple[int, ...]
    summed: bool = False


def merge(labels: Labels) -> str | None:
    """The name of several axes of indices flattened into one, in this order."""
    slot = [label for label in labels if label == "k"]
    tokens = tuple(label for label in labels if label != "k")
    if tokens == ("T",) or tokens == tuple(f"t{at}" for at in range(len(tokens))):
        if not slot:
            return "T"
        if labels[-1] == "k":
            return "s"
        return "S" if labels[0] == "k" and len(slot) == 1 else None
    return None


class Choices:
    """Reads indices and grids of one graph; remembers what it read."""

    def __init__(self) -> None:
        self._indices: dict[ir.Value, Index | None] = {}
        self._shaped: dict[ir.Value, tuple[Index, Labels] | None] = {}
        self._grids: dict[ir.Value, Grid | None] = {}

    def index(self, value: ir.Value) -> Index | None:
        """Indices that nothing but their router computes."""
        if value not in self._indices:
            self._indices[value] = _index(value)
        return self._indices[value]

    def shaped(self, value: ir.Value) -> tuple[Index, Labels] | None:
        """Indices behind casts, reshapes and transposes, and what the value's axes stand for."""
        if value not in self._shaped:
            self._shaped[value] = self._read(value)
        return self._shaped[value]

    def _read(self, value: ir.Value) -> tuple[Index, Labels] | None:
        node = producer(value, *MOVES)
        if node is not None and node.inputs[0] is not None:
            if node.op_type == "Cast" and not _holds_indices(attribute(node, "to")):
                return None
            below = self.shaped(node.inputs[0])
            labels = None if below is None else moved(value, below[1], merge)
            if below is not None and labels is not None:
                return below[0], labels
        found = self.index(value)
        return None if found is None else (found, found.labels)

    def grid(self, value: ir.Value) -> Grid | None:
        """The value as a 0/1 value over slots and experts."""
        if value not in self._grids:
            self._grids[value] = self._grid(value)
        return self._grids[value]

    def about(self, value: ir.Value | None) -> bool:
        """Whether the value is made of comparisons of what TopK or ArgMax chose with something."""
        work = [(value, 0)]
        while work:
            item, depth = work.pop()
            node = None if item is None or depth > 6 else item.producer()
            if item is None or node is None:
                continue
            if depth and (found := self.shaped(item)) is not None and found[0].experts is not None:
                return True
            if node.op_type in _COMPARISONS or node.op_type in MOVES:
                work += [(source, depth + 1) for source in node.inputs]
        return False

    def _grid(self, value: ir.Value) -> Grid | None:
        node = producer(value)
        if node is None or not node.inputs or node.inputs[0] is None:
            return None
        kind = node.op_type
        if kind == "Equal":
            return self._compared(node)
        if kind == "OneHot":
            return self._one_hot(node)
        if kind == "Where":
            chosen = self.grid(node.inputs[0])
            return chosen if [scalar(item) for item in node.inputs[1:]] in ([1, 0], [True, False]) else None
        if kind in ("Greater", "GreaterOrEqual", "Not", "Less", "LessOrEqual"):
            return self._tested(node)
        source = self.grid(node.inputs[0])
        if source is None:
            return None
        if kind in MOVES:
            labels = moved(value, source.labels, merge)
            return None if labels is None else dataclasses.replace(source, labels=labels)
        if kind in ("ReduceMax", "ReduceSum"):
            return _reduced(node, source)
        if kind == "Expand":
            return _widened(value, source)
        return _column(value, source)

    def _compared(self, node: ir.Node) -> Grid | None:
        """``Equal(indices, e)`` or ``Equal(indices[..., None], 0..E-1)``; of a grid, ``Equal(grid, 1)``."""
        for a, b in pairs(node):
            numbers = constant(b)
            if numbers is None or numbers.dtype.kind not in "iufb":
                numbers = _counted(b)
            if numbers is None:
                continue
            grid = self.grid(a) if numbers.size == 1 and numbers.reshape(()) == 1 else None
            if grid is not None and (not grid.summed or grid.index.distinct):
                return grid
            found = self.shaped(a)
            if found is None:
                continue
            index, labels = found
            if any(float(item) != int(item) for item in numbers.ravel()):
                return None
            experts = tuple(int(item) for item in numbers.ravel())
            width = max(len(labels), numbers.ndim)
            labels = ("1",) * (width - len(labels)) + labels
            lengths = (1,) * (width - numbers.ndim) + numbers.shape
            long = [at for at, length in enumerate(lengths) if length != 1]
            if not long:
                return Grid(index, labels, experts)
            if len(long) == 1 and labels[long[0]] == "1":
                return Grid(index, (*labels[: long[0]], "e", *labels[long[0] + 1 :]), experts)
            return None
        return None

    def _one_hot(self, node: ir.Node) -> Grid | None:
        found = self.shaped(node.inputs[0]) if node.inputs[0] is not None else None
        depth, values = scalar(node.inputs[1]), constant(node.inputs[2])
        if found is None or depth is None or values is None or values.tolist() not in ([0, 1], [False, True]):
            return None
        index, labels = found
        if index.experts is None:
            return None  # OneHot counts negative indices from the end
        at = attribute(node, "axis", -1)
        at = at + len(labels) + 1 if at < 0 else at
        return Grid(index, (*labels[:at], "e", *labels[at:]), tuple(range(int(depth))))

    def _tested(self, node: ir.Node) -> Grid | None:
        """Comparisons that leave a 0/1 value (or a count) what it was."""
        if node.op_type == "Not":
            inner = producer(node.inputs[0], "Equal")
            for a, b in pairs(inner) if inner is not None else ():
                if scalar(b) == 0:
                    return self.grid(a)
            return None
        value, limit = node.inputs
        if node.op_type.startswith("Less"):
            value, limit = limit, value
        bound = scalar(limit)
        if value is None or bound is None:
            return None
        strict = not node.op_type.endswith("OrEqual")
        return self.grid(value) if (0 <= bound < 1 if strict else 0 < bound <= 1) else None


def _holds_indices(dtype: int) -> bool:
    return dtype in (ir.DataType.INT32, ir.DataType.INT64, ir.DataType.FLOAT, ir.DataType.DOUBLE)


def _index(value: ir.Value) -> Index | None:
    """By TopK and ArgMax over the last axis, and one slot of these; of anything else, only what its shape tells."""
    column = _slot(value)
    if column is not None:
        return column
    node = producer(value, "TopK", "ArgMax")
    if node is not None and node.op_type == "TopK" and value.index() == 1 and is_last(node):
        wanted = scalar(node.inputs[1])
        dimensions = rank(value) or rank(node.inputs[0])
        if dimensions is None:
            return None
        top_k = wanted if wanted is not None else size(value, -1)
        return Index(value, _labels(dimensions, True, top_k), top_k, size(node.inputs[0], -1), True)
    if node is not None and node.op_type == "ArgMax" and is_last(node, 0):
        keeps = bool(attribute(node, "keepdims", 1))
        dimensions = rank(node.inputs[0])
        if dimensions is None or (dimensions == 1 and not keeps):
            return None
        labels = _labels(dimensions if keeps else dimensions - 1, keeps, 1)
        return Index(value, labels, 1, size(node.inputs[0], -1), True)
    dimensions = rank(value)
    whole = value.dtype in (ir.DataType.INT32, ir.DataType.INT64)
    if not dimensions or not whole or constant(value) is not None:
        return None
    top_k = size(value, -1) if dimensions > 1 else None  # slots are counted: an open axis holds tokens
    labels = _labels(dimensions, top_k is not None, top_k)
    return Index(value, labels, 1 if top_k is None else top_k, _joined(value), top_k in (None, 1))


def _slot(value: ir.Value) -> Index | None:
    """``index[..., k]``."""
    node = producer(value, "Gather", "Slice", "Split")
    source = None if node is None or node.inputs[0] is None else _index(node.inputs[0])
    if source is None or source.experts is None:
        return None
    last = len(source.labels) - 1
    found = picked(value, lambda axis: source.top_k if axis == last else None, len(source.labels))
    one = found is not None and found.axis == last and len(found.indices) == 1 and source.labels[last] == "k"
    if found is None or not one or found.indices[0] >= (source.top_k or 0):
        return None
    labels = (*source.labels[:last], "1") if found.keeps else source.labels[:last]
    return Index(value, labels, 1, source.experts, True, (found.source, found.indices[0]))


def _joined(value: ir.Value) -> int | None:
    """E of several choices that are put side by side, all of the same number of experts."""
    node = producer(value, "Concat")
    found: set[int | None] = set()
    for item in () if node is None else node.inputs:
        while (below := producer(item, *MOVES)) is not None and below.inputs[0] is not None:
            if below.op_type == "Cast" and not _holds_indices(attribute(below, "to")):
                return None
            item = below.inputs[0]
        index = None if item is None else _index(item)
        found.add(None if index is None else index.experts)
    return found.pop() if len(found) == 1 else None


def _labels(dimensions: int, has_slots: bool, top_k: int | None) -> Labels:
    tokens = dimensions - has_slots
    names = ("T",) if tokens == 1 else tuple(f"t{at}" for at in range(tokens))
    return (*names, "1" if top_k == 1 else "k") if has_slots else names


def _counted(value: ir.Value) -> np.ndarray | None:
    """``Range(0, E)`` of constants."""
    node = producer(value, "Range")
    bounds = [] if node is None else [ints(item) for item in node.inputs]
    numbers = [item[0] for item in bounds if item is not None and len(item) == 1]
    return np.arange(*numbers) if len(numbers) == 3 and abs(numbers[1]) <= 4096 else None


def _reduced(node: ir.Node, source: Grid) -> Grid | None:
    found = axes(node)
    if found is None:
        return None
    gone = {at % len(source.labels) for at in found}
    if any(source.labels[at] not in ("k", "1") for at in gone):
        return None
    keeps = bool(attribute(node, "keepdims", 1))
    labels = tuple(
        "1" if at in gone else label for at, label in enumerate(source.labels) if keeps or at not in gone
    )
    summed = source.summed or any(source.labels[at] == "k" for at in gone)
    return dataclasses.replace(source, labels=labels, summed=summed)


def _widened(value: ir.Value, source: Grid) -> Grid | None:
    """``[..., 1]`` repeated along a last axis of features."""
    features = size(value, -1)
    if source.labels[-1:] != ("1",) or "1" in source.labels[:-1] or rank(value) != len(source.labels):
        return None
    return (
        None
        if features is None
        else dataclasses.replace(source, labels=(*source.labels[:-1], f"d{features}"))
    )


def _column(value: ir.Value, source: Grid) -> Grid | None:
    """One or some experts of a one-hot axis."""
    if "e" not in source.labels:
        return None
    at = source.labels.index("e")
    found = picked(value, lambda axis: len(source.experts) if axis == at else None, len(source.labels))
    if found is None or found.axis != at or any(item >= len(source.experts) for item in found.indices):
        return None
    experts = tuple(source.experts[item] for item in found.indices)
    if not found.keeps:
        return dataclasses.replace(
            source, labels=source.labels[:at] + source.labels[at + 1 :], experts=experts
        )
    label = "1" if len(experts) == 1 else "e"
    return dataclasses.replace(
        source, labels=(*source.labels[:at], label, *source.labels[at + 1 :]), experts=experts
    )
