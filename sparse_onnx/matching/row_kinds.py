"""Kinds of values that the proof of row independence tells apart, and one node's view of them. See `rowwise`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from sparse_onnx.matching.values import attribute


class Dim:
    """A size that the graph does not tell: equal to itself only."""


Size = int | Dim
Dims = tuple[Size, ...]


@dataclasses.dataclass(frozen=True, eq=False)
class Fixed:
    """Independent of the rows and of their number. `dims` is None where the rank is unknown."""

    dims: Dims | None
    array: np.ndarray | None = None


@dataclasses.dataclass(frozen=True, eq=False)
class Rows:
    """Rows on the first `lead` axes: each part depends on that row, and on what is fixed."""

    dims: Dims
    lead: int


@dataclasses.dataclass(frozen=True, eq=False)
class Sizes:
    """Integers that depend on the number of rows at most; None for one that does so in a way not followed."""

    entries: tuple[Size | None, ...]
    scalar: bool = False


Kind = Fixed | Rows | Sizes


class NotRowWise(Exception):
    """Why a node mixes rows, or is not known not to."""


@dataclasses.dataclass(frozen=True)
class Step:
    """One node under analysis.

    Attributes:
        node: the node.
        kinds: of its inputs; None for one that is left out.
        rows: the sizes of the row axes of the body's input.
        merged: the size of all rows on one axis.
        opset: of the default domain.
    """

    node: ir.Node
    kinds: tuple[Kind | None, ...]
    rows: Dims
    merged: Size
    opset: int

    @property
    def op(self) -> str:
        return self.node.op_type

    def attribute(self, name: str, default: Any = None) -> Any:
        return attribute(self.node, name, default)

    def kind(self, index: int) -> Kind | None:
        return self.kinds[index] if index < len(self.kinds) else None

    def fixed(self, index: int, what: str) -> Fixed:
        """The input as what does not depend on the rows."""
        kind = self.settled(index)
        if not isinstance(kind, Fixed):
            raise NotRowWise(f"its {what} depends on the rows")
        return kind

    def settled(self, index: int) -> Fixed | Rows | None:
        """The input; sizes that do not count rows are fixed."""
        kind = self.kind(index)
        if not isinstance(kind, Sizes):
            return kind
        if any(entry is None or self.counts_rows(entry) for entry in kind.entries):
            raise NotRowWise("it computes with the number of rows")
        known = [entry for entry in kind.entries if isinstance(entry, int)]
        array = np.asarray(known, np.int64) if len(known) == len(kind.entries) else None
        if kind.scalar:
            return Fixed((), None if array is None else array.reshape(()))
        return Fixed((len(kind.entries),), array)

    def rows_input(self, index: int = 0) -> Rows:
        kind = self.kind(index)
        if not isinstance(kind, Rows):
            raise NotRowWise(f"its input {index} does not hold the rows")
        return kind

    def counts_rows(self, size: Size | None) -> bool:
        return isinstance(size, Dim) and (size is self.merged or any(size is row for row in self.rows))

    def ints(self, index: int, what: str) -> list[int]:
        """A constant of integers."""
        kind = self.kind(index)
        if isinstance(kind, Sizes) and all(isinstance(entry, int) for entry in kind.entries):
            return [entry for entry in kind.entries if isinstance(entry, int)]
        if not isinstance(kind, Fixed) or kind.array is None:
            raise NotRowWise(f"its {what} is not a constant")
        return [int(item) for item in kind.array.ravel()]

    def axes(self, rank: int, index: int = 1) -> list[int] | None:
        """`axes` as an input or an attribute, counted from the front; None where there are none."""
        if self.kind(index) is not None:
            found = self.ints(index, "axes")
        else:
            found = self.attribute("axes")
        return None if found is None else [axis + rank if axis < 0 else axis for axis in found]

    def axis(self, rank: int, default: int) -> int:
        found = self.attribute("axis", default)
        return found + rank if found < 0 else found

    def sizes(self, index: int) -> Sizes:
        """The input as a vector of sizes."""
        kind = self.kind(index)
        if isinstance(kind, Sizes):
            return kind
        if isinstance(kind, Fixed) and kind.array is not None and kind.array.ndim <= 1:
            return Sizes(tuple(int(item) for item in kind.array.ravel()), kind.array.ndim == 0)
        if isinstance(kind, Fixed) and kind.dims is not None and all(isinstance(d, int) for d in kind.dims):
            count = kind.dims[0] if kind.dims else 1
            if len(kind.dims) <= 1 and isinstance(count, int):
                return Sizes(tuple(Dim() for _ in range(count)), not kind.dims)
        raise NotRowWise("its target shape depends on the rows or has an unknown length")

    def behind(self, axis: int, lead: int) -> None:
        """Refuses work along a row axis."""
        if axis < lead:
            raise NotRowWise("it works along the axis of the rows")


Rule = Callable[[Step], Sequence[Kind]]


def counted(rule: Rule) -> Rule:
    """The rule, but with sizes among the inputs arithmetic on them."""

    def with_sizes(step: Step) -> Sequence[Kind]:
        kinds = [kind for kind in step.kinds if kind is not None]
        if not any(isinstance(kind, Sizes) for kind in kinds) or any(isinstance(k, Rows) for k in kinds):
            return rule(step)
        if step.op == "Identity" or (step.op == "Cast" and step.attribute("to") == ir.DataType.INT64):
            return [step.sizes(0)]
        if step.op not in ("Add", "Sub", "Mul", "Div"):
            return rule(step)
        a, b = step.sizes(0), step.sizes(1)
        length = max(len(a.entries), len(b.entries))
        left, right = (each.entries * (length if len(each.entries) == 1 else 1) for each in (a, b))
        entries = [_computed(step, *pair) for pair in zip(left, right, strict=True)]
        return [Sizes(tuple(entries), a.scalar and b.scalar)]

    return with_sizes


def _computed(step: Step, a: Size | None, b: Size | None) -> Size | None:
    if isinstance(a, int) and isinstance(b, int):
        if step.op == "Div":
            return a // b if a >= 0 and b > 0 else None
        return {"Add": a + b, "Sub": a - b, "Mul": a * b}[step.op]
    if b == {"Add": 0, "Sub": 0, "Mul": 1, "Div": 1}[step.op]:
        return a
    if a == {"Add": 0, "Mul": 1}.get(step.op, object()):
        return b
    if a is None or b is None:
        return None
    if step.op == "Mul" and len(step.rows) == 2 and {id(a), id(b)} == {id(row) for row in step.rows}:
        return step.merged
    return None if step.counts_rows(a) or step.counts_rows(b) else Dim()


def broadcast(step: Step, kinds: Sequence[Fixed | Rows]) -> Kind:
    """The result of an elementwise operator: rows stay aligned, and nothing is spread over them but what has size 1."""
    rows = [kind for kind in kinds if isinstance(kind, Rows)]
    if not rows:
        return Fixed(None)
    rank, lead = max(len(kind.dims) for kind in rows), rows[0].lead
    if any(len(kind.dims) != rank or kind.lead != lead for kind in rows):
        raise NotRowWise("it spreads rows over other axes")
    dims = list(rows[0].dims)
    for kind in kinds:
        if kind.dims is None:
            raise NotRowWise("an operand has an unknown rank")
        shift = rank - len(kind.dims)
        if shift < 0:
            raise NotRowWise("it puts axes before the rows")
        for at, size in enumerate(kind.dims):
            if isinstance(kind, Fixed) and at + shift < lead and size != 1:
                raise NotRowWise("an operand that is the same for all inputs has an entry for each row")
            if at + shift >= lead:
                dims[at + shift] = _joint(dims[at + shift], size)
    return Rows(tuple(dims), lead)


def _joint(a: Size, b: Size) -> Size:
    if a is b or a == b:
        return a
    if a == 1 or b == 1:
        return b if a == 1 else a
    return a if isinstance(a, int) else b


def only_fixed(step: Step, first: int) -> None:
    for at in range(first, len(step.kinds)):
        if step.kind(at) is not None:
            step.fixed(at, f"input {at}")
