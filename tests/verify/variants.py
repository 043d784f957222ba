"""Models that verification found hard, built on those of `builders`."""

from __future__ import annotations

import copy
from collections.abc import Callable

import numpy as np
import onnx
import onnx_ir as ir
from builders import Shape, layered_model, routed_model
from onnx import TensorProto, helper, numpy_helper

from sparse_onnx.passes.fuse_gating import FuseGating


def clone(model: ir.Model) -> ir.Model:
    return ir.from_proto(copy.deepcopy(ir.to_proto(model)))


def lowered(model: ir.Model) -> ir.Model:
    result = clone(model)
    FuseGating()(result)
    return result


def change(model: ir.Model, name: str, edit: Callable[[np.ndarray], None]) -> ir.Model:
    """A copy in which `edit` has changed one initializer in place."""
    result = clone(model)
    value = result.graph.initializers[name]
    assert value.const_value is not None
    array = value.const_value.numpy().copy()
    edit(array)
    value.const_value = ir.Tensor(array, name=name)
    return result


def edited(model: ir.Model, edit: Callable[[onnx.ModelProto], None]) -> ir.Model:
    proto = ir.to_proto(model)
    edit(proto)
    return ir.from_proto(proto)


def in_a_branch() -> ir.Model:
    """`routed_model` with its block in the then-branch of an If that the input `use` decides."""

    def edit(proto: onnx.ModelProto) -> None:
        graph = proto.graph
        block = graph.node[0]
        then = helper.make_graph(
            [block], "then", [], [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["T", 16])]
        )
        other = helper.make_graph(
            [helper.make_node("Identity", ["tokens"], ["z"], name="pass")],
            "else",
            [],
            [helper.make_tensor_value_info("z", TensorProto.FLOAT, ["T", 16])],
        )
        del graph.node[:], graph.output[:]
        graph.node.append(
            helper.make_node("If", ["use"], ["out"], name="choice", then_branch=then, else_branch=other)
        )
        graph.input.append(helper.make_tensor_value_info("use", TensorProto.BOOL, []))
        graph.output.append(helper.make_tensor_value_info("out", TensorProto.FLOAT, ["T", 16]))

    return edited(routed_model(Shape()), edit)


def with_ids(spelling: str, rows: int = 50) -> ir.Model:
    """`layered_model` behind an embedding of `ids [T]`, which reach the table in one of several ways."""
    shape = Shape(experts=8)

    def edit(proto: onnx.ModelProto) -> None:
        graph, hidden = proto.graph, shape.hidden
        rng = np.random.default_rng(3)
        table, source = rng.standard_normal((rows, hidden)).astype(np.float32), "ids"
        nodes, constants = [], {}
        if spelling == "clip":
            constants |= {"low": np.asarray(0), "high": np.asarray(rows - 1)}
            nodes.append(helper.make_node("Clip", ["ids", "low", "high"], ["clipped"]))
            source = "clipped"
        elif spelling == "where":
            constants |= {"pad": np.asarray(rows - 1)}
            nodes.append(helper.make_node("Equal", ["ids", "pad"], ["is_pad"]))
            nodes.append(helper.make_node("Where", ["is_pad", "pad", "ids"], ["chosen"]))
            source = "chosen"
        elif spelling == "concat":
            constants |= {"start": np.asarray([1]), "one": np.asarray([1]), "end": np.asarray([1 << 40])}
            nodes.append(helper.make_node("Concat", ["start", "ids"], ["joined"], axis=0))
            nodes.append(helper.make_node("Slice", ["joined", "one", "end"], ["sliced"]))
            source = "sliced"
        if spelling == "dequantized":
            constants |= {"q": rng.integers(-9, 9, (hidden, rows)).astype(np.int8), "s": np.float32(0.2)}
            nodes.append(helper.make_node("DequantizeLinear", ["q", "s"], ["turned"]))
            nodes.append(helper.make_node("Transpose", ["turned"], ["table"], perm=[1, 0]))
        else:
            constants["table"] = table
        nodes.append(helper.make_node("Gather", ["table", source], ["x"]))
        for node in reversed(nodes):
            graph.node.insert(0, node)
        for name, array in constants.items():
            graph.initializer.append(numpy_helper.from_array(np.asarray(array), name))
        del graph.input[:]
        graph.input.append(helper.make_tensor_value_info("ids", TensorProto.INT64, ["T"]))
        graph.value_info.append(helper.make_tensor_value_info("x", TensorProto.FLOAT, ["T", hidden]))

    return edited(layered_model(shape, layers=1), edit)
