"""The slots that chose one expert: NonZero of a mask, its coordinates, and what is gathered by them.

`torch.where(mask)` in a graph is NonZero, then any of Transpose, Split, Slice, Gather, Squeeze and Concat. Coordinates
are followed by what each axis of a value stands for, so all of these read alike.
"""

from __future__ import annotations

import dataclasses

import onnx_ir as ir

from sparse_onnx.matching.choice import Choices, Grid, Index, merge
from sparse_onnx.matching.dims import Dims
from sparse_onnx.matching.labels import MOVES, Labels, moved, picked, tiled
from sparse_onnx.matching.layout import repeated
from sparse_onnx.matching.lengths import ONE
from sparse_onnx.matching.sorted_hits import Pieces
from sparse_onnx.matching.values import attribute, measured, producer, rank, scalar


@dataclasses.dataclass(frozen=True)
class Hits:
    """Slots that chose an expert, in a fixed order.

    Attributes:
        index: expert indices.
        expert: its number.
        order: ``s``: by token, then slot; ``S``: by slot, then token; ``T``: by token, one hit for each that chose it;
            ``o``: as `sort` left them.
        wide: each hit is listed once for every feature.
        sort: the TopK of all slots that they are a piece of.
    """

    index: Index
    expert: int
    order: str
    wide: bool = False
    sort: ir.Node | None = None


@dataclasses.dataclass(frozen=True)
class Coordinates:
    """Integers that say where hits are.

    Attributes:
        hits: None where they do not depend on any (a counter of features).
        kinds: along the axis ``c``, or the single one where there is none: ``T`` token, ``t0, t1, ..`` parts of one,
            ``k`` slot of a token, ``s`` slot of all (``T K + k``), ``d<n>`` feature of n, ``0`` zero, ``T*<n>``.
        labels: ``n`` hits, ``c`` coordinates, ``d`` features, ``1``; ``*`` an axis along which nothing changes, and
            ``N`` hits of which a single one may have been repeated.
    """

    hits: Hits | None
    kinds: tuple[str, ...]
    labels: Labels


@dataclasses.dataclass(frozen=True)
class Rows:
    """What was gathered at hits.

    Attributes:
        hits: which.
        data: where from.
        kinds: by which coordinates of it.
        labels: of the result's axes: ``n``, ``d`` the last axis of `data`, ``1``.
    """

    hits: Hits
    data: ir.Value
    kinds: tuple[str, ...]
    labels: Labels


def _flat(labels: Labels) -> str | None:
    return None


