"""Emits nodes in place of others: deterministic names that are free, constants shared, provenance on every node."""

from __future__ import annotations

import itertools
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir


class Namespace:
    """The names that a model uses anywhere, and the initializers that a rewrite has added to it."""

    def __init__(self, model: ir.Model) -> None:
        self.model = model
        self._taken: set[str | None] = set()
        self._added: dict[Hashable, ir.Value] = {}
        for graph in model.graphs():
            self._taken.update(value.name for value in graph.inputs)
            self._taken.update(graph.initializers)
            for node in graph:
                self._taken.add(node.name)
                self._taken.update(value.name for value in node.outputs)

    def free(self, name: str) -> str:
        """`name`, or the first of `name_1`, `name_2`, ... that no value and no node has; taken from now on."""
        candidate, count = name, 0
        while candidate in self._taken:
            count += 1
            candidate = f"{name}_{count}"
        self._taken.add(candidate)
        return candidate

    def initializer(self, graph: ir.Graph, key: Hashable, tensor: ir.TensorProtocol) -> ir.Value:
        """The tensor as an initializer of the graph; the one that was added under the same key where there is one."""
        known = self._added.get((id(graph), key))
        if known is not None:
            return known
        tensor.name = self.free(tensor.name or "constant")
        value = ir.Value(
            name=tensor.name,
            shape=ir.Shape(tensor.shape.numpy()),
            type=ir.TensorType(tensor.dtype),
            const_value=tensor,
        )
        graph.register_initializer(value)
        self._added[id(graph), key] = value
        return value

    @property
    def added(self) -> int:
        """How many initializers were added, for `take_back`."""
        return len(self._added)

    def take_back(self, added: int) -> None:
        """Removes all initializers but the first `added` ones, and those that something reads."""
        for key in list(itertools.islice(self._added, added, None)):
            value = self._added[key]
            graph = value.graph
            if value.uses() or value.is_graph_output():
                continue
            del self._added[key]
            if isinstance(graph, ir.Graph) and value.name is not None:
                graph.initializers.pop(value.name, None)
            self._taken.discard(value.name)


class Emitter:
    """Collects the nodes of one rewrite, then puts them into the graph at once.

    Args:
        graph: where the nodes go. Constants become its initializers.
        names: of the model.
        prefix: of the nodes' names.
        metadata: put on every node.
    """

    def __init__(
        self, graph: ir.Graph, names: Namespace, prefix: str, metadata: Mapping[str, str] | None = None
    ) -> None:
        self.graph, self.names, self.prefix = graph, names, prefix
        self.metadata = dict(metadata or {})
        self.nodes: list[ir.Node] = []
        self._added = names.added

    def op(self, op_type: str, *inputs: ir.Value | None, domain: str = "", **attributes: Any) -> ir.Value:
        """A node with one output."""
        return self.ops(op_type, inputs, 1, domain=domain, **attributes)[0]

    def ops(
        self,
        op_type: str,
        inputs: Sequence[ir.Value | None],
        outputs: int,
        *,
        domain: str = "",
        **attributes: Any,
    ) -> Sequence[ir.Value]:
        """A node with several outputs."""
        name = self.names.free(f"{self.prefix}/{op_type}_{len(self.nodes)}")
        node = ir.node(
            op_type,
            inputs,
            attributes=attributes or None,
            domain=domain,
            num_outputs=outputs,
            name=name,
            metadata_props=dict(self.metadata),
        )
        for index, value in enumerate(node.outputs):
            value.name = name if outputs == 1 else self.names.free(f"{name}:{index}")
        self.nodes.append(node)
        return node.outputs

    def ints(self, *values: int) -> ir.Value:
        """A 1-D int64 constant."""
        return self.constant(np.asarray(values, np.int64))

    def scalar(self, value: float, dtype: ir.DataType) -> ir.Value:
        """A 0-D constant of a floating-point type."""
        return self.constant(np.asarray(value, dtype.numpy()))

    def constant(self, array: np.ndarray) -> ir.Value:
        """A small constant: one initializer of the graph for all equal ones."""
        shape = "x".join(map(str, array.shape))
        values = np.unique(array) if array.size > 4 else array.ravel()
        body = "_".join(map(str, values.tolist()[:4]))
        tensor = ir.Tensor(array, name=f"sparse_onnx/{array.dtype.name}[{shape}]={body}")
        return self.names.initializer(self.graph, (array.dtype.name, array.shape, array.tobytes()), tensor)

    def withdraw(self) -> None:
        """Gives the rewrite up: its nodes leave the graph, and so do the initializers that were added since it began.
        Nobody else may read what the nodes compute."""
        for node in reversed(self.nodes):
            if node.graph is not None:
                self.graph.remove(node, safe=True)
            for at in range(len(node.inputs)):
                node.replace_input_with(at, None)
        self.nodes.clear()
        self.names.take_back(self._added)

    def replace(self, node: ir.Node, output: ir.Value) -> None:
        """Puts the nodes where `node` was, and `output` in place of its first output, under that one's name."""
        old = node.outputs[0]
        output.shape, output.type = old.shape, old.type
        self.graph.insert_before(node, self.nodes)
        name = old.name
        ir.convenience.replace_all_uses_with(old, output, replace_graph_outputs=True)
        self.graph.remove(node, safe=True)
        old.name, output.name = None, name
