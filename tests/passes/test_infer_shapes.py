"""The types and shapes that onnx's inference finds, for models of any size, in every graph."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from graph.toy import external
from harness import check_rewrite
from onnx import TensorProto, helper, numpy_helper

from sparse_onnx.graph import io
from sparse_onnx.graph.stacked import stack
from sparse_onnx.passes.infer_shapes import InferShapes

node = helper.make_node
FLOAT = TensorProto.FLOAT


def branch(name: str) -> onnx.GraphProto:
    return helper.make_graph(
        [node("Relu", ["t"], [f"r_{name}"]), node("Exp", [f"r_{name}"], [name])],
        name,
        [],
        [helper.make_tensor_value_info(name, FLOAT, None)],
    )


def sample() -> onnx.ModelProto:
    graph = helper.make_graph(
        [
            node("MatMul", ["x", "w"], ["m"]),
            node("Transpose", ["m"], ["t"], perm=[1, 0]),
            node("If", ["flag"], ["y"], then_branch=branch("p"), else_branch=branch("q")),
            node("Shape", ["x"], ["s"]),
            node("Gather", ["s", "zero"], ["n"]),
            node("Concat", ["n", "one"], ["target"], axis=0),
            node("Reshape", ["m", "target"], ["z"]),
        ],
        "g",
        [helper.make_tensor_value_info("x", FLOAT, ["T", 4])],
        [
            helper.make_tensor_value_info("y", FLOAT, [5, "T"]),
            helper.make_tensor_value_info("z", FLOAT, ["T", 5]),
        ],
        [
            numpy_helper.from_array(np.ones((4, 5), np.float32), "w"),
            numpy_helper.from_array(np.asarray(True), "flag"),
            numpy_helper.from_array(np.asarray([0]), "zero"),
            numpy_helper.from_array(np.asarray([5]), "one"),
        ],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)


def test_all_graphs() -> None:
    before = ir.from_proto(sample())
    # m, t, s, n, target; in each branch r; the outputs of the branches.
    feeds = [{"x": np.ones((3, 4), np.float32)}]
    after, _ = check_rewrite(before, InferShapes(), rewritten=9, feeds=feeds)
    values = {value.name: value for graph in after.graphs() for item in graph for value in item.outputs}
    shapes = {
        name: [str(dim) for dim in value.shape] for name, value in values.items() if value.shape is not None
    }
    assert shapes["m"] == ["T", "5"] and shapes["z"] == ["T", "5"]
    for name in ("t", "r_p", "r_q", "p", "q"):
        assert shapes[name] == ["5", "T"], name
    assert values["target"].dtype == ir.DataType.INT64


def test_it_finds_what_onnx_finds() -> None:
    expected = onnx.shape_inference.infer_shapes(sample(), data_prop=True)
    after = ir.from_proto(sample())
    InferShapes()(after)
    types = {value.name: value.type for value in ir.to_proto(after).graph.value_info}
    assert types == {value.name: value.type for value in expected.graph.value_info} | {
        name: kind for name, kind in types.items() if name in ("w", "flag", "zero", "one")
    }


def nested(depth: int) -> onnx.GraphProto:
    """A body that reshapes an outer value to an outer constant, `depth` bodies further in."""
    name = f"body_{depth}"
    kind = helper.make_tensor_value_info(f"{name}_y", FLOAT, None)
    if depth:
        inner = [nested(depth - 1), branch(f"other_{depth}")]
        item = node("If", ["c"], [f"{name}_y"], then_branch=inner[0], else_branch=inner[1])
        return helper.make_graph([item], name, [], [kind])
    own = numpy_helper.from_array(np.asarray([1]), "own")
    made = [
        node("Reshape", ["t", "target"], ["flat"]),
        node("Unsqueeze", ["flat", "own"], ["wide"]),
        node("Relu", ["wide"], [f"{name}_y"]),
    ]
    return helper.make_graph(made, name, [], [kind], [own])


@pytest.mark.parametrize("depth", [0, 1, 2])
def test_bodies_see_the_constants_outside(depth: int) -> None:
    graph = helper.make_graph(
        [
            node("Relu", ["x"], ["t"]),
            node("If", ["c"], ["y"], then_branch=nested(depth), else_branch=branch("e")),
        ],
        "g",
        [
            helper.make_tensor_value_info("x", FLOAT, ["T", 6]),
            helper.make_tensor_value_info("c", TensorProto.BOOL, []),
        ],
        [helper.make_empty_tensor_value_info("y")],
        [numpy_helper.from_array(np.asarray([-1, 2, 3]), "target")],
    )
    model = ir.from_proto(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    )
    InferShapes()(model)
    shapes = {v.name: v.shape for each in model.graphs() for item in each for v in item.outputs}
    assert shapes["flat"] is not None and list(shapes["flat"])[1:] == [2, 3]
    assert shapes["wide"] is not None and list(shapes["wide"])[1:] == [1, 2, 3]
    assert [list(each.initializers) for each in model.graphs()].count(["target"]) == 1


def test_weights_above_2_gb_and_stacks(tmp_path: Path) -> None:
    with open(tmp_path / "w.bin", "wb") as file:
        file.truncate(3 << 30)
    graph = helper.make_graph(
        [node("Gather", ["w", "one"], ["g"]), node("MatMul", ["x", "g"], ["y"])],
        "g",
        [helper.make_tensor_value_info("x", FLOAT, ["T", 16384])],
        [helper.make_tensor_value_info("y", FLOAT, ["T", 16384])],
        [
            external("w", [3, 16384, 16384], "w.bin", 0, 3 << 30),
            numpy_helper.from_array(np.asarray(1), "one"),
        ],
    )
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    (tmp_path / "m.onnx").write_bytes(proto.SerializeToString())
    loaded = io.load(tmp_path / "m.onnx")
    weights = loaded.graph.initializers["w"]
    assert weights.const_value is not None
    twice = stack([weights.const_value] * 2, "w")
    for tensor, shape in ((weights.const_value, [16384, 16384]), (twice, [3, 16384, 16384])):
        weights.const_value = tensor
        loaded.graph[0].outputs[0].shape = None
        assert InferShapes()(loaded).modified
        assert list(loaded.graph[0].outputs[0].shape or []) == shape
        assert weights.const_value is tensor


def test_a_graph_that_onnx_cannot_read_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object, **options: object) -> None:
        raise RuntimeError("no")

    monkeypatch.setattr(onnx.shape_inference, "infer_shapes", fail)
    assert not InferShapes()(ir.from_proto(sample())).modified