class HitReader:
    """Reads hits, coordinates and gathered rows of one graph; remembers what it read."""

    def __init__(self, choices: Choices, dims: Dims) -> None:
        self.choices, self.dims = choices, dims
        self._pieces = Pieces(choices, dims)
        self._coordinates: dict[ir.Value, Coordinates | None] = {}
        self._rows: dict[ir.Value, Rows | None] = {}

    def hits(self, node: ir.Node) -> tuple[Hits, Grid] | None:
        """Of a NonZero."""
        grid = self.choices.grid(node.inputs[0]) if node.inputs and node.inputs[0] is not None else None
        if grid is None or "e" in grid.labels or len(grid.experts) != 1:
            return None
        long = tuple(label for label in grid.labels if label != "1")
        wide = bool(long) and long[-1].startswith("d")
        if wide and not self._same_rows(node.inputs[0]):
            return None
        places = long[:-1] if wide else long
        order = places[0] if len(places) == 1 else merge(places)
        if order not in ("s", "S", "T"):
            return None
        return Hits(grid.index, grid.experts[0], order, wide), grid

    def _same_rows(self, mask: ir.Value | None) -> bool:
        """Whether a mask that was repeated for each feature has kept its other axes."""
        node = producer(mask, "Expand")
        before = self.dims.of(node.inputs[0]) if node is not None else None
        after = self.dims.of(mask)
        return before is not None and after is not None and before[:-1] == after[:-1]

    def coordinates(self, value: ir.Value | None) -> Coordinates | None:
        """The value as coordinates of hits."""
        if value is None:
            return None
        if value not in self._coordinates:
            self._coordinates[value] = None
            found = self._place(value)
            if found is not None and len(found.kinds) == 1 and "c" in found.labels:
                labels = tuple("1" if label == "c" else label for label in found.labels)
                found = dataclasses.replace(found, labels=labels)
            self._coordinates[value] = found
        return self._coordinates[value]

    def _place(self, value: ir.Value) -> Coordinates | None:
        node = producer(value)
        if node is None or not node.inputs or node.inputs[0] is None:
            return None
        kind = node.op_type
        if kind == "NonZero":
            found = self.hits(node)
            if found is None:
                return None
            hits, grid = found
            kinds = tuple("0" if label == "1" else label for label in grid.labels)
            return Coordinates(hits, kinds, ("c", "n"))
        if kind == "Range":
            return self._counter(node)
        if kind == "Concat":
            return self._joined(node)
        if kind in ("Add", "Mul", "Div", "Mod"):
            return self._computed(node)
        piece = self._pieces.read(value)
        if piece is not None:
            return Coordinates(Hits(piece.index, piece.expert, "o", sort=piece.sort), (piece.kind,), ("n",))
        source = self.coordinates(node.inputs[0])
        if source is None:
            return None
        if kind in MOVES:
            if kind == "Cast" and attribute(node, "to") not in (ir.DataType.INT32, ir.DataType.INT64):
                return None
            labels = moved(value, source.labels, _flat)
            return None if labels is None else dataclasses.replace(source, labels=labels)
        if kind in ("Max", "Min", "Sum") and len(node.inputs) == 1:
            return source
        if kind == "Expand":
            return self._expanded(value, node, source)
        if kind == "Tile":
            labels = tiled(node, source.labels)
            return None if labels is None else dataclasses.replace(source, labels=labels)
        return _part(value, source)

    def _counter(self, node: ir.Node) -> Coordinates | None:
        """``Range(0, D)``: the number of each feature."""
        limit = self.dims.vector(node.inputs[1])
        if scalar(node.inputs[0]) != 0 or scalar(node.inputs[2]) != 1 or not limit or limit[0].atoms:
            return None
        return Coordinates(None, (f"d{limit[0].number}",), ("d",))

    def _expanded(self, value: ir.Value, node: ir.Node, source: Coordinates) -> Coordinates | None:
        model = self.coordinates(measured(node.inputs[1]))
        if model is not None and (model.hits, model.labels) == (source.hits, source.labels):
            return source
        dimensions = rank(value)
        wanted = self.dims.vector(node.inputs[1])
        if wanted is not None:
            dimensions = max(len(wanted), len(source.labels))
        if dimensions is None:  # of a rank that the scatter's data decide
            dimensions = len(source.labels)
        if dimensions < len(source.labels):
            return None
        labels = ("*",) * (dimensions - len(source.labels)) + source.labels
        wanted = None if wanted is None else (ONE,) * (dimensions - len(wanted)) + wanted
        result = []
        for at, label in enumerate(labels):
            same = wanted is not None and wanted[at] == ONE
            result.append({"1": label if same else "*", "n": label if same else "N"}.get(label, label))
        return dataclasses.replace(source, labels=tuple(result))

    def _joined(self, node: ir.Node) -> Coordinates | None:
        """Concat of coordinates along their own axis."""
        parts = [self.coordinates(item) for item in node.inputs]
        if any(part is None for part in parts):
            return None
        found = [part for part in parts if part is not None]
        width = len(found[0].labels)
        at = attribute(node, "axis", 0)
        at = at + width if at < 0 else at
        if any(len(part.labels) != width or part.labels[at] not in ("1", "c") for part in found):
            return None
        hits = {part.hits for part in found} - {None}
        if len(hits) > 1:
            return None
        labels = []
        for axis, column in enumerate(zip(*(part.labels for part in found), strict=True)):
            names = set(column) - {"*"}
            if axis == at:
                labels.append("c")
            elif names == {"n", "N"}:
                labels.append("n")
            elif len(names) == 1:
                labels.append(names.pop())
            else:
                return None
        kinds = tuple(kind for part in found for kind in part.kinds)
        return Coordinates(next(iter(hits), None), kinds, tuple(labels))

    def _computed(self, node: ir.Node) -> Coordinates | None:
        """``token * K + slot``, and back."""
        for a, b in ((0, 1), (1, 0)):
            left = self.coordinates(node.inputs[a])
            if left is None or left.hits is None or len(left.kinds) != 1:
                continue
            kind, top_k = left.kinds[0], left.hits.index.top_k
            other = self.coordinates(node.inputs[b])
            if other is not None:
                if node.op_type != "Add" or other.hits != left.hits or other.labels != left.labels:
                    return None
                if top_k == 1 and other.kinds == ("0",):
                    return left
                if top_k is not None and kind == f"T*{top_k}" and other.kinds == ("k",):
                    return dataclasses.replace(left, kinds=("s",))
                continue
            number = self.dims.vector(node.inputs[b])
            if number is None or len(number) != 1 or number[0].atoms:
                return None
            factor = number[0].number
            if node.op_type == "Mul" and kind == "T":
                return dataclasses.replace(left, kinds=(f"T*{factor}" if factor != 1 else "T",))
            if a == 0 and kind == "s" and factor == top_k and node.op_type in ("Div", "Mod"):
                return dataclasses.replace(left, kinds=("T" if node.op_type == "Div" else "k",))
            return None
        return None

    def rows(self, value: ir.Value | None) -> Rows | None:
        """The value as what was gathered at hits."""
        if value is None:
            return None
        if value not in self._rows:
            self._rows[value] = None
            self._rows[value] = self._gathered(value)
        return self._rows[value]

    def _gathered(self, value: ir.Value) -> Rows | None:
        node = producer(value)
        if node is None or not node.inputs or node.inputs[0] is None:
            return None
        if node.op_type in MOVES:
            source = self.rows(node.inputs[0])
            if source is None or (node.op_type == "Cast" and node.inputs[0].dtype != value.dtype):
                return None
            labels = moved(value, source.labels, _flat)
            return None if labels is None else dataclasses.replace(source, labels=labels)
        if node.op_type not in ("Gather", "GatherND") or len(node.inputs) < 2:
            return None
        place = self.coordinates(node.inputs[1])
        data = self._axes(node.inputs[0])
        if place is None or place.hits is None or data is None or place.hits.wide:
            return None
        if node.op_type == "Gather":
            at = attribute(node, "axis", 0)
            at = at + len(data) if at < 0 else at
            if len(place.kinds) != 1 or not 0 <= at < len(data) or "c" in place.labels:
                return None
            if any(label == "?" for label in (*data[:at], *data[at + 1 :])):
                return None
            labels = (*data[:at], *place.labels, *data[at + 1 :])
            return Rows(place.hits, node.inputs[0], place.kinds, labels)
        if attribute(node, "batch_dims", 0) != 0 or not place.labels:
            return None
        if place.labels[-1] not in ("c", "1") or (place.labels[-1] == "1" and len(place.kinds) != 1):
            return None
        rest = data[len(place.kinds) :]
        if len(place.kinds) > len(data) or "?" in rest:
            return None
        return Rows(place.hits, node.inputs[0], place.kinds, (*place.labels[:-1], *rest))

    def _axes(self, data: ir.Value) -> Labels | None:
        """Axes of gathered data: ``d`` the last, ``1``, and ``?`` for what has to be gathered along."""
        sizes = self.dims.of(data)
        if not sizes:
            return None
        labels = ["1" if length == ONE else "?" for length in sizes]
        if labels[-1] == "?":
            labels[-1] = "d"
        return tuple(labels)

    def along(self, rows: Rows) -> tuple[ir.Value, str] | None:
        """The data as a list of rows, and whether hits were picked by ``T`` token, ``k`` or ``s``.

        Rows that repeat each token for its slots are the tokens', picked by slot.
        """
        sizes = self.dims.of(rows.data)
        kinds = tuple(kind for kind in rows.kinds if kind != "0")
        if sizes is None or len(kinds) == 0:
            return None
        long = [length for length in sizes[:-1] if length != ONE]
        if len(kinds) == 1:
            if len(long) > 1:
                return None
            if kinds[0] == "s":
                again = repeated(rows.data)
                if again is not None and again[1] == rows.hits.index.top_k:
                    return again[0], "T"
            return rows.data, kinds[0]
        tokens = tuple(f"t{at}" for at in range(len(kinds)))
        wanted = self.dims.of(rows.hits.index.value)
        if kinds != tokens or wanted is None or len(sizes) <= len(kinds):
            return None
        if (
            any(length != ONE for length in sizes[len(kinds) : -1])
            or wanted[1 : len(kinds)] != sizes[1 : len(kinds)]
        ):
            return None
        return rows.data, "T"


def _part(value: ir.Value, source: Coordinates) -> Coordinates | None:
    """Some of the coordinates; the others are gone."""
    if "c" in source.labels:
        at = source.labels.index("c")
    elif len(source.kinds) == 1 and "1" in source.labels:
        at = -1
    else:
        return None
    lengths = [1 if label == "1" else None for label in source.labels]
    if at >= 0:
        lengths[at] = len(source.kinds)
    found = picked(value, lambda axis: lengths[axis], len(source.labels))
    if found is None or lengths[found.axis] is None:
        return None
    if found.axis != at:
        if found.indices != (0,):
            return None
        kinds = source.kinds
    else:
        kinds = tuple(source.kinds[item] for item in found.indices if item < len(source.kinds))
        if len(kinds) != len(found.indices):
            return None
    labels = source.labels if found.keeps else source.labels[: found.axis] + source.labels[found.axis + 1 :]
    return dataclasses.replace(source, kinds=kinds, labels=labels)
