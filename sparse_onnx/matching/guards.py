"""Which conditions must hold for what a node computes to matter.

    y = Where(mask, A, B)       A matters where some element of mask is true, B where some is false

Backwards from the outputs of a graph: a node matters under the conditions that all its readers share, and one that
feeds a side of a Where under that side's condition as well. So a stack of layers that several Where of one mask choose
from is found as a whole, and one choice within another under both conditions.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterable

import onnx_ir as ir

from sparse_onnx.matching.moving import LOWERED, bodies, obstacle
from sparse_onnx.matching.values import producer, size, tensor

#: Operators whose result holds no element that their first input does not hold.
_VIEWS = ("Expand", "Flatten", "Identity", "Reshape", "Squeeze", "Transpose", "Unsqueeze")


@dataclasses.dataclass(frozen=True)
class Guard:
    """Some element of `mask` is true, or, where that is not `wanted`, false."""

    mask: ir.Value
    wanted: bool

    @property
    def single(self) -> bool:
        """Whether the mask is one boolean."""
        return is_single(self.mask)


Side = tuple[ir.Node, int]
"""A Where and the slot of one of its sides, 1 or 2."""
Guards = frozenset[Guard]
NONE: Guards = frozenset()


@dataclasses.dataclass(frozen=True, eq=False)
class Select:
    """A `Where` that chooses between whole values, or between rows.

    Attributes:
        node: its inputs are the condition and the two sides.
        mask: what the condition is a view of.
        negated: of whose opposite it is a view.
    """

    node: ir.Node
    mask: ir.Value
    negated: bool

    @staticmethod
    def of(node: ir.Node) -> Select | None:
        """None for anything else, also a Where that chooses within rows, as attention masks do, or by a constant."""
        if node.domain != "" or node.op_type != "Where" or len(node.inputs) != 3 or None in node.inputs:
            return None
        condition = node.inputs[0]
        assert condition is not None
        mask, negated = condition, False
        while (view := producer(mask, "Not", *_VIEWS)) is not None and view.inputs[0] is not None:
            negated ^= view.op_type == "Not"
            mask = view.inputs[0]
        if tensor(mask) is not None or not (is_single(mask) or size(condition, -1) == 1):
            return None
        return Select(node, mask, negated)

    @property
    def condition(self) -> ir.Value:
        return self.side(0)

    def side(self, slot: int) -> ir.Value:
        value = self.node.inputs[slot]
        assert value is not None
        return value

    def guard(self, slot: int) -> Guard:
        """When the input in this slot, 1 or 2, matters."""
        return Guard(self.mask, (slot == 1) != self.negated)

    def pads(self, slot: int) -> bool:
        """Whether the side is all that is not padding: a mask along two axes or more, as batch and sequence are, and
        a constant on the other side. No run is all padding, so that it is always taken."""
        along = [axis for axis in self.condition.shape or () if axis != 1]
        return len(along) > 1 and not is_single(self.mask) and _is_filling(self.side(3 - slot))

    def slot(self, wanted: bool) -> int:
        """Of the side that is taken where the mask is (not) true."""
        return 1 if wanted != self.negated else 2


def _is_filling(value: ir.Value) -> bool:
    while (node := producer(value, "Expand", "Identity", "Cast", "CastLike")) is not None:
        assert node.inputs[0] is not None
        value = node.inputs[0]
    return tensor(value) is not None or producer(value, "ConstantOfShape") is not None


def is_single(value: ir.Value) -> bool:
    """Whether the value has one element, by its static shape."""
    return value.shape is not None and all(axis == 1 for axis in value.shape)


class Flow:
    """What reads what in one graph: nodes in bodies count as the node of the graph that has them."""

    def __init__(self, graph: ir.Graph) -> None:
        self.graph, self.nodes = graph, list(graph)
        found = (Select.of(node) for node in self.nodes)
        self.selects = {select.node: select for select in found if select is not None}
        self.owner: dict[ir.Node, ir.Node] = {}
        self.captured: dict[ir.Node, list[ir.Value]] = {}
        self.obstacles: dict[ir.Node, str] = {}
        if self.selects:
            self._look_inside()

    def _look_inside(self) -> None:
        for node in self.nodes:
            self.obstacles[node] = obstacle(node)
            for body in bodies(node):
                for each in ir.traversal.RecursiveGraphIterator(body):
                    self.owner[each] = node
                    read = (value for value in each.inputs if value is not None)
                    self.captured.setdefault(node, []).extend(read)

    def read(self, node: ir.Node) -> Iterable[ir.Value]:
        """What the node or its bodies read; some of it may be computed in the bodies."""
        yield from (value for value in node.inputs if value is not None)
        yield from self.captured.get(node, ())

    def readers(self, value: ir.Value) -> Iterable[tuple[ir.Node, int]]:
        """Nodes of the graph that read the value, each with the slot, -1 where a body of it does."""
        for use in value.uses():
            owner = self.owner.get(use.node)
            yield (use.node, use.idx) if owner is None else (owner, -1)

    def guards(self, without: Collection[Side] = (), move_all: bool = False) -> dict[ir.Node, Guards]:
        """The conditions of each node; none for a node that must stay.

        Args:
            without: sides that count as always taken.
            move_all: as if no node had to stay but for those of our own.
        """
        found: dict[ir.Node, Guards] = dict.fromkeys(self.nodes, NONE)
        if not self.selects:
            return found
        for node in reversed(self.nodes):
            held = self.obstacles[node]
            if held and (held == LOWERED or not move_all):
                continue
            needed: Guards | None = None
            for value in node.outputs:
                if value.is_graph_output():
                    needed = NONE
                for reader, slot in self.readers(value):
                    asked = found[reader]
                    select = self.selects.get(reader) if slot in (1, 2) else None
                    if select is not None and (reader, slot) not in without and not select.pads(slot):
                        asked = asked | {select.guard(slot)}
                    needed = asked if needed is None else needed & asked
            found[node] = needed or NONE
        return found
