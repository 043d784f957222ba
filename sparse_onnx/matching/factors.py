"""Tensors as sums of products of factors, each axis followed by what it counts.

``combine[s, e, c] = sum_k weight[s, k] * hot[s, k, e] * place[s, k, e, c]`` may be written with Mul and broadcasting,
with Einsum, MatMul or ReduceSum, in any order and with any reshapes; read backwards from axes that are known, it is
always the same set of factors.
"""

from __future__ import annotations

import dataclasses

import onnx_ir as ir

from sparse_onnx.matching.einsum import equation
from sparse_onnx.matching.values import attribute, axes, is_float, producer, rank, scalar, size

Axis = tuple[int, ...]
"""What an axis counts: the atoms that were flattened into it, outermost first; none for an axis of length 1."""

_MOVES = ("Identity", "Cast", "Transpose", "Squeeze", "Unsqueeze", "Reshape", "Expand", "Flatten")
_DEEPEST = 200


@dataclasses.dataclass(frozen=True)
class Factor:
    """A value that is multiplied as it is, and what each of its axes counts."""

    value: ir.Value
    axes: tuple[Axis, ...]

    @property
    def atoms(self) -> frozenset[int]:
        return frozenset(atom for axis in self.axes for atom in axis)


class Opaque(Exception):
    """A step whose axes cannot be followed."""


