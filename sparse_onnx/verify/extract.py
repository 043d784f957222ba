"""One lowered block as a model of its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import onnx_ir as ir

from sparse_onnx.blocks.lowered import LoweredBlock


def extract(
    model: ir.Model,
    lowered: LoweredBlock,
    values: Mapping[str, ir.Value],
    types: Sequence[ir.DataType],
    row: Sequence[int],
) -> ir.Model:
    """tokens, expert_index, expert_weight -> output. The block may lie in the body of an If, Loop or Scan, and use
    constants and values of the graphs around it.

    Args:
        model: holds the block.
        lowered: the block.
        values: of the model by name, as `named_values` gives them.
        types: of the three inputs.
        row: sizes of one token.

    Raises:
        ValueError: something inside the block depends on another input of the model.
    """
    inputs = [values[name] for name in (lowered.tokens, lowered.expert_index, lowered.expert_weight)]
    output = values[lowered.output]
    nodes, constants = _between(inputs, output)
    view = ir.GraphView(
        inputs,
        [output],
        nodes=nodes,
        initializers=constants,
        opset_imports=dict(model.opset_imports),
        name=lowered.name,
    )
    graph = view.clone()
    rows = (row, [lowered.top_k], [lowered.top_k])
    for value, dtype, sizes in zip(graph.inputs, types, rows, strict=True):
        value.type, value.shape = ir.TensorType(dtype), ir.Shape(["T", *sizes])
    return ir.Model(graph, ir_version=model.ir_version, functions=list(model.functions.values()))


def _between(inputs: Sequence[ir.Value], output: ir.Value) -> tuple[list[ir.Node], list[ir.Value]]:
    """Nodes that compute the output from the inputs, each behind those that it needs, and the constants they use."""
    nodes: list[ir.Node] = []
    constants: list[ir.Value] = []
    seen = set(inputs)
    pending: list[tuple[ir.Value, bool]] = [(output, False)]
    placed: set[ir.Node] = set()
    while pending:
        value, ready = pending.pop()
        node = value.producer()
        if ready:
            if node is not None and node not in placed:
                placed.add(node)
                nodes.append(node)
            continue
        if value in seen:
            continue
        seen.add(value)
        if value.is_initializer():
            constants.append(value)
        elif node is None:
            raise ValueError(f"the block needs '{value.name}'")
        else:
            pending.append((value, True))
            pending.extend((source, False) for source in sources(node) if source not in seen)
    return nodes, constants


def sources(node: ir.Node) -> list[ir.Value]:
    """Inputs of the node, and what its subgraphs use of the graphs around them."""
    found = [value for value in node.inputs if value is not None]
    for attribute in node.attributes.values():
        if attribute.is_ref() or attribute.type not in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS):
            continue
        single = attribute.type == ir.AttributeType.GRAPH
        for graph in [attribute.as_graph()] if single else attribute.as_graphs():
            inside = [*ir.traversal.RecursiveGraphIterator(graph)]
            graphs = {graph, *(each.graph for each in inside)}
            for each in inside:
                found.extend(
                    value for value in each.inputs if value is not None and value.graph not in graphs
                )
            found.extend(value for value in graph.outputs if value.graph not in graphs)
    return found
