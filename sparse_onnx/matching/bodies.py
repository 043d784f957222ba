"""The body of an expert as a model-local function: what lies between the rows that it reads and its results.

Two experts have the same function where operators, attributes, integer constants and the sizes of their weights are the
same; the weights are inputs of it.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Collection, Iterable, Mapping, Sequence

import numpy as np
import onnx_ir as ir

from sparse_onnx.blocks.spec import DOMAIN
from sparse_onnx.graph.external import read_array
from sparse_onnx.matching.rowwise import Typed
from sparse_onnx.matching.values import tensor

#: Elements of the largest constant that becomes part of a body: shapes, axes, indices.
_SMALL = 4096


class Refused(Exception):
    """Why a body cannot be made a function: the reason, the node, and what to do."""

    def __init__(self, reason: str, node: ir.Node | None, hint: str) -> None:
        super().__init__(reason)
        self.node, self.hint = node, hint


@dataclasses.dataclass(frozen=True, eq=False)
class Region:
    """Nodes between `entry` and `exits`, each behind those that it needs, and what they read from outside."""

    entry: ir.Value
    exits: tuple[ir.Value, ...]
    nodes: tuple[ir.Node, ...]
    outside: tuple[ir.Value, ...]


def dependent(exits: Iterable[ir.Value], entries: Collection[ir.Value]) -> set[ir.Value]:
    """What the exits are computed from that depends on an entry; entries included, nothing before them."""
    known = dict.fromkeys(entries, True)
    work = [(value, False) for value in exits]
    while work:
        value, ready = work.pop()
        if value in known and not ready:
            continue
        node = value.producer()
        sources = [] if node is None else _sources(node)
        if ready:
            known[value] = any(known.get(source, False) for source in sources)
            continue
        known[value] = False
        work.append((value, True))
        work.extend((source, False) for source in sources if source not in known)
    return {value for value, depends in known.items() if depends}


def region(
    entry: ir.Value,
    exits: Sequence[ir.Value],
    inside: Collection[ir.Value],
    others: Collection[ir.Value],
    number: int,
) -> Region:
    """One expert's region.

    Args:
        entry: rows of expert `number`.
        exits: its results.
        inside: as `dependent` gives it for all experts.
        others: entries of other experts.
        number: for reports.

    Raises:
        Refused: a result that is not computed from these rows, or from others too, or by a node with a body.
    """
    graph = next((node.graph for value in exits if (node := value.producer()) is not None), None)
    nodes: dict[ir.Node, None] = {}
    outside: dict[ir.Value, None] = {}
    work = [(value, False) for value in reversed(exits)]
    seen: set[ir.Value] = {entry}
    for value in exits:
        if value not in inside:
            hint = "each expert must be a function of its rows"
            raise Refused(
                f"the result of expert {number} does not depend on its rows", value.producer(), hint
            )
    while work:
        value, ready = work.pop()
        node = value.producer()
        if ready:
            assert node is not None
            nodes.setdefault(node)
            continue
        if value in seen:
            continue
        seen.add(value)
        if value not in inside:
            outside.setdefault(value)
            continue
        if value in others or node is None or node.graph is not graph:
            hint = "each expert must read its rows at one place only"
            raise Refused(f"expert {number} reads the rows '{value.name}' of another expert too", node, hint)
        if _has_body(node):
            hint = "only bodies of plain operators are taken as experts"
            raise Refused(f"expert {number} holds a node with a body of its own, {node.op_type}", node, hint)
        work.append((value, True))
        work.extend((source, False) for source in reversed(node.inputs) if source is not None)
    return Region(entry, tuple(exits), tuple(nodes), _in_order(nodes, outside))


def _in_order(nodes: Iterable[ir.Node], outside: Collection[ir.Value]) -> tuple[ir.Value, ...]:
    used = (value for node in nodes for value in node.inputs if value is not None and value in outside)
    return tuple(dict.fromkeys(used))


def _sources(node: ir.Node) -> list[ir.Value]:
    """Inputs of the node, and what its bodies use of the graphs around them."""
    found = [value for value in node.inputs if value is not None]
    for attribute in node.attributes.values():
        if attribute.is_ref() or attribute.type not in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS):
            continue
        single = attribute.type == ir.AttributeType.GRAPH
        for graph in [attribute.as_graph()] if single else attribute.as_graphs():
            inner = [*ir.traversal.RecursiveGraphIterator(graph)]
            graphs = {graph, *(each.graph for each in inner)}
            read = [value for each in inner for value in each.inputs if value is not None]
            found += [value for value in (*read, *graph.outputs) if value.graph not in graphs]
    return found


def _has_body(node: ir.Node) -> bool:
    kinds = (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS)
    return any(attribute.type in kinds for attribute in node.attributes.values())


@dataclasses.dataclass(frozen=True, eq=False)
class Shared:
    """A function and those that it is the body of, by number, with the values for its inputs behind the rows."""

    function: ir.Function
    types: tuple[Typed | None, ...]
    weights: Mapping[int, tuple[ir.Value, ...]]
    example: Region


def functions(regions: Sequence[Region], opsets: Mapping[str, int]) -> list[Shared]:
    """One function for each distinct body."""
    groups: dict[str, list[int]] = {}
    for number, each in enumerate(regions):
        groups.setdefault(_structure(each, opsets), []).append(number)
    made = []
    for structure, numbers in groups.items():
        first = regions[numbers[0]]
        constants: dict[int, np.ndarray] = {}
        for slot, value in enumerate(first.outside):
            array = _exact(value)
            if array is None:
                array = _common([regions[number].outside[slot] for number in numbers], first)
            if array is not None:
                constants[slot] = array
        text = (structure, *(f"{slot}={array.tobytes().hex()}" for slot, array in constants.items()))
        name = f"Expert_{_digest(*text)[:12]}"
        free = [slot for slot in range(len(first.outside)) if slot not in constants]
        weights = {number: tuple(regions[number].outside[slot] for slot in free) for number in numbers}
        types = tuple(typed(first.outside[slot]) for slot in free)
        made.append(Shared(_function(first, constants, name, opsets), types, weights, first))
    return made


def typed(value: ir.Value) -> Typed | None:
    """Type and sizes of a value or constant, as far as they are known."""
    stored = tensor(value)
    if stored is None:
        return Typed.of(value)
    return Typed(stored.dtype, tuple(stored.shape.numpy()))


def _exact(value: ir.Value) -> np.ndarray | None:
    """A constant that decides what a body does: integers and flags."""
    array = _constant(value, _SMALL)
    return array if array is not None and array.dtype.kind in "iub" else None


def _common(values: Sequence[ir.Value], region: Region) -> np.ndarray | None:
    """The constant that all of these are: one number, or the scales of a Resize, which decide its result's shape."""
    scales = any(node.op_type == "Resize" and values[0] in node.inputs for node in region.nodes)
    arrays = [_constant(value, _SMALL if scales else 1) for value in values]
    contents = {None if array is None else array.tobytes() for array in arrays}
    return arrays[0] if len(contents) == 1 else None


