"""Whether two models are the same graph outside their sparse blocks, by structure and constants and not by names."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterator, Mapping, Sequence

import onnx_ir as ir

from sparse_onnx.verify.constants import Constants


@dataclasses.dataclass(frozen=True)
class Boundary:
    """A block that does not count: nothing between its inputs and its output is looked at."""

    name: str
    inputs: tuple[ir.Value, ...]


#: By the value that the block gives.
Boundaries = Mapping[ir.Value, Boundary]


def same_outside(first: ir.Model, second: ir.Model, ours: Boundaries, theirs: Boundaries) -> bool:
    """Whether the outputs of both models are the same function of inputs, constants and the blocks' outputs.

    Inputs correspond by name where both models have the same names, else by order; outputs by order. Function bodies
    and versions of operator sets count. Constants are compared whole; those inside the blocks are not read.

    Raises:
        ModelError: a weight file is gone.
    """
    sides = (_Side(first, ours), _Side(second, theirs))
    by_name = len({frozenset(value.name for value in side.model.graph.inputs) for side in sides}) == 1
    constants = Constants(*(side.tensors() for side in sides))
    left, right = (side.digests(constants, by_name) for side in sides)
    return left == right


class _Side:
    def __init__(self, model: ir.Model, boundaries: Boundaries) -> None:
        self.model, self.boundaries = model, boundaries
        self.values, self.nodes = _reached(model.graph.outputs, boundaries)
        self.functions = self._called()
        self.bodies: dict[ir.OperatorIdentifier, str] = {}

    def _called(self) -> dict[ir.OperatorIdentifier, ir.Function]:
        found: dict[ir.OperatorIdentifier, ir.Function] = {}
        pending = list(self.nodes)
        while pending:
            key = pending.pop().op_identifier()
            if key in self.model.functions and key not in found:
                found[key] = self.model.functions[key]
                pending.extend(found[key].all_nodes())
        return found

    def tensors(self) -> Iterator[ir.TensorProtocol]:
        for value in self.values:
            if value.is_initializer() and value.const_value is not None:
                yield value.const_value
        nodes = [*self.nodes, *(node for f in self.functions.values() for node in f.all_nodes())]
        for node in nodes:
            for attribute in node.attributes.values():
                if not attribute.is_ref() and attribute.type == ir.AttributeType.TENSOR:
                    yield attribute.as_tensor()
                elif not attribute.is_ref() and attribute.type == ir.AttributeType.TENSORS:
                    yield from attribute.as_tensors()
        for function in self.functions.values():
            for graph in function.subgraphs():
                yield from (v.const_value for v in graph.initializers.values() if v.const_value is not None)

    def digests(self, constants: Constants, by_name: bool) -> list[str]:
        """One an output of the main graph."""
        walk = _Walk(self, constants, self.model.opset_imports)
        graph = self.model.graph
        for index, value in enumerate(graph.inputs):
            walk.known[value] = _digest("input", str(value.name if by_name else index))
            if value.is_initializer() and value in self.values:
                walk.known[value] = _digest(walk.known[value], constants.digest(value.const_value))
        walk.graph(graph, ())
        return [walk.known[value] for value in graph.outputs]

    def body(self, key: ir.OperatorIdentifier, constants: Constants) -> str:
        if key not in self.bodies:
            function = self.functions[key]
            walk = _Walk(self, constants, function.opset_imports, everything=True)
            for index, value in enumerate(function.inputs):
                walk.known[value] = _digest("function input", str(index))
            walk.graph(function, ())
            defaults = [walk.attribute(function.attributes[name], ()) for name in sorted(function.attributes)]
            self.bodies[key] = _digest("body", *(walk.known[value] for value in function.outputs), *defaults)
        return self.bodies[key]


class _Walk:
    """Digests of values in the order of the graph: `known` holds those of all values that were reached."""

    def __init__(
        self, side: _Side, constants: Constants, opsets: Mapping[str, int], everything: bool = False
    ) -> None:
        self.side, self.constants, self.opsets, self.everything = side, constants, opsets, everything
        self.known: dict[ir.Value, str] = {}

    def graph(self, graph: ir.Graph | ir.Function, path: tuple[str, ...]) -> None:
        if isinstance(graph, ir.Graph):
            for value in graph.initializers.values():
                if value not in self.known and (self.everything or value in self.side.values):
                    self.known[value] = _digest("constant", self.constants.digest(value.const_value))
        for node in graph:
            if self.everything or node in self.side.nodes:
                self._node(node, path)
            for value in node.outputs:
                boundary = self.side.boundaries.get(value)
                if boundary is not None and value in self.side.values:
                    inputs = (self.known[source] for source in boundary.inputs)
                    self.known[value] = _digest("block", boundary.name, *inputs)

    def _node(self, node: ir.Node, path: tuple[str, ...]) -> None:
        inputs = ["" if value is None else self.known[value] for value in node.inputs]
        attributes = [
            f"{name}={self.attribute(node.attributes[name], path)}" for name in sorted(node.attributes)
        ]
        key = node.op_identifier()
        what = (
            self.side.body(key, self.constants)
            if key in self.side.functions
            else str(self.opsets.get(node.domain))
        )
        base = _digest(node.domain, node.op_type, node.overload, what, str(len(inputs)), *inputs, *attributes)
        for index, value in enumerate(node.outputs):
            self.known[value] = _digest(base, str(index))

    def attribute(self, attribute: ir.Attr, path: tuple[str, ...]) -> str:
        if attribute.is_ref():
            return f"reference to {attribute.ref_attr_name}"
        path = (*path, attribute.name)
        if attribute.type == ir.AttributeType.GRAPH:
            return self._subgraph(attribute.as_graph(), path)
        if attribute.type == ir.AttributeType.GRAPHS:
            graphs = enumerate(attribute.as_graphs())
            return _digest(*(self._subgraph(graph, (*path, str(index))) for index, graph in graphs))
        if attribute.type == ir.AttributeType.TENSOR:
            return self.constants.digest(attribute.as_tensor())
        if attribute.type == ir.AttributeType.TENSORS:
            return _digest(*(self.constants.digest(tensor) for tensor in attribute.as_tensors()))
        return f"{attribute.type.name} {attribute.value!r}"

    def _subgraph(self, graph: ir.Graph, path: tuple[str, ...]) -> str:
        for index, value in enumerate(graph.inputs):
            self.known[value] = _digest("subgraph input", "/".join(path), str(len(path)), str(index))
        self.graph(graph, path)
        return _digest("subgraph", str(len(graph.inputs)), *(self.known[value] for value in graph.outputs))


def _reached(outputs: Sequence[ir.Value], boundaries: Boundaries) -> tuple[set[ir.Value], set[ir.Node]]:
    """What the outputs depend on, without what lies inside blocks."""
    pending, values, nodes = list(outputs), set(), set()
    while pending:
        value = pending.pop()
        if value in values:
            continue
        values.add(value)
        boundary = boundaries.get(value)
        node = value.producer()
        if boundary is not None:
            pending.extend(boundary.inputs)
        elif node is not None and node not in nodes:
            nodes.add(node)
            pending.extend(source for source in node.inputs if source is not None)
            for attribute in node.attributes.values():
                if attribute.is_ref():
                    continue
                if attribute.type == ir.AttributeType.GRAPH:
                    pending.extend(attribute.as_graph().outputs)
                elif attribute.type == ir.AttributeType.GRAPHS:
                    pending.extend(value for graph in attribute.as_graphs() for value in graph.outputs)
    return values, nodes


def _digest(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode("utf-8", "surrogatepass")).hexdigest()
