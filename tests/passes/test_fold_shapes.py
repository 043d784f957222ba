"""Sizes that are known become constants; what is not known stays, and so does what is no shape."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from harness import check_rewrite
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import NodeProto, TensorProto, helper, numpy_helper

from sparse_onnx.passes.fold_shapes import FoldShapes

node = helper.make_node
INT64, FLOAT = TensorProto.INT64, TensorProto.FLOAT
X = np.zeros((3, 4, 6), np.float32)

CONSTANTS = {
    "zero": np.asarray(0),
    "one": np.asarray(1),
    "two": np.asarray(2),
    "minus": np.asarray(-1),
    "first": np.asarray([0]),
    "second": np.asarray([1]),
    "third": np.asarray([2]),
    "end": np.asarray([2**62]),
    "both": np.asarray([1, 2]),
    "vector": np.asarray([7, -3, 5]),
    "other": np.asarray([2, 2, -2]),
    "nothing": np.asarray([0, 1, 0]),
    "column": np.asarray([3, 1]),
    "narrow": np.asarray([7, -3, 5], np.int32),
    "wide": np.asarray([2**40]),
    "flags": np.asarray([True, False, True]),
    "most": np.asarray([2**62]),
    "many": np.arange(300),
    "real": np.asarray([1.5, 2.5], np.float32),
}


def model(nodes: Sequence[NodeProto], kind: int = INT64, shape: Sequence[object] = ("a", 4, 6)) -> ir.Model:
    """x of a shape -> y, which the nodes give; `out` is read by one more node, since outputs of a graph stay."""
    graph = helper.make_graph(
        [*nodes, node("Concat", ["out", "out"], ["y"], axis=0)],
        "g",
        [helper.make_tensor_value_info("x", FLOAT, list(shape))],
        [helper.make_tensor_value_info("y", kind, None)],
        [numpy_helper.from_array(array, name) for name, array in CONSTANTS.items()],
    )
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    return ir.from_proto(onnx.shape_inference.infer_shapes(proto))


FOLDED = {
    "legacy chain": (
        [
            node("Shape", ["x"], ["s"]),
            node("Gather", ["s", "one"], ["a"], axis=0),
            node("Gather", ["s", "third"], ["b"], axis=0),
            node("Unsqueeze", ["a", "first"], ["c"]),
            node("Mul", ["c", "b"], ["d"]),
            node("Concat", ["d", "first", "second"], ["out"], axis=0),
        ],
        5,
    ),
    "a part of a shape": ([node("Shape", ["x"], ["out"], start=1)], 1),
    "slices": ([node("Shape", ["x"], ["s"]), node("Slice", ["s", "second", "end"], ["out"])], 1),
    "steps": ([node("Slice", ["vector", "first", "end", "first", "third"], ["out"])], 1),
    "squeeze": ([node("Unsqueeze", ["vector", "first"], ["u"]), node("Squeeze", ["u", "first"], ["out"])], 2),
    "reshape": ([node("Reshape", ["vector", "column"], ["out"])], 1),
    "arithmetic": (
        [
            node("Add", ["vector", "other"], ["a"]),
            node("Sub", ["a", "one"], ["b"]),
            node("Mul", ["b", "two"], ["c"]),
            node("Neg", ["c"], ["out"]),
        ],
        4,
    ),
    "division towards zero": ([node("Div", ["vector", "other"], ["out"])], 1),
    "modulo by the sign of the divisor": ([node("Mod", ["vector", "other"], ["out"])], 1),
    "torch's expand": (
        [
            node("Shape", ["vector"], ["n"]),
            node("ConstantOfShape", ["n"], ["ones"], value=numpy_helper.from_array(np.asarray([1]))),
            node("Mul", ["ones", "minus"], ["m"]),
            node("Equal", ["vector", "m"], ["e"]),
            node("Where", ["e", "ones", "vector"], ["out"]),
        ],
        5,
    ),
    "casts": (
        [
            node("Cast", ["vector"], ["i"], to=TensorProto.INT32),
            node("Cast", ["i"], ["b"], to=TensorProto.BOOL),
            node("Cast", ["b"], ["out"], to=INT64),
        ],
        3,
    ),
}


@pytest.mark.parametrize("name", FOLDED)
def test_folded(name: str) -> None:
    nodes, count = FOLDED[name]
    check_rewrite(model(nodes), FoldShapes(), rewritten=count, feeds=[{"x": X}])


STAY = {
    "sizes that are not known": [
        node("Shape", ["x"], ["s"]),
        node("Gather", ["s", "first"], ["out"], axis=0),
    ],
    "division by zero": [node("Div", ["vector", "nothing"], ["out"])],
    "no such place": [node("Gather", ["both", "both"], ["out"], axis=0)],
    "more than 64 bits": [node("Mul", ["most", "vector"], ["out"])],
    "more than 32 bits": [
        node("Cast", ["wide"], ["i"], to=TensorProto.INT32),
        node("Cast", ["i"], ["out"], to=INT64),
    ],
    "many": [node("Add", ["many", "one"], ["out"])],
    "backwards": [node("Slice", ["vector", "end", "first", "first", "minus_one"], ["out"])],
    "a reshape that copies sizes": [node("Reshape", ["vector", "first"], ["out"])],
    "numbers": [node("Cast", ["real"], ["out"], to=INT64)],
    "remainders as in C": [node("Mod", ["vector", "other"], ["out"], fmod=1)],
}


@pytest.mark.parametrize("name", STAY)
def test_what_stays(name: str) -> None:
    before = model(STAY[name])
    assert not FoldShapes()(before).modified


def test_tensors_of_zeros_stay() -> None:
    nodes = [node("ConstantOfShape", ["both"], ["out"], value=numpy_helper.from_array(np.asarray([0])))]
    check_rewrite(model(nodes), FoldShapes(), rewritten=0, feeds=[{"x": X}])


def test_all_sizes() -> None:
    nodes = [
        node("Size", ["x"], ["n"]),
        node("Unsqueeze", ["n", "first"], ["out"]),
    ]
    check_rewrite(model(nodes, shape=(3, 4, 6)), FoldShapes(), rewritten=2, feeds=[{"x": X}])
    check_rewrite(model(nodes), FoldShapes(), rewritten=0, feeds=[{"x": X}])


def test_initializers_that_callers_can_override_are_no_constants() -> None:
    proto = ir.to_proto(model([node("Add", ["vector", "one"], ["out"])]))
    proto.graph.input.append(helper.make_tensor_value_info("vector", INT64, [3]))
    assert not FoldShapes()(ir.from_proto(proto)).modified


def test_outputs_and_lowered_blocks_stay() -> None:
    nodes = [node("Add", ["vector", "one"], ["out"])]
    entry = nodes[0].metadata_props.add()
    entry.key, entry.value = "sparse_onnx.form", "grouped"
    assert not FoldShapes()(model(nodes)).modified


def test_in_branches() -> None:
    def branch(name: str, constant: str) -> onnx.GraphProto:
        return helper.make_graph(
            [node("Mul", ["d", constant], [f"m{name}"]), node("Reshape", ["x", f"m{name}"], [name])],
            name,
            [],
            [helper.make_tensor_value_info(name, FLOAT, None)],
        )

    nodes = [
        node("Shape", ["x"], ["s"], start=1),
        node("Gather", ["s", "first"], ["d"], axis=0),
        node(
            "If",
            ["flag"],
            ["r"],
            then_branch=branch("t", "minus_unit"),
            else_branch=branch("u", "minus_unit"),
        ),
        node("Identity", ["r"], ["out"]),
    ]
    proto = ir.to_proto(model(nodes, FLOAT))
    for name, array in (("flag", np.asarray(True)), ("minus_unit", np.asarray([18]))):
        proto.graph.initializer.append(numpy_helper.from_array(array, name))
    before = ir.from_proto(onnx.shape_inference.infer_shapes(proto, data_prop=True))
    # In each branch 4 * 18 = 72 elements, all there are.
    after, _ = check_rewrite(before, FoldShapes(), rewritten=4, feeds=[{"x": X}])
    assert sorted(item.op_type for item in after.graph.all_nodes()) == ["Concat", "Identity", "If"] + 2 * [
        "Reshape"
    ]


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_arithmetic_is_ort_s(data: st.DataObject) -> None:
    """Elementwise operators on integers of both signs, broadcast: ORT and the folding agree."""
    numbers = st.lists(st.integers(-9, 9).filter(bool), min_size=1, max_size=1) | st.lists(
        st.integers(-9, 9).filter(bool), min_size=4, max_size=4
    )
    a, b = data.draw(numbers), data.draw(numbers)
    op = data.draw(st.sampled_from(["Add", "Sub", "Mul", "Div", "Mod"]))
    kind = data.draw(st.sampled_from([np.int64, np.int32]))
    proto = ir.to_proto(model([node(op, ["p", "q"], ["i"]), node("Cast", ["i"], ["out"], to=INT64)]))
    for name, values in (("p", a), ("q", b)):
        proto.graph.initializer.append(numpy_helper.from_array(np.asarray(values, kind), name))
    before = ir.from_proto(onnx.shape_inference.infer_shapes(proto))
    check_rewrite(before, FoldShapes(), rewritten=2, feeds=[{"x": X}])
