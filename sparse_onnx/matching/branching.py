"""From units of nodes to If nodes: what each branch returns, what stands in where it does not run, and when it runs."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence

import numpy as np
import onnx_ir as ir

from sparse_onnx.blocks.dispatch import joined
from sparse_onnx.blocks.lowered import FORM_KEY
from sparse_onnx.graph.branches import Branch, emit_if, inside
from sparse_onnx.graph.build import Emitter, Namespace
from sparse_onnx.matching.covering import Sizes, UnknownSize, has_sizes, lacking
from sparse_onnx.matching.guards import NONE, Flow, Guard, Guards, Select, Side
from sparse_onnx.matching.units import Unit

FORM = "conditional"


Sources = dict[str, tuple[ir.Value, int]]
"""For the name of a size, a value and which of its axes has it."""


class Unfit(Exception):
    """Why a unit cannot run as a branch, and the sides that must count as always taken for it."""

    def __init__(self, reason: str, sides: Iterable[Side]) -> None:
        super().__init__(reason)
        self.sides = frozenset(sides)


@dataclasses.dataclass(frozen=True, eq=False)
class Filled:
    """What a branch returns: a value, or zeros, broadcast with these sizes."""

    value: ir.Value | None
    sizes: Sizes


@dataclasses.dataclass(frozen=True, eq=False)
class Result:
    """One output of an If: `old` gets it as its stand-in, everywhere outside the branches."""

    old: ir.Value
    then: Filled
    other: Filled


@dataclasses.dataclass(frozen=True, eq=False)
class Plan:
    """A unit with the results of its If, and where sizes that are named are to be read."""

    unit: Unit
    results: Sequence[Result]
    sources: Sources


class Planner:
    """Plans units.

    Args:
        flow: of the graph.
        guards: conditions of its nodes.
        found: its units.
    """

    def __init__(self, flow: Flow, guards: Mapping[ir.Node, Guards], found: Sequence[Unit]) -> None:
        self.flow, self.guards = flow, guards
        self.branch = {node: side for unit in found for side in (unit.then, unit.other) for node in side}
        self.given = {select.node: unit for unit in found for select in unit.selects}
        self.masks = {guard.mask for own in guards.values() for guard in own}

    def plan(self, unit: Unit) -> Plan:
        """
        Raises:
            Unfit: sizes or types that are not known.
        """
        sources = self._sources(unit)
        results = [self._chosen(select, sources) for select in unit.selects]
        for nodes in (unit.then, unit.other):
            for value in self._escaping(unit, nodes):
                real, zeros = Filled(value, []), Filled(None, self._stand_in(value, sources))
                sides = (real, zeros) if nodes is unit.then else (zeros, real)
                results.append(Result(value, *sides))
        return Plan(unit, results, sources)

    def _chosen(self, select: Select, sources: Sources) -> Result:
        """The result of a Where that its If gives."""
        sides = []
        for slot in (select.slot(True), select.slot(False)):
            missing = [select.condition, select.side(3 - slot)]
            sizes = _sizes(select, (1, 2), missing, [select.side(slot)], sources)
            sides.append(Filled(select.side(slot), sizes))
        return Result(select.node.outputs[0], *sides)

    def _escaping(self, unit: Unit, nodes: Sequence[ir.Node]) -> Iterator[ir.Value]:
        """What others read of what the nodes compute, or an If as its condition."""
        for node in nodes:
            for value in node.outputs:
                outside = any(
                    self.branch.get(reader) is not nodes and self.given.get(reader) is not unit
                    for reader, _ in self.flow.readers(value)
                )
                if outside or value in self.masks:
                    yield value

    def _stand_in(self, value: ir.Value, sources: Sources) -> Sizes:
        """Sizes of zeros in place of a value that is not computed."""
        node = value.producer()
        assert node is not None
        own = self.guards[node]
        if not isinstance(value.type, ir.TensorType) or value.dtype in (None, ir.DataType.STRING):
            sides = ((each, slot) for each in self.flow.selects.values() for slot in (1, 2))
            taken = ((each.node, slot) for each, slot in sides if each.guard(slot) in own)
            raise Unfit(f"'{value.name}' is not known to be a tensor of numbers", taken)
        sizes: Sizes = [1] * (0 if value.shape is None else len(value.shape))
        for reader, slot in self.flow.readers(value):
            select = self.flow.selects.get(reader)
            if select is None or slot not in (1, 2) or reader in self.given or self.guards[reader] >= own:
                continue
            present = [select.condition, select.side(3 - slot)]
            needed = _sizes(select, (slot,), [value], present, sources)
            sizes = [old if new == 1 else new for old, new in zip(sizes, needed, strict=True)]
        return sizes

    def _sources(self, unit: Unit) -> Sources:
        """Where named sizes can be read that do not depend on the unit: inputs of the graph, and values from outside
        every branch that the unit reads."""
        values = list(self.flow.graph.inputs)
        read = [value for node in unit.nodes for value in self.flow.read(node)]
        read += [select.side(slot) for select in unit.selects for slot in (1, 2)]
        for value in read:
            node = value.producer()
            if node is None or (self.guards.get(node) == NONE and node not in self.given):
                values.append(value)
        found: dict[str, tuple[ir.Value, int]] = {}
        for value in values:
            for at, size in enumerate(value.shape or ()):
                if not isinstance(size, int) and size.value is not None:
                    found.setdefault(size.value, (value, at))
        return found


def _sizes(
    select: Select,
    slots: Sequence[int],
    missing: Sequence[ir.Value],
    present: Sequence[ir.Value],
    sources: Sources,
) -> Sizes:
    sides = [(select.node, slot) for slot in slots]
    try:
        sizes = lacking(missing, present)
    except UnknownSize as error:
        raise Unfit(str(error), sides) from None
    unknown = next((size for size in sizes if isinstance(size, str) and size not in sources), None)
    if unknown is not None:
        raise Unfit(f"its size '{unknown}' is that of no value that is there without it", sides)
    return sizes


class Branching:
    """Puts planned units into the graph."""

    def __init__(self, model: ir.Model, flow: Flow) -> None:
        self.graph, self.flow = model.graph, flow
        self.names = Namespace(model)
        self.position = {node: at for at, node in enumerate(flow.nodes)}
        self.conditions: dict[Guard, ir.Value] = {}
        self.now: dict[ir.Value, ir.Value] = {}

    def run(self, plans: Sequence[Plan]) -> None:
        for plan in plans:
            self._put(plan)
        self.graph.sort()

    def _put(self, plan: Plan) -> None:
        unit = plan.unit
        first = unit.selects[0].node if unit.selects else unit.nodes[0]
        emit = Emitter(self.graph, self.names, f"{first.name or first.op_type}/branch", {FORM_KEY: FORM})
        condition = self._condition(emit, unit)
        anchor = self._behind(unit)
        for node in unit.nodes:
            self.graph.remove(node)
        branches = []
        for name, nodes in (("then", unit.then), ("else", unit.other)):
            branch = inside(emit, name)
            branch.nodes.extend(nodes)
            sides = [(each.then if name == "then" else each.other, each.old) for each in plan.results]
            branches.append(Branch(branch, [self._fill(branch, side, old, plan) for side, old in sides]))
        outputs = emit_if(emit, condition, branches[0], branches[1])
        if anchor is None:
            self.graph.extend(emit.nodes)
        else:
            self.graph.insert_before(anchor, emit.nodes)
        moved = {node for branch in branches for node in branch.emit.nodes}
        for result, output in zip(plan.results, outputs, strict=True):
            self._replace(result, output, moved)
        for select in unit.selects:
            self.graph.remove(select.node, safe=True)

    def _behind(self, unit: Unit) -> ir.Node | None:
        """The first node in the graph behind the first one of the unit that is not in it."""
        own = set(unit.nodes)
        for node in self.flow.nodes[min(self.position[node] for node in own) :]:
            if node.graph is self.graph and node not in own:
                return node
        return None

    def _condition(self, emit: Emitter, unit: Unit) -> ir.Value:
        if isinstance(unit.key, ir.Value):
            return self._holds(emit, Guard(unit.key, True))
        ordered = sorted(unit.key, key=lambda guard: (self._rank(guard.mask), guard.wanted))
        held = [self._holds(emit, guard) for guard in ordered]
        condition = held[0]
        for each in held[1:]:
            condition = emit.op("And", condition, each)
        return condition

    def _rank(self, value: ir.Value) -> tuple[int, int]:
        """Of a value, in the order of the graph."""
        node = value.producer()
        if node is None:
            return -1, self.flow.graph.inputs.index(value)
        return self.position[node], value.index() or 0

    def _holds(self, emit: Emitter, guard: Guard) -> ir.Value:
        """One boolean: whether the guard's mask has such an element."""
        if guard not in self.conditions:
            mask = self.now.get(guard.mask, guard.mask)
            if not guard.single:
                numbers = emit.op("Cast", mask, to=ir.DataType.INT64)
                count = emit.op("ReduceSum", numbers, keepdims=0)
                zero, one = (emit.constant(np.asarray(number, np.int64)) for number in (0, 1))
                if guard.wanted:
                    found = emit.op("Greater", count, zero)
                else:  # also where there is no element: one of the sides always runs, and gives its sizes
                    found = emit.op("Less", count, emit.op("Max", emit.op("Size", mask), one))
            elif guard.wanted:
                found = mask if len(guard.mask.shape or ()) == 0 else emit.op("Reshape", mask, emit.ints())
            else:
                found = emit.op("Not", self._holds(emit, Guard(guard.mask, True)))
            self.conditions[guard] = found
        return self.conditions[guard]

    def _fill(self, branch: Emitter, side: Filled, old: ir.Value, plan: Plan) -> ir.Value:
        assert old.dtype is not None or side.value is not None
        if side.value is not None:
            value = self.now.get(side.value, side.value)
            value.type = value.type or old.type
            if has_sizes(side.value, side.sizes):
                return value
            result, shape = branch.op("Expand", value, self._vector(branch, side.sizes, plan)), old.shape
        else:
            assert old.dtype is not None
            shape = ir.Shape(side.sizes)
            ones = all(size == 1 for size in side.sizes)
            axes = len(side.sizes) if ones else 0
            zero = branch.constant(np.zeros([1] * axes, old.dtype.numpy()))
            if ones:
                return zero
            result = branch.op("Expand", zero, self._vector(branch, side.sizes, plan))
        result.type, result.shape = old.type, shape
        return result

    def _vector(self, branch: Emitter, sizes: Sizes, plan: Plan) -> ir.Value:
        if all(isinstance(size, int) for size in sizes):
            return branch.ints(*(int(size) for size in sizes))
        parts = []
        for size in sizes:
            if isinstance(size, int):
                parts.append(branch.ints(size))
                continue
            value, at = plan.sources[size]
            parts.append(branch.op("Shape", value, start=at, end=at + 1))
        return joined(branch, parts)

    def _replace(self, result: Result, output: ir.Value, moved: Collection[ir.Node]) -> None:
        """The output of the If in place of what it stands for, outside of the branches."""
        old, name = result.old, result.old.name
        output.type, output.shape = old.type, old.shape
        chosen = result.then.value is not None and result.other.value is not None
        if chosen:
            ir.convenience.replace_all_uses_with(old, output, replace_graph_outputs=True)
            old.name = None
        else:
            for use in list(old.uses()):
                if self.flow.owner.get(use.node, use.node) not in moved:
                    use.node.replace_input_with(use.idx, output)
            sizes = result.other.sizes if result.then.value is not None else result.then.sizes
            output.shape = _either(old.shape, sizes)
            old.name = self.names.free(f"{name}/taken")
        output.name = name
        self.now[old] = output


def _either(shape: ir.Shape | None, sizes: Sizes) -> ir.Shape | None:
    """What is known of a shape that may also be of these sizes."""
    if shape is None:
        return None
    own = [axis if isinstance(axis, int) else axis.value for axis in shape]
    return ir.Shape([axis if axis == size else None for axis, size in zip(own, sizes, strict=True)])
