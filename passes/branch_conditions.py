"""Conditional parts of a model become branches: early exits, modalities that are absent, mixtures of depths.

For a `Where` whose sides are computed by nodes that nobody else reads:

    y = Where(c, A, B), c one boolean      y = If(c) {A} {B}
    y = Where(m, A, B), m a mask of rows   y = Where(m, If(any m) {A} {zeros}, If(not all m) {B} {zeros})

The zeros have an axis of 1 wherever the other side has the size already. Several Where of one condition share an If,
also where layers between them are read by all (keys and values beside hidden states). Of choices within choices, as in
a chain of early exits, each part gets an If of its own under all the conditions that must hold for it:

    Where(c1, h1, Where(c2, h2, f(h2))), h2 = g(h1):  h2 = If(c1) {0} {g(h1)};  If(not c1 and not c2) {f(h2)} {0}; ...

So branches are one deep, and ORT prepacks the weights, which stay initializers of the graph around them.

Exact: nodes have no effects but their results, Where reads of each side only what it takes, and whatever runs now ran
before, on the same values. So NaN and infinities in what is not taken do not matter; and where the original fails in a
part that is not taken (an index out of range, an integer divided by zero), this does not. A product with a mask is not
the same, since 0 times infinity is NaN: `x + mask * f(x)` stays as it is.

Moved are sides that hold a product of matrices, a recurrence or a loop. What others read too, what is computed from
random numbers, operators that are not known, parts of lowered blocks, and control flow that reads weights of the graph
around it stay outside, and all that they need. A mask that chooses within rows, as attention masks do, is no condition,
nor is one along several axes that puts a constant in the place of padding: something is always left. Every branch waits
on its condition: on a GPU, that stops the queue.

Refused: sizes that the graph does not tell where a side that is not computed decides them; types other than tensors of
numbers; a Where in the body of an If, Loop or Scan, where weights would lie two graphs out and not be prepacked.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import ClassVar

import onnx_ir as ir

from sparse_onnx.core.passes import Outcome, Pass
from sparse_onnx.core.report import Refusal
from sparse_onnx.matching.branching import Branching, Plan, Planner, Unfit
from sparse_onnx.matching.guards import NONE, Flow, Guard, Guards, Select, Side
from sparse_onnx.matching.moving import is_expensive
from sparse_onnx.matching.units import units

Conditions = Mapping[ir.Node, Guards]

_OPSET = 18


@dataclasses.dataclass(frozen=True)
class BranchConditions(Pass):
    __doc__ = __doc__
    name: ClassVar[str] = "branch_conditions"
    summary: ClassVar[str] = "parts of a model that a Where does not take are skipped"

    masks: bool = dataclasses.field(
        default=True, metadata={"help": "also parts that a mask of several rows takes for some of them"}
    )

    def call(self, model: ir.Model) -> Outcome:
        refusals = [refusal for graph in model.graphs() for refusal in self._nested(graph, model.graph)]
        flow = Flow(model.graph)
        off = set() if self.masks else {side for side, guard in _sides(flow) if not guard.single}
        found = _worth(flow, flow.guards(off, move_all=True))
        matched = len(refusals) + len(found)
        opset = model.opset_imports.get("", 0)
        if found and opset < _OPSET:
            hint = f"export at opset {_OPSET} or newer"
            refusals += [self._refusal(each, f"opset {opset} lacks operators", hint) for each in found]
            found = []
        if not found:
            return Outcome(model, False, matched, 0, tuple(refusals))
        refusals += self._held(flow, off, found)
        plans, guards, unfit = self._planned(flow, off)
        taken = _worth(flow, guards)
        if plans:
            Branching(model, flow).run(plans)
        return Outcome(model, bool(plans), matched, len(taken), (*refusals, *unfit))

    def _planned(self, flow: Flow, off: set[Side]) -> tuple[list[Plan], Conditions, list[Refusal]]:
        """What to branch, without the sides that hold nothing expensive or that turn out not to do."""
        refusals: list[Refusal] = []
        off = set(off)
        while True:
            guards = flow.guards(off)
            idle = {guard for own in guards.values() for guard in own} - _expensive(guards)
            if idle:
                off |= {side for side, guard in _sides(flow) if guard in idle}
                continue
            parts = units(flow, guards)
            planner = Planner(flow, guards, parts)
            try:
                return [planner.plan(unit) for unit in parts], guards, refusals
            except Unfit as error:
                for select in _worth(flow, guards):
                    if error.sides & {(select.node, 1), (select.node, 2)}:
                        refusals.append(
                            self._refusal(select, str(error), "save the model with its inferred shapes")
                        )
                off |= error.sides

    def _held(self, flow: Flow, off: set[Side], found: Sequence[Select]) -> list[Refusal]:
        """Refusals of what cannot be moved at all."""
        wished, taken = flow.guards(off, move_all=True), _worth(flow, flow.guards(off))
        refusals = []
        for select in found:
            if select in taken:
                continue
            own = {select.guard(1), select.guard(2)}
            node = next(node for node in reversed(flow.nodes) if flow.obstacles[node] and wished[node] & own)
            reason = f"{node.op_type} '{node.name}' stays: {flow.obstacles[node]}"
            refusals.append(
                self._refusal(select, reason, "a branch can hold what depends on its inputs alone")
            )
        return refusals

    def _nested(self, graph: ir.Graph, main: ir.Graph) -> list[Refusal]:
        if graph is main:
            return []
        flow = Flow(graph)
        reason = "it stands in the body of an If, Loop or Scan, where weights would lie two graphs out"
        found = _worth(flow, flow.guards())
        return [
            self._refusal(select, reason, "ORT does not prepack those: choose outside of the body")
            for select in found
        ]

    def _refusal(self, select: Select, reason: str, hint: str) -> Refusal:
        name = select.node.name or select.node.outputs[0].name or ""
        return Refusal(
            f"a side of '{name}' is computed though it may not be taken: {reason}", name, hint, self.name
        )


def _sides(flow: Flow) -> Iterator[tuple[Side, Guard]]:
    """Each side of each choice, and when it matters."""
    return (((select.node, slot), select.guard(slot)) for select in flow.selects.values() for slot in (1, 2))


def _expensive(guards: Conditions) -> set[Guard]:
    """The conditions of expensive nodes."""
    return {guard for node, own in guards.items() if own and is_expensive(node) for guard in own}


def _worth(flow: Flow, guards: Conditions) -> list[Select]:
    """Each Where of which a side need not always be computed and holds something expensive."""
    worth = _expensive(guards)
    return [
        select
        for select in flow.selects.values()
        if any(
            (guard := select.guard(slot)) in worth and guard in guards.get(producer, NONE)
            for slot in (1, 2)
            if (producer := select.side(slot).producer()) is not None
        )
    ]
