"""ScatterND(add) is a hazard unless its indices are provably distinct."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir
import pytest
from onnx import NodeProto, TensorProto, helper, numpy_helper

from sparse_onnx.inspect.hazards import hazards

node = helper.make_node


def model(
    indices: Sequence[NodeProto], initializers: dict[str, np.ndarray], reduction: str = "add"
) -> ir.Model:
    """y = ScatterND(zeros [T, D], indices, updates), with `indices` computed by the nodes."""
    nodes = [
        *indices,
        node("ScatterND", ["zeros", "indices", "updates"], ["y"], name="scatter", reduction=reduction),
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [
            helper.make_tensor_value_info("zeros", TensorProto.FLOAT, ["T", 4]),
            helper.make_tensor_value_info("updates", TensorProto.FLOAT, ["N", 4]),
            helper.make_tensor_value_info("given", TensorProto.INT64, ["N", 1]),
            helper.make_tensor_value_info("scores", TensorProto.FLOAT, ["T", 8]),
            helper.make_tensor_value_info("vector", TensorProto.FLOAT, ["N"]),
            helper.make_tensor_value_info("limit", TensorProto.INT64, []),
        ],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["T", 4])],
        [numpy_helper.from_array(array, name) for name, array in initializers.items()],
        value_info=[helper.make_tensor_value_info("chosen", TensorProto.INT64, ["T", 2])],
    )
    return ir.from_proto(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10))


LAST = {"last": np.asarray([-1])}
TOPK = {
    **LAST,
    "k": np.asarray([2]),
    "expert": np.asarray(3),
    "zero": np.asarray(0),
    "axis1": np.asarray([1]),
}
ROUTED = [node("TopK", ["scores", "k"], ["top", "chosen"])]

SAFE = {
    "distinct constants": ([], {"indices": np.asarray([[0], [2], [1]])}),
    "a range": (
        [node("Range", ["zero", "limit", "one"], ["r"]), node("Unsqueeze", ["r", "last"], ["indices"])],
        {**TOPK, "one": np.asarray(1)},
    ),
    "a permutation": (
        [
            node("Shape", ["vector"], ["n"]),
            node("TopK", ["vector", "n"], ["sorted", "order"], axis=0),
            node("Unsqueeze", ["order", "last"], ["indices"]),
        ],
        LAST,
    ),
    "all places of a mask": (
        [
            node("Greater", ["scores", "half"], ["mask"]),
            node("NonZero", ["mask"], ["places"]),
            node("Transpose", ["places"], ["indices"], perm=[1, 0]),
        ],
        {"half": np.asarray(0.5, np.float32)},
    ),
    "the tokens of one expert": (
        [
            *ROUTED,
            node("Equal", ["chosen", "expert"], ["mask"]),
            node("NonZero", ["mask"], ["places"]),
            node("Gather", ["places", "zero"], ["token"], axis=0),
            node("Unsqueeze", ["token", "last"], ["indices"]),
        ],
        TOPK,
    ),
}

RISKY = {
    "indices from outside": ([node("Identity", ["given"], ["indices"])], {}),
    "repeated constants": ([], {"indices": np.asarray([[0], [2], [0]])}),
    "tokens of all experts, sorted": (
        [
            node("Shape", ["vector"], ["n"]),
            node("TopK", ["vector", "n"], ["sorted", "order"], axis=0),
            node("Div", ["order", "k"], ["token"]),
            node("Unsqueeze", ["token", "last"], ["indices"]),
        ],
        TOPK,
    ),
    "the experts, as torch's index_add sees them": (
        [*ROUTED, node("Reshape", ["chosen", "column"], ["indices"])],
        {**TOPK, "column": np.asarray([-1, 1])},
    ),
    "the slots of one expert": (
        [
            *ROUTED,
            node("Equal", ["chosen", "expert"], ["mask"]),
            node("NonZero", ["mask"], ["places"]),
            node("Gather", ["places", "axis1"], ["slot"], axis=0),
            node("Reshape", ["slot", "column"], ["indices"]),
        ],
        {**TOPK, "column": np.asarray([-1, 1])},
    ),
    "places taken apart": (
        [
            node("Greater", ["scores", "half"], ["mask"]),
            node("NonZero", ["mask"], ["places"]),
            node("Transpose", ["places"], ["pairs"], perm=[1, 0]),
            node("Reshape", ["pairs", "column"], ["indices"]),
        ],
        {"half": np.asarray(0.5, np.float32), "column": np.asarray([-1, 1])},
    ),
    "one row of the places of any mask": (
        [
            node("Greater", ["scores", "half"], ["mask"]),
            node("NonZero", ["mask"], ["places"]),
            node("Gather", ["places", "zero"], ["token"], axis=0),
            node("Unsqueeze", ["token", "last"], ["indices"]),
        ],
        {**TOPK, "half": np.asarray(0.5, np.float32)},
    ),
}


@pytest.mark.parametrize("name", SAFE)
def test_distinct_indices_are_no_hazard(name: str) -> None:
    assert hazards(model(*SAFE[name])) == []


@pytest.mark.parametrize("name", RISKY)
def test_indices_that_may_repeat_are(name: str) -> None:
    (line,) = hazards(model(*RISKY[name]))
    assert "scatter" in line and "18048" in line


@pytest.mark.parametrize("reduction", ["add", "mul", "max", "min"])
def test_every_reduction_loses_updates(reduction: str) -> None:
    (line,) = hazards(model(*RISKY["indices from outside"], reduction=reduction))
    assert f"reduction={reduction}" in line


def test_without_a_reduction_there_is_no_hazard() -> None:
    assert hazards(model(*RISKY["indices from outside"], reduction="none")) == []


def test_it_looks_into_functions() -> None:
    outer = model(*RISKY["indices from outside"])
    scatter = outer.graph.node("scatter")
    function = ir.Function("local", "f", graph=ir.Graph([], [], nodes=[]), attributes=[])
    values = [ir.Value(name=name) for name in ("zeros", "indices", "updates")]
    inner = ir.node("ScatterND", values, attributes={"reduction": "add"}, name="inside")
    function = ir.Function("local", "f", graph=ir.Graph(values, inner.outputs, nodes=[inner]), attributes=[])
    outer.functions[function.identifier()] = function
    scatter.attributes["reduction"] = ir.AttrString("reduction", "none")
    (line,) = hazards(outer)
    assert "inside in function local::f" in line


def test_several_are_one_line() -> None:
    several = model(*RISKY["indices from outside"])
    scatter = several.graph.node("scatter")
    for number in range(5):
        several.graph.append(
            ir.node("ScatterND", list(scatter.inputs), attributes={"reduction": "add"}, name=f"more{number}")
        )
    (line,) = hazards(several)
    assert "and 3 more" in line
