"""Computed shapes: what integers a value holds, as lengths."""

from __future__ import annotations

from collections.abc import Callable

import onnx_ir as ir

from sparse_onnx.matching.lengths import ONE, Length, Lengths, product
from sparse_onnx.matching.values import attribute, axes, ints, producer, rank

#: Nodes of the longest computation of a shape that is followed.
LONGEST = 40
#: Numbers of the longest shape.
_WIDEST = 64
_INTEGERS = (ir.DataType.INT64, ir.DataType.INT32)
_SAME = ("Squeeze", "Unsqueeze", "Cast", "Identity", "Reshape")


class Numbers:
    """Reads computed shapes.

    Args:
        axes: lengths of a value's axes.
        total: its number of elements.
    """

    def __init__(
        self, axes: Callable[[ir.Value], Lengths | None], total: Callable[[ir.Value], Length]
    ) -> None:
        self._axes, self._total = axes, total
        self._known: dict[ir.Value, Lengths | None] = {}

    def read(self, value: ir.Value | None, left: int = LONGEST) -> Lengths | None:
        """The integers in a value of one axis at most; -1 stays -1."""
        if value is None:
            return None
        if value not in self._known:
            found = self._read(value, left)
            if found is None and left < LONGEST:
                return None  # which may be for its length alone
            self._known[value] = found
        return self._known[value]

    def _read(self, value: ir.Value, left: int) -> Lengths | None:
        constants = ints(value)
        if constants is not None:
            return tuple(map(Length, constants)) if len(constants) <= _WIDEST else None
        node = producer(value)
        if node is None or left == 0 or not node.inputs or node.inputs[0] is None:
            return None
        source, kind = node.inputs[0], node.op_type
        if (rank(value) or 0) > 1 or (kind == "Cast" and attribute(node, "to") not in _INTEGERS):
            return None
        if kind == "Shape":
            lengths = self._axes(source)
            start, end = attribute(node, "start", 0), attribute(node, "end", None)
            return None if lengths is None else lengths[start:end]
        if kind == "Size":
            return (self._total(source),)
        if kind in _SAME:
            return self.read(source, left - 1)
        if kind not in (
            "Concat",
            "Gather",
            "Slice",
            "Mul",
            "Div",
            "ReduceProd",
            "ConstantOfShape",
            "Where",
            "Equal",
        ):
            return None
        parts = []
        for item in node.inputs:
            found = self.read(item, left - 1)
            if found is None:
                return None
            parts.append(found)
        return _computed(node, parts)


def _computed(node: ir.Node, parts: list[Lengths]) -> Lengths | None:
    kind, first = node.op_type, parts[0]
    if kind == "Concat":
        joined = sum(parts, ())
        return joined if len(joined) <= _WIDEST else None
    if kind == "Gather":
        at = [item.number for item in parts[1]]
        sure = all(not item.atoms and -len(first) <= item.number < len(first) for item in parts[1])
        return tuple(first[i] for i in at) if sure else None
    if kind == "Slice":
        if any(len(part) != 1 or part[0].atoms for part in parts[1:]) or parts[4:] not in ([], [(ONE,)]):
            return None
        return first[parts[1][0].number : parts[2][0].number]
    if kind == "ReduceProd":
        along = axes(node)
        return (product(first),) if along is None or along in ([0], [-1]) else None
    if kind == "ConstantOfShape":
        fill = attribute(node, "value")
        if len(first) != 1 or first[0].atoms or not 0 <= first[0].number <= _WIDEST:
            return None
        return (Length(0 if fill is None else int(fill.numpy().item())),) * first[0].number
    width = max(map(len, parts))
    if any(len(part) not in (1, width) for part in parts):
        return None
    columns = list(zip(*(part * (width // len(part)) for part in parts), strict=True))
    if kind == "Where":
        return tuple(a if chosen == ONE else b for chosen, a, b in columns)
    result = [_OF_TWO[kind](*column) for column in columns]
    return None if None in result else tuple(item for item in result if item is not None)


def _equal(a: Length, b: Length) -> Length | None:
    """1 where both are equal, 0 where they cannot be: no length is negative."""
    if a == b:
        return ONE
    numbers = not a.atoms and not b.atoms
    return Length(0) if numbers or min(a.number, b.number) < 0 <= max(a.number, b.number) else None


_OF_TWO: dict[str, Callable[[Length, Length], Length | None]] = {
    "Mul": Length.__mul__,
    "Div": Length.over,
    "Equal": _equal,
}


def sources(shape: ir.Value | None, left: int) -> list[ir.Value]:
    """The values whose Shape, or Size, a computed shape is made of."""
    found, work = [], [shape]
    while work and left:
        node = producer(work.pop())
        left -= 1
        if node is None:
            continue
        if node.op_type in ("Shape", "Size"):
            found += [item for item in node.inputs if item is not None]
        else:
            work += list(node.inputs)
    return found