class Algebra:
    """Hands out atoms, and remembers how long they are where the graph says so."""

    def __init__(self) -> None:
        self.lengths: list[int | None] = []
        self._steps = 0

    def atom(self, length: int | None) -> int:
        self.lengths.append(length)
        return len(self.lengths) - 1

    def axis(self, length: int | None) -> Axis:
        return () if length == 1 else (self.atom(length),)

    def plain(self, item: Factor) -> Factor:
        """The factor with axes of length 1 that count nothing, also those of an atom that is one element long."""
        axes = (axis if len(axis) != 1 or self.lengths[axis[0]] != 1 else () for axis in item.axes)
        return Factor(item.value, tuple(axes))

    def _own(self, value: ir.Value, along: tuple[Axis, ...]) -> tuple[Axis, ...]:
        """Axes of an operand: an axis of length 1 counts nothing, except for an atom that was made so long."""
        return tuple(
            axis if size(value, at) != 1 or (len(axis) == 1 and self.lengths[axis[0]] == 1) else ()
            for at, axis in enumerate(along)
        )

    def learn(self, value: ir.Value, along: tuple[Axis, ...]) -> None:
        """Takes lengths of atoms from a value whose axes they are."""
        for at, axis in enumerate(along):
            length = size(value, at)
            if len(axis) == 1 and length not in (None, 1) and self.lengths[axis[0]] is None:
                self.lengths[axis[0]] = length

    def fresh(self, value: ir.Value) -> tuple[Axis, ...]:
        """New atoms for all axes of a value.

        Raises:
            Opaque: its rank is not known.
        """
        dimensions = rank(value)
        if dimensions is None:
            raise Opaque(f"the shape of '{value.name}' is not known from the graph")
        return tuple(self.axis(size(value, at)) for at in range(dimensions))

    def factors(
        self, value: ir.Value, along: tuple[Axis, ...], only: frozenset[int] | None = None
    ) -> tuple[list[Factor], set[int]]:
        """Factors of a value whose axes are known, and the atoms over which their product is summed.

        Args:
            value: to take apart.
            along: what its axes count.
            only: a factor that has none of these atoms stays whole, but for a mask behind casts and reshapes.

        Raises:
            Opaque: reshapes or shapes that cannot be followed.
        """
        self._steps = 0
        summed: set[int] = set()
        found: dict[Factor, None] = {}
        work = [Factor(value, along)]
        while work:
            self._steps += 1
            if self._steps > _DEEPEST:
                raise Opaque(f"'{value.name}' has too many factors")
            item = work.pop()
            if only is None or item.atoms & only:
                parts = self.below(item, summed)
            else:
                item, parts = self._mask(item), None
            if parts is None:
                # Ones and zeros may be multiplied with themselves; nothing else may.
                if (
                    item in found
                    and item.value.dtype != ir.DataType.BOOL
                    and producer(item.value, "OneHot") is None
                ):
                    raise Opaque(f"'{item.value.name}' is multiplied twice")
                found[item] = None
            else:
                work.extend(reversed(parts))
        return list(found), summed

    def _mask(self, item: Factor) -> Factor:
        """A truth value behind casts and reshapes; the factor itself where there is none."""
        at = item
        while at.value.dtype != ir.DataType.BOOL:
            node = producer(at.value, "Cast", "Unsqueeze", "Squeeze", "Expand", "Identity")
            moved = None if node is None else self.moved(at)
            if moved is None:
                return item
            at = moved
        return at

    def below(self, item: Factor, summed: set[int]) -> list[Factor] | None:
        """What the factor is the product of; None where it is one of its own. Sums are added to `summed`."""
        moved = self.moved(item)
        if moved is not None:
            return [moved]
        node = producer(item.value)
        if node is None:
            return None
        inputs = [value for value in node.inputs if value is not None]
        if node.op_type in ("Mul", "And") and len(inputs) == 2:
            return [self.spread(value, item.axes) for value in inputs]
        if node.op_type == "Where" and len(inputs) == 3 and scalar(inputs[2]) == 0:
            return [self.spread(value, item.axes) for value in inputs[:2]]
        if node.op_type == "ReduceSum":
            return [self._unreduced(node, inputs[0], item.axes, summed)]
        if node.op_type == "Einsum":
            return self._einsum(node, item.axes, summed)
        if node.op_type == "MatMul" and len(inputs) == 2:
            return self._matmul(inputs[0], inputs[1], item.axes, summed)
        return None

    def moved(self, item: Factor) -> Factor | None:
        """The factor behind one step that moves or casts elements; None where there is no such step."""
        node = producer(
            item.value,
            "Identity",
            "Cast",
            "Transpose",
            "Squeeze",
            "Unsqueeze",
            "Reshape",
            "Expand",
            "Flatten",
        )
        source = node.inputs[0] if node is not None and node.inputs else None
        if node is None or source is None:
            return None
        if node.op_type == "Identity" or (node.op_type == "Cast" and _keeps_numbers(source, node)):
            return Factor(source, item.axes)
        if node.op_type == "Cast":
            return None
        if node.op_type == "Transpose":
            order = attribute(node, "perm") or list(range(len(item.axes)))[::-1]
            back: list[Axis] = [()] * len(order)
            for at, origin in enumerate(order):
                back[origin] = item.axes[at]
            return Factor(source, tuple(back))
        if node.op_type == "Expand":
            return self.spread(source, item.axes)
        return Factor(source, self._reshaped(node, source, item))

    def spread(self, value: ir.Value, along: tuple[Axis, ...]) -> Factor:
        """An operand of a broadcast: its axes are the result's, but for those of length 1."""
        dimensions = rank(value)
        if dimensions is None or dimensions > len(along):
            raise Opaque(f"the shape of '{value.name}' is not known from the graph")
        own = along[len(along) - dimensions :]
        self.learn(value, own)
        return Factor(value, self._own(value, own))

    def _unreduced(
        self, node: ir.Node, source: ir.Value, along: tuple[Axis, ...], summed: set[int]
    ) -> Factor:
        dimensions, reduced = rank(source), axes(node)
        if dimensions is None or not reduced:
            raise Opaque(f"the axes that '{node.name}' sums over are not known from the graph")
        gone = {at % dimensions for at in reduced}
        rest = iter(along)
        result: list[Axis] = []
        for at in range(dimensions):
            if at in gone:
                result.append(self.axis(size(source, at)))
                summed.update(result[-1])
                if attribute(node, "keepdims", 1):
                    next(rest)
            else:
                result.append(next(rest))
        return Factor(source, tuple(result))

    def _einsum(self, node: ir.Node, along: tuple[Axis, ...], summed: set[int]) -> list[Factor] | None:
        read = equation(node)
        if read is None:
            return None
        terms, result = read
        counted = dict(zip(result, along, strict=True))
        for term, value in zip(terms, node.inputs, strict=True):
            for at, letter in enumerate(term):
                if letter not in counted:
                    counted[letter] = self.axis(size(value, at))
                    summed.update(counted[letter])
        found = []
        for term, value in zip(terms, node.inputs, strict=True):
            assert value is not None
            self.learn(value, tuple(counted[letter] for letter in term))
            found.append(Factor(value, self._own(value, tuple(counted[letter] for letter in term))))
        return found

    def _matmul(
        self, a: ir.Value, b: ir.Value, along: tuple[Axis, ...], summed: set[int]
    ) -> list[Factor] | None:
        rank_a, rank_b = rank(a), rank(b)
        if rank_a is None or rank_b is None or min(rank_a, rank_b) < 2:
            return None
        inner = self.axis(size(a, -1) or size(b, -2))
        summed.update(inner)
        left = self.spread(a, (*along[:-1], inner))
        right = self.spread(b, (*along[:-2], inner, along[-1]))
        return [left, right]

    def _reshaped(self, node: ir.Node, source: ir.Value, item: Factor) -> tuple[Axis, ...]:
        """Axes of a reshape's input from those of its result."""
        dimensions = rank(source)
        if dimensions is None:
            raise Opaque(f"the shape of '{source.name}' is not known from the graph")
        if node.op_type in ("Squeeze", "Unsqueeze"):
            return self._with_ones(node, dimensions, item.axes)
        before = [(at, size(source, at)) for at in range(dimensions) if size(source, at) != 1]
        after = [
            (axis, size(item.value, at)) for at, axis in enumerate(item.axes) if size(item.value, at) != 1
        ]
        found: dict[int, Axis] = {}
        while (
            before and after and self._matches(before[-1][1], after[-1]) and not _last_of_two(before, after)
        ):
            found[before.pop()[0]] = after.pop()[0]
        while before and after and self._matches(before[0][1], after[0]) and not _last_of_two(before, after):
            found[before.pop(0)[0]] = after.pop(0)[0]
        if len(before) == 1 and after:
            found[before[0][0]] = tuple(atom for axis, _ in after for atom in axis)
        elif len(after) == 1 and before:
            found |= self._taken_apart(before, after[0][0], node)
        elif (
            len(before) == len(after)
            and sum(not self._matches(b[1], a) for b, a in zip(before, after, strict=True)) <= 1
        ):
            found |= {b[0]: a[0] for b, a in zip(before, after, strict=True)}
        elif before or after:
            raise Opaque(f"what the axes of reshape '{node.name}' stand for is not known from the graph")
        return tuple(found.get(at, ()) for at in range(dimensions))

    def _pairs_off(self, before: list[tuple[int, int | None]], after: list[tuple[Axis, int | None]]) -> bool:
        """Whether all axes but one are provably equal, and with them the last."""
        return sum(not self._matches(b[1], a) for b, a in zip(before, after, strict=True)) <= 1

    def _with_ones(self, node: ir.Node, dimensions: int, along: tuple[Axis, ...]) -> tuple[Axis, ...]:
        named = axes(node)
        if named is None:
            raise Opaque(f"the axes of '{node.name}' are not known from the graph")
        if node.op_type == "Unsqueeze":
            put = {at % len(along) for at in named}
            return tuple(axis for at, axis in enumerate(along) if at not in put)
        gone = {at % dimensions for at in named}
        rest = iter(along)
        return tuple(() if at in gone else next(rest) for at in range(dimensions))

    def _matches(self, length: int | None, after: tuple[Axis, int | None]) -> bool:
        """Whether an axis of the input is provably as long as one of the result."""
        axis, other = after
        if other is None and len(axis) == 1:
            other = self.lengths[axis[0]]
        return length is not None and length == other

    def _taken_apart(
        self, before: list[tuple[int, int | None]], axis: Axis, node: ir.Node
    ) -> dict[int, Axis]:
        unsure = [at for at, length in before if length is None]
        known = [length for _, length in before]
        if len(axis) != len(before) or len(unsure) > 1:
            raise Opaque(f"what is flattened by '{node.name}' is not known from the graph")
        for atom, length in zip(axis, known, strict=True):
            if length is not None and self.lengths[atom] not in (None, length):
                raise Opaque(f"'{node.name}' flattens axes in another order than they are taken apart again")
            if length is not None and self.lengths[atom] is None:
                raise Opaque(f"'{node.name}' flattens axes in another order than they are taken apart again")
        return {at: (atom,) for (at, _), atom in zip(before, axis, strict=True)}


def _last_of_two(before: list[tuple[int, int | None]], after: list[tuple[Axis, int | None]]) -> bool:
    """Whether matching one more pair would leave axes on one side alone."""
    return (len(before) == 1) != (len(after) == 1)


def _keeps_numbers(source: ir.Value, node: ir.Node) -> bool:
    """Whether a Cast keeps zeros, ones and routing weights what they are."""
    if source.dtype is None:
        return False
    target = ir.DataType(attribute(node, "to"))
    if source.dtype == ir.DataType.BOOL or source.dtype.is_integer():
        return target != ir.DataType.BOOL
    return is_float(source.dtype) and is_float(target)


__all__ = ["Algebra", "Axis", "Factor", "Opaque"]
