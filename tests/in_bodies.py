"""Models whose nodes stand in the body of an If."""

from __future__ import annotations

import copy

import numpy as np
import onnx
import onnx_ir as ir
from onnx import TensorProto, helper, numpy_helper


def in_body(model: onnx.ModelProto, where: str, x: str) -> ir.Model:
    """All nodes in the body of an If. `where` its integers are: inside, outside or dequantized outside."""
    graph, result = model.graph, copy.deepcopy(model.graph.output[0])
    zero = copy.deepcopy(result)
    zero.name = "zero"
    kept = [node for node in graph.node if where == "dequantized" and node.op_type == "DequantizeLinear"]
    then = helper.make_graph([node for node in graph.node if node not in kept], "then", [], [result])
    if where == "inside":
        then.initializer.extend(graph.initializer)
        del graph.initializer[:]
    other = helper.make_graph(
        [helper.make_node("Mul", [x, "nothing"], ["zero"], name="zero")], "else", [], [zero]
    )
    graph.initializer.append(numpy_helper.from_array(np.float32(0), "nothing"))
    graph.input.append(helper.make_tensor_value_info("c", TensorProto.BOOL, []))
    graph.output[0].name = "out"
    del graph.node[:], graph.value_info[:]
    both = {"then_branch": then, "else_branch": other}
    graph.node.extend([*kept, helper.make_node("If", ["c"], ["out"], name="if", **both)])
    return ir.from_proto(model)
