"""A 16-bit graph as a graph in float32 that rounds to 16 bits behind every operator.

ONNX Runtime's CPU provider has no bfloat16 arithmetic, and float16 for some operators only. Torch computes such an
operator in float32 and rounds what it gives; so does this graph, which the provider runs. No operator, weight or
type conversion of the file is left out.
"""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.passes import common

from sparse_onnx.export import twin
from sparse_onnx.graph.annotate import annotate

#: Their outputs are outputs of the graphs inside them, which are rounded there.
_OF_GRAPHS = frozenset({"If", "Loop", "Scan"})


def rounding_graph(model: ir.Model) -> ir.Model:
    """The model in float32, each value that is float16 or bfloat16 in it rounded to that type. Changes `model`, too.

    Raises:
        ValueError: an operator's types are not known, so that it cannot be told what is to be rounded.
    """
    common.InlinePass()(model)
    annotate(model)
    narrow: list[tuple[ir.Value, ir.DataType]] = []
    for node in list(model.graph.all_nodes()):
        for value in node.outputs:
            if value.dtype is None and (value.uses() or value.is_graph_output()):
                raise ValueError(f"the type of '{value.name}', of a {node.op_type}, is not known")
            if value.dtype in twin.HALF and node.op_type not in _OF_GRAPHS:
                narrow.append((value, value.dtype))
    twin.widen(model, limits=False)
    for value, kind in narrow:
        _round(value, kind)
    return model


def _round(value: ir.Value, kind: ir.DataType) -> None:
    node, users = value.producer(), list(value.uses())
    assert node is not None and isinstance(node.graph, ir.Graph)
    lower = ir.node("Cast", [value], {"to": int(kind)})
    upper = ir.node("Cast", lower.outputs, {"to": int(ir.DataType.FLOAT)})
    for output, dtype, name in ((lower.outputs[0], kind, "16"), (upper.outputs[0], ir.DataType.FLOAT, "32")):
        output.dtype, output.shape, output.name = dtype, value.shape, f"{value.name}.{name}"
    rounded = upper.outputs[0]
    for user, position in users:
        user.replace_input_with(position, rounded)
    for position, output in enumerate(node.graph.outputs):
        if output is value:  # the name of an output stays
            node.graph.outputs[position] = rounded
            rounded.name, value.name = value.name, rounded.name
    node.graph.insert_after(node, [lower, upper])
