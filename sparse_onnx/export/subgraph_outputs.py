"""Outputs of an `If`'s branches that the branch only passes on.

ONNX wants each output of a subgraph to be made in it. onnx-ir's elimination of Identity takes away the node that
did so for a value from outside.
"""

from __future__ import annotations

import onnx_ir as ir


def own(model: ir.Model) -> None:
    """Puts an Identity before each output of a subgraph that the subgraph does not make, in place."""
    for node in list(model.graph.all_nodes()):
        for attribute in node.attributes.values():
            if attribute.type == ir.AttributeType.GRAPH:
                _own(attribute.as_graph())


def _own(graph: ir.Graph) -> None:
    seen: set[int] = set()
    for position, value in enumerate(graph.outputs):
        maker = value.producer()
        if maker is not None and maker.graph is graph and id(value) not in seen:
            seen.add(id(value))
            continue
        name = f"{graph.name or 'branch'}_output_{position}"
        node = ir.node("Identity", [value], outputs=[ir.Value(name=name, shape=value.shape, type=value.type)])
        graph.append(node)
        graph.outputs[position] = node.outputs[0]
