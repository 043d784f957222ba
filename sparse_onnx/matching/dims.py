"""How long axes are, as far as a graph tells it: what proves that two values hold the same tokens, one by one.

A length is a product of a number and of unknowns: named dimensions, and axes of values that nothing is known of.
Lengths are followed through operators, since exporters of torch's old kind, and inference behind a computed Reshape,
leave inner shapes without names or with a new name for each; such a name is from then on known to be that product.
Where not even the number of axes is known, numbers of elements and of rows are followed.
"""

from __future__ import annotations

from collections.abc import Hashable

import onnx_ir as ir

from sparse_onnx.matching.layout import keeps_last_axis, rows_of
from sparse_onnx.matching.lengths import (
    BROADCAST,
    LIKE_FIRST,
    ONE,
    PRODUCTS,
    REDUCTIONS,
    WINDOWS,
    Known,
    Length,
    Lengths,
    broadcast,
    named,
    product,
    reshaped,
    through,
)
from sparse_onnx.matching.numbers import LONGEST, Numbers, sources
from sparse_onnx.matching.values import attribute, is_last, measured, rank, scalar, size

_RESHAPES = ("Reshape", "Squeeze", "Unsqueeze", "Flatten", "Identity")
_FILLED = ("Expand", "ConstantOfShape")
_FOLLOWED = frozenset(
    LIKE_FIRST
    | BROADCAST
    | REDUCTIONS
    | PRODUCTS
    | WINDOWS
    | {
        "TopK",
        "Transpose",
        "Gather",
        "GatherElements",
        "Slice",
        "Split",
        "Concat",
        "OneHot",
        "ArgMax",
        "ArgMin",
    }
    | {"Einsum", "Tile", "Range", *_RESHAPES, *_FILLED}
)
#: Operators that make axes of computed lengths, for which inference invents names.
_NAMED_ANEW = frozenset({"Reshape", "Flatten", "Expand", "ConstantOfShape", "Tile", *BROADCAST})


