"""One `if` of the user's code in a trace. See `rewrite` for the form it is called in.

A condition that depends on tensors runs both sides, each from the same Python state. What they leave becomes
one state in the first of these ways that is proved right:

1. One side runs always, because it does nothing where the other would have run: `if mask.any():` before
   writes to the masked rows.
2. Both sides go into one `torch.cond`, which is an `If` in ONNX.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor, fx

from sparse_onnx.export.lifting import conditional, effects, graph_edits, state, unshaped
from sparse_onnx.export.lifting.facts import Facts
from sparse_onnx.export.lifting.program import Program, storage, tracing, writes
from sparse_onnx.export.lifting.values import Place, SomeItems, Undefined, refuse

if TYPE_CHECKING:
    from sparse_onnx.export.lifting.runtime import Runtime

_MISSING = object()


@dataclasses.dataclass
class Side:
    """One side of a branch as it was traced."""

    truth: bool
    nodes: list[fx.Node]
    values: dict[str, Any]
    after: state.Snapshot
    raises: bool = False


class Concrete:
    """A branch whose condition is a Python value."""

    def __init__(self, side: bool, place: Place) -> None:
        self.side, self._place = side, place
        self._values: Mapping[str, Any] = {}
        self._open = True

    def more(self) -> bool:
        again, self._open = self._open, False
        return again

    def leave(self, values: Mapping[str, Any]) -> None:
        self._values = values

    def value(self, name: str) -> Any:
        found = self._values.get(name, _MISSING)
        return Undefined(name, self._place) if found is _MISSING else found


class Lifted:
    """A branch whose condition depends on tensors."""

    def __init__(
        self,
        runtime: Runtime,
        condition: Any,
        place: Place,
        values: Mapping[str, Any],
        names: tuple[str, ...],
        read_later: frozenset[str],
        first: bool = True,
    ) -> None:
        self.runtime, self.condition, self.place = runtime, condition, place
        self.names, self.read_later = names, read_later
        #: The condition's truth on the `if` side: `first` is False where it is negated.
        self.positive = first
        self.side = True
        self.sides: list[Side] = []
        self.raising = False
        self.start = dict(values)
        self.graph: fx.Graph = tracing().tracer.graph
        self.first = graph_edits.last(self.graph)
        self.mark = self.first
        self.before = state.take(runtime.module, self.start.values())
        self.result: dict[str, Any] = {}

    def more(self) -> bool:
        if len(self.sides) == 2:
            return False
        self.side = not self.sides
        self.mark, self.raising = graph_edits.last(self.graph), False
        self.runtime.open.append(self)
        return True

    def leave(self, values: Mapping[str, Any]) -> None:
        self.runtime.open.pop()
        after = state.take(self.runtime.module, [*self.start.values(), *values.values()])
        nodes = graph_edits.since(self.graph, self.mark)
        own = {name: values[name] for name in self.names if name in values}
        self.sides.append(Side(self.side == self.positive, nodes, own, after, self.raising))
        self.before.restore()
        if len(self.sides) == 2:
            self.result = self._merged()

    def value(self, name: str) -> Any:
        values = self.start if len(self.sides) < 2 else self.result
        found = values.get(name, _MISSING)
        return Undefined(name, self.place) if found is _MISSING else found

    def _merged(self) -> dict[str, Any]:
        first, second = self.sides
        if first.raises or second.raises:
            return self._without_error(first, second)
        reasons = []
        fallback = None
        for taken, skipped in ((first, second), (second, first)):
            found = self._always(taken, skipped)
            if isinstance(found, str):
                reasons.append(found)
                continue
            values, open_names = found
            if not open_names:
                return self._keep(taken, skipped, values)
            fallback = fallback or (taken, skipped, values)
        merged = conditional.merge(self)
        if not isinstance(merged, str):
            return merged
        if fallback is not None:
            taken, skipped, values = fallback
            unclear = {
                name: Undefined(name, self.place, merged) for name in values if _undefined(values[name])
            }
            return self._keep(taken, skipped, {**values, **unclear})
        raise refuse(
            self.place,
            f"depends on tensor values, and its two sides cannot be one graph: {merged}",
            "compute both with tensor operations and choose by torch.where, or write an adapter (--adapter)",
        )

    def _without_error(self, first: Side, second: Side) -> dict[str, Any]:
        if first.raises and second.raises:
            raise refuse(self.place, "raises on both sides", "--debug shows where")
        taken, skipped = (second, first) if first.raises else (first, second)
        self.runtime.note(self.place, "the model raises an error where this is so, the graph does not")
        return self._keep(taken, skipped, dict(taken.values))

    def _always(self, taken: Side, skipped: Side) -> tuple[dict[str, Any], list[str]] | str:
        """Values to go on with if `taken` runs whatever the condition, and names that are then not one value; or
        why it may not."""
        outer = {storage(node) for node in graph_edits.until(self.graph, self.first)} - {None}
        if any(storage(target) in outer for node in skipped.nodes for target in writes(node)):
            return "both sides write"
        lasting = [node for node in taken.nodes if any(storage(each) in outer for each in writes(node))]
        program = Program(self.graph, tracing().tracer.root)
        program.count_writes(but=lasting)
        facts = Facts(program)
        self._assume(facts, skipped.truth)
        for node in lasting:
            if not effects.changes_nothing(node, facts):
                return (
                    f"'{graph_edits.line_of(node)}' is not proved to change nothing where the condition fails"
                )
        problem = self._python(taken, skipped, facts)
        if problem:
            return problem
        values, different = {}, []
        for name in self.names:
            left, right = (side.values.get(name, self.start.get(name, _MISSING)) for side in (taken, skipped))
            if left is not _MISSING and right is not _MISSING and self._same(left, right, facts):
                values[name] = left
            else:
                values[name] = Undefined(name, self.place)
                if name in self.read_later and not any(_undefined(each) for each in (left, right)):
                    different.append(name)
        return values, different

    def _same(self, left: Any, right: Any, facts: Facts) -> bool:
        if _undefined(left) or _undefined(right):
            return left is right
        if not effects.same(left, right, facts, graph_edits.node_of):
            if not effects.without_elements(left, right, facts, graph_edits.node_of):
                return False
            unshaped.mark(left, self.place)
        if left is not right:
            self.runtime.watch(self.place, left, right)
        return True

    def _assume(self, facts: Facts, truth: bool) -> None:
        if not isinstance(self.condition, SomeItems):
            facts.assume(_as_fact(self.condition), truth)
        elif not truth:  # every item is missing
            for _, condition, missing in self.condition.missing:
                if not isinstance(condition, fx.Node) or facts.program.current(condition):
                    facts.assume(condition, missing)

    def _python(self, taken: Side, skipped: Side, facts: Facts) -> str:
        """Why what the sides did to Python objects differs; empty if it does not."""
        for holder, here, there in taken.after.changed(skipped.after):
            if isinstance(holder, SomeItems) and not isinstance(self.condition, SomeItems):
                added = here[len(there) :]
                more = all(a is b for a, b in zip(here, there, strict=False)) and len(here) > len(there)
                if more and all(_may_be_left_out(each, facts) for each in added):
                    continue
                return "a list gets other items"
            if type(here) is list and len(here) == len(there):
                if all(self._same(a, b, facts) for a, b in zip(here, there, strict=True)):
                    continue
                return "a list gets other items"
            if isinstance(here, dict) and list(here) == list(there):
                if all(effects.same(here[key], there[key], facts, graph_edits.node_of) for key in here):
                    continue
                names = [str(key) for key in here if here[key] is not there[key]]
                return f"'{names[0]}' of {type(holder).__name__} changes"
            return f"a {type(holder).__name__} changes"
        return ""

    def _keep(self, taken: Side, skipped: Side, values: dict[str, Any]) -> dict[str, Any]:
        changed = [(holder, len(there)) for holder, _, there in taken.after.changed(skipped.after)]
        graph_edits.discard(self.graph, skipped.nodes)
        taken.after.restore()
        for holder, before in changed:
            if isinstance(holder, SomeItems):
                holder.place = self.place
                condition = _as_fact(self.condition)
                added = range(before, list.__len__(holder))
                holder.missing += [(position, condition, skipped.truth) for position in added]
                for position in added:
                    holder.conditions.setdefault(position, []).append((self.condition, skipped.truth))
        return values


def _may_be_left_out(item: Any, facts: Facts) -> bool:
    """Whether a list's item may be missing: a tensor is concatenated all the same, and has to have no rows."""
    if not isinstance(item, Tensor):
        return True
    node = graph_edits.node_of(item)
    return node is not None and facts.shape(node)[:1] == [0]


def _as_fact(condition: Any) -> Any:
    """A condition in the form that facts take."""
    if isinstance(condition, Tensor):
        return graph_edits.node_of(condition)
    return condition if isinstance(condition, SomeItems) else condition.node.expr


def _undefined(value: Any) -> bool:
    return value is _MISSING or type(value) is Undefined
