"""Nodes that matter under the same conditions, in units that can each run as the branches of one If.

A unit that waited for what others compute from its own results would never run: where a path leaves a unit and comes
back to nodes of the same conditions, those belong to the next one. A path may also lead through a condition.
"""

from __future__ import annotations

import dataclasses
import graphlib
from collections.abc import Iterable, Mapping, Sequence

import onnx_ir as ir

from sparse_onnx.matching.guards import NONE, Flow, Guards, Select

Key = ir.Value | Guards
"""A mask of one boolean, whose two sides are the branches of one If; or conditions that must all hold."""


@dataclasses.dataclass(eq=False)
class Unit:
    """Nodes in order: those that matter where the key holds, and, of a mask, where it does not.

    Attributes:
        selects: those whose results the If gives itself.
    """

    key: Key
    then: list[ir.Node] = dataclasses.field(default_factory=list)
    other: list[ir.Node] = dataclasses.field(default_factory=list)
    selects: list[Select] = dataclasses.field(default_factory=list)

    @property
    def nodes(self) -> list[ir.Node]:
        return self.then + self.other


def units(flow: Flow, guards: Mapping[ir.Node, Guards]) -> list[Unit]:
    """The units of all nodes that have conditions."""
    walk = _Walk(flow, guards)
    for node in walk.ordered():
        walk.visit(node)
    found: dict[tuple[Key, int], Unit] = {}
    for node in flow.nodes:
        key, turn = walk.place[node]
        if key is None:
            continue
        unit = found.setdefault((key, turn), Unit(key))
        if guards[node] == NONE:
            unit.selects.append(flow.selects[node])
        elif isinstance(key, ir.Value) and not next(iter(guards[node])).wanted:
            unit.other.append(node)
        else:
            unit.then.append(node)
    return list(found.values())


class _Walk:
    """Forwards through the nodes: the unit of each, as a key and how many units of that key come before it.

    `later` holds, for each key, the first unit that nodes behind a node may be in.
    """

    def __init__(self, flow: Flow, guards: Mapping[ir.Node, Guards]) -> None:
        self.flow, self.guards = flow, guards
        self.place: dict[ir.Node, tuple[Key | None, int]] = {}
        self.later: dict[ir.Node, dict[Key, int]] = {}

    def ordered(self) -> Iterable[ir.Node]:
        """The nodes, each behind what it reads and what computes its conditions.

        Nothing waits for itself. If all paths from n lead through a side of a Where of m, then one from n to another
        mask either does so before that mask, which m then comes before, or behind all that it chooses in, and then m
        has the last Where. Both orders go one way.
        """
        return graphlib.TopologicalSorter(
            {node: self._sources(node) for node in self.flow.nodes}
        ).static_order()

    def _sources(self, node: ir.Node) -> list[ir.Node]:
        values = [*self.flow.read(node), *(guard.mask for guard in self.guards[node])]
        return [each for value in values if (each := value.producer()) is not None and each in self.guards]

    def visit(self, node: ir.Node) -> None:
        sources = self._sources(node)
        own = self.guards[node]
        key = self._key(node)
        turn = self._turn(sources, key, own)
        select = self.flow.selects.get(node)
        if own == NONE and select is not None and select.guard(1).single:
            # An If gives its result itself where it computes one of its sides.
            turn = self._turn(sources, select.mask, own)
            sides = {select.side(slot).producer() for slot in (1, 2)}
            if any(self._reaches(side, select.mask, turn, own) for side in sides if side is not None):
                key = select.mask
        self.place[node] = (key, turn if key is not None else 0)
        later: dict[Key, int] = {}
        for source in sources:
            other, at = self.place[source]
            if other is not None and not self._reaches(source, key, at, own):
                later[other] = max(later.get(other, 0), at + 1)
            for each, first in self.later[source].items():
                later[each] = max(later.get(each, 0), first)
        self.later[node] = later

    def _key(self, node: ir.Node) -> Key | None:
        own = self.guards[node]
        if len(own) == 1:
            (guard,) = own
            if guard.single:
                return guard.mask
        return own or None

    def _turn(self, sources: Sequence[ir.Node], key: Key | None, own: Guards) -> int:
        """The first unit of that key that a node with those conditions and sources may be in."""
        turn = 0
        if key is None:
            return turn
        for source in sources:
            other, at = self.place[source]
            turn = max(turn, self.later[source].get(key, 0))
            if other == key:
                turn = max(turn, at if self._reaches(source, key, at, own) else at + 1)
        return turn

    def _reaches(self, node: ir.Node, key: Key | None, turn: int, reader: Guards) -> bool:
        """Whether the node runs in a branch of that unit from which one with the reader's conditions may read: the same
        branch, or the If that gives a result itself. A Where whose result its If gives runs in none."""
        own = self.guards[node]
        return self.place.get(node) == (key, turn) and own != NONE and reader in (own, NONE)