class Dims:
    """Lengths of the axes of a model's values, each computed once.

    Args:
        graph: where given, every name that inference invented in it is resolved at once.
    """

    def __init__(self, graph: ir.Graph | ir.Function | None = None) -> None:
        self._axes: dict[ir.Value, Lengths | None] = {}
        self._totals: dict[ir.Value, Length] = {}
        self._rows: dict[ir.Value, Length] = {}
        self._alias: dict[Hashable, Length] = {}
        self._numbers = Numbers(self.of, self.total)
        for node in graph or ():
            if node.domain == "" and node.op_type in _NAMED_ANEW:
                for value in node.outputs:
                    self.of(value)

    # Lengths

    def of(self, value: ir.Value | None) -> Lengths | None:
        """Of each axis; None where not even the number of axes is known."""
        work = [] if value is None else [value]
        while work:
            at = work[-1]
            waiting = [] if at in self._axes else [item for item in _needs(at) if item not in self._axes]
            if waiting:
                work.extend(waiting)
                continue
            work.pop()
            if at not in self._axes:
                self._compute(at)
        found = None if value is None else self._axes[value]
        return None if found is None else tuple(map(self._plain, found))

    def named(self, value: ir.Value) -> Known | None:
        """As the value's own shape says: numbers and names."""
        if value.shape is None:
            return None
        return tuple(
            Length(d) if isinstance(d, int) else (None if d.value is None else named(d.value))
            for d in value.shape
        )

    def total(self, value: ir.Value) -> Length:
        """Number of elements."""
        return self._counted(value, self._totals, "elements")

    def rows(self, value: ir.Value) -> Length:
        """Number of rows: the product of all axes but the last."""
        return self._counted(value, self._rows, "rows")

    def _counted(self, value: ir.Value, kept: dict[ir.Value, Length], what: str) -> Length:
        lengths = self.of(value)
        if value in kept:
            return self._plain(kept[value])
        if lengths is None:
            return Length(1, ((id(value), what),))
        return product(lengths[:-1] if what == "rows" else lengths)

    def vector(self, value: ir.Value | None) -> Lengths | None:
        """The lengths that a computed one-dimensional (or scalar) shape holds; -1 stays -1."""
        found = self._numbers.read(value)
        return None if found is None else tuple(map(self._plain, found))

    def rank(self, value: ir.Value | None) -> int | None:
        """Number of axes."""
        if value is None or value.shape is not None:
            return rank(value)
        lengths = self.of(value)
        return None if lengths is None else len(lengths)

    def size(self, value: ir.Value | None, at: int) -> int | None:
        """The length of an axis (negative counts from the end), where it is a number."""
        found = size(value, at)
        if found is not None or value is None:
            return found
        lengths = self.of(value)
        if lengths is None or not -len(lengths) <= at < len(lengths) or lengths[at].atoms:
            return None
        return lengths[at].number

    def axis(self, node: ir.Node, default: int = 0) -> int | None:
        """The attribute `axis`, counted from the front of the first input's axes."""
        found: int = attribute(node, "axis", default)
        dimensions = self.rank(node.inputs[0]) if found < 0 else 0
        return None if dimensions is None else found + dimensions

    # Questions

    def same(self, a: ir.Value, b: ir.Value) -> bool:
        """Whether both have the same shape."""
        return self.rank(a) == self.rank(b) and self.covers(a, b) and self.covers(b, a)

    def covers(self, big: ir.Value, small: ir.Value, drop: int = 0) -> bool:
        """Whether broadcasting `small` against `big` leaves the shape of `big`, but for its last `drop` axes."""
        return self._pairs(big, small, drop, ones=True)

    def same_rows(self, a: ir.Value, b: ir.Value, drop: int = 1) -> bool:
        """Whether all axes are equal but for the last `drop`."""
        return self.rank(a) == self.rank(b) and self._pairs(a, b, drop, ones=False)

    def same_last(self, a: ir.Value, b: ir.Value) -> bool:
        """Whether the last axes have equal lengths."""
        first, second = self.of(a), self.of(b)
        return bool(first and second) and first[-1:] == second[-1:]  # type: ignore[index]

    def as_many(self, a: ir.Value, per_a: int | None, b: ir.Value, per_b: int | None) -> bool:
        """Whether two values provably hold equally many units for all inputs of the graph.

        Args:
            a: a value.
            per_a: elements of a unit (``K`` for the tokens of ``[..., K]``); None: a unit is a row, however long.
            b: another one.
            per_b: as `per_a`.
        """
        for item in (a, b):  # both, before either is asked for: what is learned of one may settle the other
            self.of(item)
        first, second = self._units(a, per_a), self._units(b, per_b)
        return bool({x * Length(per_b or 1) for x in first} & {x * Length(per_a or 1) for x in second})

    def as_many_rows(self, data: ir.Value, rows: ir.Value) -> bool:
        """Whether ``data [n, D]`` has as many rows as ``rows [..., D]``, along its first axis alone."""
        lengths = self.of(data)
        if not lengths:
            return False
        two = len(lengths) == 2
        return lengths[0] in self._units(rows, None) or (two and self.as_many(data, None, rows, None))

    def learn_rows(self, value: ir.Value, each: ir.Value) -> None:
        """For a caller who has proved that `value` has one row for each element of `each`."""
        self._learn(self.rows(value), self.total(each))

    def _units(self, value: ir.Value, per: int | None) -> set[Length]:
        """Their number times `per`: by how the value was computed, by its axes, by its own shape."""
        same = (value,) if per is not None else (value, rows_of(value))
        found: set[Length] = set()
        for item in same:
            total, rows, last = self.total(item), self.rows(item), size(item, -1)
            found.add(rows if per is None else total)
            if last:
                found |= {rows * Length(last)} if per is not None else {total.over(Length(last)) or rows}
            for view in (self.of(item), self.named(item)):
                lengths = [length for length in view or () if length is not None]
                if lengths and len(lengths) == len(view or ()):
                    found.add(product(lengths[:-1] if per is None else lengths))
        return set(map(self._plain, found))

    def _pairs(self, big: ir.Value, small: ir.Value, drop: int, ones: bool) -> bool:
        self.of(big), self.of(small)
        views = ((self.named(big), self.named(small)), (self.of(big), self.of(small)))
        lengths = [(b, s) for b, s in views if b is not None and s is not None]
        if not lengths or len(lengths[0][1]) > len(lengths[0][0]):
            return False
        for at in range(1 + drop, len(lengths[0][1]) + 1):
            if not any(
                s[-at] is not None and (s[-at] == b[-at] or (ones and s[-at] == ONE)) for b, s in lengths
            ):
                return False
        return True

    # How they are computed

    def _plain(self, length: Length) -> Length:
        """In unknowns that are not known to be a product of others."""
        while any(atom in self._alias for atom in length.atoms):
            parts = [self._alias.get(atom, Length(1, (atom,))) for atom in length.atoms]
            length = Length(length.number) * product(parts)
        return length

    def _learn(self, one: Length, other: Length) -> None:
        """Both are the same length: one of a single unknown is from now on the other."""
        one, other = self._plain(one), self._plain(other)
        for unknown, length in ((one, other), (other, one)):
            if unknown.number == 1 and len(unknown.atoms) == 1 and length.atoms:
                if unknown.atoms[0] not in length.atoms:
                    self._alias[unknown.atoms[0]] = length
                return

    def _compute(self, value: ir.Value) -> None:
        node, own = value.producer(), self.named(value)
        found, total, rows = None, None, None
        if node is not None and _followed(node) and node.inputs[0] is not None:
            found = self._through(node, value)
            total, rows = self._kept(node, value, node.inputs[0])
        if own is not None and (found is None or len(found) != len(own)):
            found = (None,) * len(own)
        self._axes[value] = None
        if found is not None:
            self._axes[value] = self._settled(value, found, own, total)
        if total is not None:
            self._totals[value] = total
        if rows is not None:
            self._rows[value] = rows

    def _settled(self, value: ir.Value, found: Known, own: Known | None, total: Length | None) -> Lengths:
        result: list[Length] = []
        mine = own or (None,) * len(found)
        for at, (length, said) in enumerate(zip(found, mine, strict=True)):
            if length is not None and said is not None and length != said and not value.is_graph_output():
                self._learn(said, length)
            number = said if said is not None and not said.atoms else None
            result.append(number or length or said or Length(1, ((id(value), at),)))
        unknown = [at for at, length in enumerate(found) if length is None and result[at].atoms]
        if len(unknown) == 1 and total is not None:
            rest = product(result[: unknown[0]] + result[unknown[0] + 1 :])
            length = None if rest.atoms else total.over(rest)
            if length is not None:
                self._learn(result[unknown[0]], length)
                result[unknown[0]] = length
        return tuple(result)

    def _through(self, node: ir.Node, value: ir.Value) -> Known | None:
        source, op = node.inputs[0], node.op_type
        if value is not node.outputs[0] and op not in ("TopK", "Split"):
            return None
        if op == "ConstantOfShape":
            return self.vector(source)
        if op == "Range":
            counted = [scalar(node.inputs[0]), scalar(node.inputs[2])] == [0, 1]
            return self.vector(node.inputs[1]) if counted else None
        inputs = [None if item is None else self._axes.get(item) for item in node.inputs]
        inputs = [None if item is None else tuple(map(self._plain, item)) for item in inputs]
        if op not in ("Reshape", "Expand", "Tile"):
            taken = self.vector(node.inputs[1]) if op == "TopK" else None
            return through(node, inputs, taken[0] if taken else None)
        target, first = self.vector(node.inputs[1]), inputs[0]
        if target is None or source is None:
            return None
        if op == "Reshape":
            return reshaped(node, first, self.total(source), target)
        if first is None or any(length.number < 0 for length in target):
            return None
        if op == "Expand":
            return broadcast([first, target])
        return tuple(a * b for a, b in zip(first, target, strict=True)) if len(first) == len(target) else None

    def _kept(self, node: ir.Node, value: ir.Value, source: ir.Value) -> tuple[Length | None, Length | None]:
        """Numbers of elements and rows, where they are those of an input whatever its shape is."""
        op = node.op_type
        if op in LIKE_FIRST:
            return (self.total(source), self.rows(source)) if value is node.outputs[0] else (None, None)
        if op in _RESHAPES:
            return self.total(source), self.rows(source) if keeps_last_axis(value) else None
        if op in _FILLED:
            like = measured(node.inputs[-1])
            alone = like is not None and (op == "ConstantOfShape" or _single(source))
            return (self.total(like), self.rows(like)) if like is not None and alone else (None, None)
        if op in ("MatMul", "Gemm"):
            flat = rank(node.inputs[1]) == 2 and not attribute(node, "transA", 0)
            return None, self.rows(source) if flat else None
        if op in ("TopK", "Concat", "Split"):
            return None, self.rows(source) if is_last(node, -1 if op == "TopK" else 0) else None
        if op == "GatherElements" and node.inputs[1] is not None:
            return self.total(node.inputs[1]), self.rows(node.inputs[1])
        return None, None


def _single(value: ir.Value) -> bool:
    return value.shape is not None and all(length == 1 for length in value.shape)


def _followed(node: ir.Node) -> bool:
    known = node.op_type in _FOLLOWED and node.domain in ("", "com.microsoft") and not node.overload
    return known and bool(node.inputs)


def _needs(value: ir.Value) -> list[ir.Value]:
    """The values that `Dims` follows to this one."""
    node = value.producer()
    if node is None or not _followed(node):
        return []
    inputs = [item for item in node.inputs if item is not None]
    op = node.op_type
    if op in ("Reshape", "Expand", "ConstantOfShape", "Tile", "TopK", "Range"):
        computed = inputs[0] if op == "ConstantOfShape" else inputs[1]
        return [*([] if computed is inputs[0] else inputs[:1]), *sources(computed, LONGEST)]
    if op in LIKE_FIRST or op in WINDOWS or op in ("Squeeze", "Unsqueeze", "Slice", "OneHot"):
        return inputs[:1]
    return inputs
