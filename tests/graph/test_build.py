"""A rewrite that is given up leaves the graph as it was."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from sparse_onnx.graph.build import Emitter, Namespace


def a_model() -> ir.Model:
    x = ir.Value(name="x", shape=ir.Shape(["T", 4]), type=ir.TensorType(ir.DataType.FLOAT))
    node = ir.node("Relu", [x], name="relu")
    node.outputs[0].name = "y"
    graph = ir.Graph([x], node.outputs, nodes=[node], opset_imports={"": 18}, name="g")
    return ir.Model(graph, ir_version=10)


def test_what_is_withdrawn_is_gone() -> None:
    model = a_model()
    before = ir.to_proto(model).SerializeToString(deterministic=True)
    names, x = Namespace(model), model.graph.inputs[0]
    for placed in (True, False):
        emit = Emitter(model.graph, names, "new")
        emit.op("Reshape", emit.op("Mul", x, emit.scalar(2.0, ir.DataType.FLOAT)), emit.ints(-1, 2))
        if placed:
            model.graph.insert_before(model.graph[0], emit.nodes)
        emit.withdraw()
        assert ir.to_proto(model).SerializeToString(deterministic=True) == before
        assert [use.node.name for use in x.uses()] == ["relu"]


def test_constants_that_others_read_stay() -> None:
    model = a_model()
    names, x = Namespace(model), model.graph.inputs[0]
    kept, given_up = Emitter(model.graph, names, "kept"), Emitter(model.graph, names, "given_up")
    given_up.op("Reshape", x, given_up.ints(-1, 2))
    shared = kept.op("Reshape", x, kept.ints(-1, 2))
    given_up.op("Reshape", x, given_up.ints(-1, 1))
    model.graph.insert_before(model.graph[0], kept.nodes)
    given_up.withdraw()
    assert [value.const_value.numpy().tolist() for value in model.graph.initializers.values()] == [[-1, 2]]
    # The name and the key are free again, of those that left.
    again = Emitter(model.graph, names, "again")
    value = again.constant(np.asarray([-1, 1], np.int64))
    assert value.name in model.graph.initializers and len(model.graph.initializers) == 2
    assert again.ints(-1, 2) is shared.producer().inputs[1]
