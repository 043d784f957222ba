"""Which seat of which expert each slot of a routing takes, in GShard's dispatch and combine tensors.

    mask[s, k, e, c] = (ids[s, k] == e) * (place[s, k] == c) * conditions[s, k]
    place[s, k]      = how many slots before (s, k) chose the same expert

No two slots take the same seat (e, c), because the places are a running count over all slots. Where the mask drops what
is not kept, a place may be ``place * kept``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import onnx_ir as ir

from sparse_onnx.matching.factors import Algebra, Axis, Factor, Opaque
from sparse_onnx.matching.values import attribute, constant, ints, pairs, producer, rank, scalar, size

#: Types in which every count of slots is exact (None: not known, of a value between two that are).
_WIDE = (None, ir.DataType.INT64, ir.DataType.INT32, ir.DataType.FLOAT, ir.DataType.DOUBLE)


@dataclasses.dataclass(frozen=True)
class Hot:
    """``index == number along an axis``; `depth`: how many numbers, a constant or a computed value."""

    index: Factor
    along: Axis
    depth: ir.Value | int


@dataclasses.dataclass(frozen=True)
class Named:
    """A value, and for each axis what it counts: ``t0, t1, ..`` tokens, ``k``, ``e``, ``c``; empty for length 1."""

    value: ir.Value
    axes: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Seats:
    """See the module. `place` may have an axis e, along which the slot's own expert counts. `top_k`: 1 without k.

    `unclipped` is the place before it was clipped from below, `first` that of an expert's first slot.
    """

    index: Named
    place: Named
    capacity: ir.Value | int
    conditions: frozenset[Named]
    unclipped: ir.Value
    first: int
    top_k: int
    experts: int


def read_hot(item: Factor) -> Hot | None:
    """A factor as a one-hot tensor: OneHot of 0 and 1, or a comparison with 0, 1, 2, .. along one axis."""
    node = producer(item.value, "OneHot", "Equal")
    if node is None:
        return None
    if node.op_type == "OneHot":
        index, depth, values = node.inputs
        pair = constant(values)
        at = attribute(node, "axis", -1) % len(item.axes)
        if (
            index is None
            or depth is None
            or pair is None
            or pair.ravel().astype(float).tolist() != [0.0, 1.0]
        ):
            return None
        rest = item.axes[:at] + item.axes[at + 1 :]
        number = scalar(depth)
        return Hot(Factor(index, rest), item.axes[at], depth if number is None else int(number))
    for compared, numbers in pairs(node):
        count = _counted(numbers)
        dimensions, total = rank(numbers), rank(compared)
        if count is None or dimensions is None or total is None:
            continue
        long = [at - dimensions for at in range(dimensions) if size(numbers, at) != 1]
        if len(long) != 1 or (total >= -long[0] and size(compared, long[0]) != 1):
            continue
        own = item.axes[len(item.axes) - total :]
        rest = tuple(() if size(compared, at) == 1 else own[at] for at in range(total))
        return Hot(Factor(compared, rest), item.axes[long[0]], count)
    return None


def _counted(value: ir.Value) -> ir.Value | int | None:
    """n where the value holds 0 .. n - 1 along one axis."""
    table = constant(value)
    if table is not None:
        return table.size if table.ravel().tolist() == list(range(table.size)) else None
    node = producer(value, "Unsqueeze", "Reshape", "Cast", "Range")
    while node is not None and node.op_type != "Range":
        node = producer(node.inputs[0], "Unsqueeze", "Reshape", "Cast", "Range")
    if node is None or scalar(node.inputs[0]) != 0 or scalar(node.inputs[2]) != 1:
        return None
    return node.inputs[1]


class SeatReader:
    """Reads the factors of a dispatch or combine tensor as seats.

    Args:
        algebra: that made the atoms.
        tokens: atoms of the tokens' axes, in order.
        expert: atom of the experts' axis.
        seat: atom of the axis of seats.
        groups: atoms of tokens whose seats are counted on their own: a result has seats for each of them.
    """

    def __init__(
        self, algebra: Algebra, tokens: Sequence[int], expert: int, seat: int, groups: frozenset[int]
    ) -> None:
        self.algebra, self.tokens, self.expert, self.seat, self.groups = (
            algebra,
            list(tokens),
            expert,
            seat,
            groups,
        )

    def read(self, factors: Sequence[Factor], summed: set[int]) -> tuple[Seats, list[Factor], dict[int, str]]:
        """The seats, the factors that are no masks, and names of atoms.

        Raises:
            Opaque: what is not proved.
        """
        hots = [(item, hot) for item in factors if (hot := read_hot(item)) is not None]
        choices = {hot for _, hot in hots if hot.along == (self.expert,)}
        places = {hot for _, hot in hots if hot.along == (self.seat,)}
        if not choices:
            added = [item.value for item in factors if producer(item.value, "Add", "Sum") is not None]
            if added:
                raise Opaque(
                    f"'{added[0].name}', a sum, is not proved to be zero but for one seat of each slot"
                )
            raise Opaque(
                "no factor is one where an expert was chosen and zero elsewhere: the mixture is soft"
            )
        if len(choices) != 1 or len(places) != 1:
            raise Opaque("an expert's seats are not taken by one place for each slot")
        [choice], [place] = choices, places
        choice = dataclasses.replace(choice, index=self.algebra.plain(choice.index))
        place = dataclasses.replace(place, index=self.algebra.plain(place.index))
        if not isinstance(choice.depth, int):
            raise Opaque("the number of experts is not known from the graph")
        self.algebra.learn(choice.index.value, choice.index.axes)
        names = self._names(choice, summed)
        if summed - set(names):
            raise Opaque("a sum runs over an axis that no mask has")
        slots = frozenset(names) - {self.expert, self.seat}
        if not slots <= choice.index.atoms or self.expert in choice.index.atoms:
            raise Opaque("an expert is not chosen for each slot alone")
        masks = {item for item, _ in hots}
        others = [self.algebra.plain(item) for item in factors if item not in masks]
        conditions = [item for item in others if item.value.dtype == ir.DataType.BOOL]
        rest = [item for item in others if item not in conditions]
        for item in conditions:
            if not item.atoms <= slots | {self.expert}:
                raise Opaque(f"condition '{item.value.name}' is not one for each slot")
        place = dataclasses.replace(place, index=self._of_the_kept(place.index, conditions))
        unclipped, first = self._check_place(place.index, choice, slots)
        extra = [atom for atom, name in names.items() if name == "k"]
        top_k = 1 if not extra else self.algebra.lengths[extra[0]]
        if top_k is None:
            raise Opaque("the number of a token's experts is not known from the graph")
        seats = Seats(
            index=named(choice.index, names),
            place=named(place.index, names),
            capacity=place.depth,
            conditions=frozenset(named(item, names) for item in conditions),
            unclipped=unclipped,
            first=first,
            top_k=top_k,
            experts=choice.depth,
        )
        return seats, rest, names

    def _of_the_kept(self, place: Factor, conditions: Sequence[Factor]) -> Factor:
        """`place` behind `place * kept`: they differ for slots alone that the same condition of the mask drops."""
        item = self._unmoved(place, check=True)
        node = producer(item.value, "Mul")
        for value, other in () if node is None else pairs(node):
            mask = self._unmoved(self.algebra.spread(other, item.axes))
            if mask in map(self._unmoved, conditions):
                return self._of_the_kept(
                    self.algebra.plain(self.algebra.spread(value, item.axes)), conditions
                )
        return place

    def _unmoved(self, item: Factor, check: bool = False) -> Factor:
        """The factor behind all steps that move or cast its elements; `check`: which are counts of slots."""
        while (moved := self.algebra.moved(item)) is not None:
            if check:
                _check_exact(item.value)
            item = moved
        return self.algebra.plain(item)

    def _names(self, choice: Hot, summed: set[int]) -> dict[int, str]:
        names = {atom: f"t{at}" for at, atom in enumerate(self.tokens)}
        names |= {self.expert: "e", self.seat: "c"}
        others = [atom for axis in choice.index.axes for atom in axis if atom not in names]
        if len(others) > 1 or any(atom not in summed for atom in others):
            raise Opaque("the axes of the chosen experts are not tokens and their slots")
        return names | dict.fromkeys(others, "k")

    def _check_place(self, item: Factor, choice: Hot, slots: frozenset[int]) -> tuple[ir.Value, int]:
        """Proves that a place is at least 0 and no other slot of the same expert has it.

        Returns:
            The place before clipping, and the place of an expert's first slot.

        Raises:
            Opaque: what is not proved.
        """
        if not item.atoms <= slots | {self.expert}:
            raise Opaque("the places are not one for each slot")
        own = Factor(choice.index.value, choice.index.axes)
        # Behind a sum over experts only the chosen one may count: `picked` waits for the product that sees to it.
        expert, offset, picked, unclipped = self.expert, 0.0, True, None
        for _ in range(64):
            node = producer(item.value)
            if node is None:
                break
            _check_exact(item.value)
            moved = self.algebra.moved(item)
            if (
                node.op_type == "Cast"
                and attribute(node, "to") != int(ir.DataType.BOOL)
                and node.inputs[0] is not None
            ):
                moved = Factor(node.inputs[0], item.axes)  # places are whole numbers in any type
            if moved is not None:
                item = moved
                continue
            if node.op_type == "CumSum":
                first = self._check_count(node, item, own, slots, expert, offset)
                return item.value if unclipped is None else unclipped, first
            if node.op_type == "ReduceSum" and expert == self.expert and self.expert not in item.atoms:
                gone: set[int] = set()
                item = self.algebra.below(item, gone)[0]  # type: ignore[index]
                if len(gone) != 1:
                    break
                expert, picked = gone.pop(), False
                continue
            if node.op_type == "Mul":
                rest = self._without_choice(node, item, own, expert)
                if rest is None:
                    break
                item, picked = rest, True
                continue
            if not picked:
                break
            step = _shift(node)
            if step is None:
                break
            value, shift, clips = step
            offset += shift
            if clips:
                if offset:
                    break
                unclipped = value
            item = self.algebra.spread(value, item.axes)
        raise Opaque(
            f"'{item.value.name}' is not proved to be a running count of the slots of the same expert"
        )

    def _without_choice(self, node: ir.Node, item: Factor, own: Factor, expert: int) -> Factor | None:
        """The other operand of a product with the one-hot choice of experts itself."""
        for mask, value in pairs(node):
            found, summed = self.algebra.factors(mask, self.algebra.spread(mask, item.axes).axes)
            hot = read_hot(found[0]) if len(found) == 1 and not summed else None
            if hot is not None and hot.along == (expert,) and hot.index == own:
                return self.algebra.spread(value, item.axes)
        return None

    def _check_count(
        self, node: ir.Node, item: Factor, own: Factor, slots: frozenset[int], expert: int, offset: float
    ) -> int:
        along = ints(node.inputs[1])
        source = node.inputs[0]
        if along is None or len(along) != 1 or source is None:
            raise Opaque(f"the axis of '{node.name}' is not known from the graph")
        counted = frozenset(item.axes[along[0] % len(item.axes)])
        if counted != slots - self.groups:
            raise Opaque(f"'{node.name}' does not count over all slots: two of them may take the same seat")
        found, summed = self.algebra.factors(source, item.axes)
        hot = read_hot(found[0]) if len(found) == 1 and not summed else None
        if hot is None or hot.along != (expert,) or hot.index != own:
            raise Opaque(f"'{node.name}' does not count how often each expert was chosen")
        first = 0 if attribute(node, "exclusive", 0) else 1
        if offset != int(offset) or first + offset < 0:
            raise Opaque(
                f"the places of slots that '{node.name}' counts begin below 0, and OneHot takes these from the end"
            )
        return first + int(offset)


def _check_exact(value: ir.Value) -> None:
    if value.dtype not in _WIDE:
        raise Opaque(
            f"'{value.name}' counts slots in {value.dtype.name}, where large counts are rounded or wrap"
        )


def _shift(node: ir.Node) -> tuple[ir.Value, float, bool] | None:
    """(operand, constant that is added, whether it is a clip from below by 0) of one step of integer arithmetic."""
    if node.op_type in ("Add", "Sub"):
        for value, other in pairs(node):
            number = scalar(other)
            if number is not None and (node.op_type == "Add" or value is node.inputs[0]):
                return value, float(number if node.op_type == "Add" else -number), False
        return None
    if node.op_type == "Clip" and node.inputs[0] is not None:
        bounds = [scalar(item) if item is not None else None for item in node.inputs[1:3]]
        above = len(node.inputs) > 2 and node.inputs[2] is not None
        return (node.inputs[0], 0.0, True) if bounds and bounds[0] == 0 and not above else None
    if node.op_type == "Relu" and node.inputs[0] is not None:
        return node.inputs[0], 0.0, True
    if node.op_type == "Max" and len(node.inputs) == 2:
        return next(((value, 0.0, True) for value, other in pairs(node) if scalar(other) == 0), None)
    return None


def named(item: Factor, names: Mapping[int, str]) -> Named:
    """The factor with names for atoms.

    Raises:
        Opaque: an axis that counts several things.
    """
    result = []
    for axis in item.axes:
        if len(axis) > 1 or any(atom not in names for atom in axis):
            raise Opaque(f"the axes of '{item.value.name}' are not those of slots")
        result.append(names[axis[0]] if axis else "")
    return Named(item.value, tuple(result))


__all__ = ["Hot", "Named", "SeatReader", "Seats", "named", "read_hot"]