def _constant(value: ir.Value, largest: int) -> np.ndarray | None:
    stored = tensor(value)
    if (
        stored is None
        or stored.size > largest
        or stored.dtype == ir.DataType.STRING
        or stored.dtype.bitwidth < 8
    ):
        return None
    return read_array(stored)


def _structure(region: Region, opsets: Mapping[str, int]) -> str:
    """What must be the same in two bodies: everything but weights and small constants of floats."""
    places: dict[ir.Value | None, str] = {None: "none", region.entry: "x"}
    parts: list[str] = []
    for slot, value in enumerate(region.outside):
        places[value] = f"w{slot}"
        array = _exact(value)
        parts.append(f"{typed(value)} {'' if array is None else array.tobytes().hex()}")
    for number, node in enumerate(region.nodes):
        inputs = ",".join(places[value] for value in node.inputs)
        attributes = ";".join(f"{name}={_text(node.attributes[name])}" for name in sorted(node.attributes))
        version = opsets.get(node.domain)
        parts.append(
            f"{node.domain}:{version}:{node.op_type}:{node.overload}({inputs}){attributes}/{len(node.outputs)}"
        )
        places.update({value: f"v{number}.{at}" for at, value in enumerate(node.outputs)})
    parts.append(",".join(places[value] for value in region.exits))
    return "\n".join(parts)


def _text(attribute: ir.Attr) -> str:
    if attribute.is_ref():
        return f"reference {attribute.ref_attr_name}"
    if attribute.type == ir.AttributeType.TENSOR:
        stored = attribute.as_tensor()
        return f"{stored.dtype.name}{stored.shape}{hashlib.sha256(stored.tobytes()).hexdigest()}"
    return f"{attribute.type.name} {attribute.value!r}"


def _digest(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode("utf-8", "surrogatepass")).hexdigest()


def _function(
    region: Region, constants: Mapping[int, np.ndarray], name: str, opsets: Mapping[str, int]
) -> ir.Function:
    rows = ir.Value(name="x")
    inputs, nodes = [rows], []
    values: dict[ir.Value, ir.Value] = {region.entry: rows}
    for slot, value in enumerate(region.outside):
        if slot not in constants:
            values[value] = ir.Value(name=f"w{slot}")
            inputs.append(values[value])
            continue
        stored = tensor(value)
        assert stored is not None
        copy = ir.Tensor(constants[slot].copy(), dtype=stored.dtype, name=f"c{slot}")
        nodes.append(ir.node("Constant", [], {"value": copy}, name=f"constant_{slot}"))
        values[value] = nodes[-1].outputs[0]
        values[value].name = f"c{slot}"
    for number, old in enumerate(region.nodes):
        sources = [None if value is None else values[value] for value in old.inputs]
        outputs = [
            ir.Value(name=f"v{number}_{at}" if value.name else "") for at, value in enumerate(old.outputs)
        ]
        nodes.append(
            ir.Node(
                old.domain,
                old.op_type,
                sources,
                list(old.attributes.values()),
                overload=old.overload,
                outputs=outputs,
                name=f"node_{number}",
            )
        )
        values.update(zip(old.outputs, outputs, strict=True))
    results: list[ir.Value] = []
    for value in region.exits:
        result = values[value]
        if result is rows or result in results:
            nodes.append(ir.node("Identity", [result], name=f"copy_{len(results)}"))
            nodes[-1].outputs[0].name = f"y{len(results)}"
            result = nodes[-1].outputs[0]
        results.append(result)
    domains = {"", *(node.domain for node in nodes)}
    graph = ir.Graph(
        inputs, results, nodes=nodes, opset_imports={d: opsets.get(d, 1) for d in sorted(domains)}, name=name
    )
    return ir.Function(DOMAIN, name, graph=graph, attributes=[])
