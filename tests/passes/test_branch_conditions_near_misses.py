"""What is no condition, what must run whatever is taken, and what is refused with a reason."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir
import pytest
from any_body import Graph
from conditional_graphs import (
    FLAG,
    MASK,
    WIDTH,
    X,
    finished,
    flags,
    layer,
    masks,
)
from executed import executed
from harness import check_rewrite
from onnx import TensorProto, helper

from sparse_onnx.passes.branch_conditions import BranchConditions


def _product_with_a_mask(graph: Graph) -> str:
    """0 * inf is NaN."""
    return graph.op("Add", "x", graph.op("Mul", graph.op("Cast", "mask", to=1), layer(graph, "x")))


def _attention(graph: Graph) -> str:
    scores = graph.op("MatMul", layer(graph, "x"), graph.op("Transpose", layer(graph, "x"), perm=[1, 0]))
    seen = graph.op("Equal", graph.op("Transpose", "mask", perm=[1, 0]), "mask")
    return graph.op("Softmax", graph.op("Where", seen, scores, graph.constant(np.float32(-1e9))))


def _within_rows(graph: Graph) -> str:
    return graph.op(
        "Where", graph.op("Less", "x", graph.vector(WIDTH)), layer(graph, "x"), graph.op("Neg", "x")
    )


def _cheap(graph: Graph) -> str:
    return graph.op("Where", "mask", graph.op("Tanh", "x"), "x")


def _read_elsewhere(graph: Graph) -> str:
    hidden = layer(graph, "x")
    return graph.op("Add", graph.op("Where", "mask", graph.op("Neg", hidden), "x"), hidden)


def _decides_itself(graph: Graph) -> str:
    hidden = layer(graph, "x")
    best = graph.op("ReduceMax", hidden, graph.ints(-1))
    return graph.op("Where", graph.op("Less", best, graph.constant(np.float32(0.5))), hidden, "x")


def _same_sides(graph: Graph) -> str:
    hidden = layer(graph, "x")
    return graph.op("Where", "mask", hidden, hidden)


def _other_order(graph: Graph) -> str:
    """Taken where the mask is true by one, where it is false by the other."""
    hidden = layer(graph, "x")
    return graph.op("Add", graph.op("Where", "mask", hidden, "x"), graph.op("Where", "mask", "x", hidden))


def _padding(graph: Graph) -> str:
    """Zeros where there is no token: no batch is all padding, and the whole network would stand in a branch."""
    per_batch = graph.op("Unsqueeze", layer(graph, "x"), graph.ints(0))
    present = graph.op("Expand", graph.op("Unsqueeze", "mask", graph.ints(0)), graph.ints(2, 1, 1))
    zeros = graph.op("ConstantOfShape", graph.op("Shape", "x"))
    return graph.op("ReduceMax", graph.op("Where", present, per_batch, zeros), graph.ints(0), keepdims=0)


def _constant(graph: Graph) -> str:
    return graph.op("Where", graph.constant(np.asarray(True)), layer(graph, "x"), "x")


ALONE = [
    _product_with_a_mask,
    _attention,
    _within_rows,
    _cheap,
    _read_elsewhere,
    _decides_itself,
    _same_sides,
    _other_order,
    _padding,
    _constant,
]


@pytest.mark.parametrize("write", ALONE)
def test_left_alone(write: Callable[[Graph], str]) -> None:
    graph = Graph()
    model = finished(graph, [X, MASK], [write(graph)])
    after, outcome = check_rewrite(model, BranchConditions(), rewritten=0, feeds=masks()[:3])
    assert outcome.matched == 0 and not any(node.op_type == "If" for node in after.graph)


def test_an_output_of_the_graph_is_computed() -> None:
    graph = Graph()
    hidden = layer(graph, "x")
    model = finished(graph, [X, FLAG], [graph.op("Where", "flag", hidden, "x")])
    value = next(node for node in model.graph if node.op_type == "Tanh").outputs[0]
    model.graph.outputs.append(value)
    check_rewrite(model, BranchConditions(), rewritten=0, feeds=flags())


def _random(graph: Graph) -> str:
    noisy = graph.op("Add", layer(graph, "x"), graph.op("RandomNormalLike", "x"))
    return graph.op("MatMul", noisy, graph.op("RandomNormal", shape=[WIDTH, WIDTH]))


def _dropout(graph: Graph) -> str:
    half, training = graph.constant(np.float32(0.5)), graph.constant(np.asarray(True))
    return graph.op("Dropout", layer(graph, "x"), half, training)


def _unknown_operator(graph: Graph) -> str:
    return graph.op("Counted", layer(graph, "x"), domain="elsewhere")


def _unknown_contrib(graph: Graph) -> str:
    return graph.op("BiasDropout", layer(graph, "x"), graph.vector(WIDTH), domain="com.microsoft")


HELD = {
    "random numbers": (_dropout, "Dropout 'n2' stays: its results are random"),
    "operators of others": (_unknown_operator, "operators of 'elsewhere' are not known"),
    "operators of ORT": (_unknown_contrib, "com.microsoft::BiasDropout is not known"),
}


@pytest.mark.parametrize("name", HELD)
def test_held(name: str) -> None:
    """What must run, and all that it needs."""
    write, reason = HELD[name]
    graph = Graph()
    y = graph.op("Where", "flag", write(graph), "x")
    model = _typed(graph, y)
    after = ir.from_proto(ir.to_proto(model))
    outcome = BranchConditions()(after)
    assert not outcome.modified and outcome.matched == 1
    [refusal] = outcome.refusals
    assert reason in refusal.reason and refusal.by == "branch_conditions"


def _typed(graph: Graph, y: str) -> ir.Model:
    proto = helper.make_graph(
        graph.nodes,
        "g",
        [helper.make_tensor_value_info(*each) for each in (X, FLAG)],
        [helper.make_tensor_value_info(y, TensorProto.FLOAT, ["T", WIDTH])],
        graph.initializers,
    )
    imports = [helper.make_opsetid(domain, version) for domain, version in (("", 20), ("elsewhere", 1))]
    return ir.from_proto(helper.make_model(proto, opset_imports=imports, ir_version=10))


def test_the_rest_moves_where_random_numbers_stay() -> None:
    graph = Graph()
    model = finished(graph, [X, FLAG], [graph.op("Where", "flag", _random(graph), "x")])
    outcome = BranchConditions()(model)
    assert outcome.rewritten == 1 and not outcome.refusals
    assert {"RandomNormalLike", "RandomNormal"} <= {node.op_type for node in model.graph}
    [taken, left] = [executed(model, each) for each in flags()]
    assert taken["MatMul"] == 2 and left["MatMul"] == 0 and left["RandomNormal"] == 1


def test_sizes_that_nothing_tells_are_refused() -> None:
    """Which rows NonZero finds decides how many the side has, and the other side is one number."""
    graph = Graph()
    found = graph.op(
        "Transpose", graph.op("NonZero", graph.op("ReduceMax", "x", graph.ints(1), keepdims=0)), perm=[1, 0]
    )
    picked = graph.op("MatMul", graph.op("GatherND", "x", found), graph.weight(WIDTH, WIDTH))
    picked = graph.op(
        "GatherND",
        picked,
        graph.op(
            "Transpose",
            graph.op("NonZero", graph.op("ReduceMax", picked, graph.ints(1), keepdims=0)),
            perm=[1, 0],
        ),
    )
    y = graph.op("Where", "flag", picked, graph.constant(np.float32(0)))
    model = finished(graph, [X, FLAG], [y])
    check_rewrite(model, BranchConditions(), rewritten=0, feeds=flags(), refused=["is that of no value"])


def test_unknown_ranks_are_refused() -> None:
    graph = Graph()
    y = graph.op("Where", "flag", graph.op("Reshape", layer(graph, "x"), "sizes"), graph.vector(WIDTH))
    model = finished(graph, [X, FLAG, ("sizes", TensorProto.INT64, ["N"])], [y])
    model.graph.outputs[0].shape = ir.Shape([None, WIDTH])
    feeds = [each | {"sizes": np.asarray([-1, WIDTH])} for each in flags()]
    check_rewrite(
        model, BranchConditions(), rewritten=0, feeds=feeds, refused=["the number of axes of 'Reshape_2_0'"]
    )


def test_strings_are_refused() -> None:
    graph = Graph()
    best = graph.op("ArgMax", layer(graph, "x"), axis=1)
    words = graph.op("Gather", graph.constant(np.asarray(["a"] * WIDTH, object)), best)
    y = graph.op("Where", "mask", words, graph.constant(np.asarray(["b"], object)))
    model = finished(graph, [X, MASK], [y])
    outcome = BranchConditions()(model)
    assert not outcome.modified and "tensor of numbers" in outcome.refusals[0].reason


def test_old_opsets_are_refused() -> None:
    graph = Graph()
    model = finished(graph, [X, FLAG], [graph.op("Where", "flag", layer(graph, "x"), "x")], opset=13)
    check_rewrite(model, BranchConditions(), rewritten=0, feeds=flags(), refused=["opset 13"])


def test_choices_in_bodies_are_refused() -> None:
    graph, inner = Graph(), Graph()
    y = inner.op("Where", "flag", layer(inner, "x"), "x")
    other = [helper.make_node("Identity", ["x"], ["same"])]
    results = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["T", WIDTH]) for name in (y, "same")]
    branches = {
        "then_branch": helper.make_graph(inner.nodes, "then", [], results[:1], inner.initializers),
        "else_branch": helper.make_graph(other, "else", [], results[1:]),
    }
    model = finished(graph, [X, FLAG, ("use", TensorProto.BOOL, [])], [graph.op("If", "use", **branches)])
    feeds = [each | {"use": np.asarray(True)} for each in flags()]
    check_rewrite(
        model,
        BranchConditions(),
        rewritten=0,
        feeds=feeds,
        refused=["it stands in the body of an If, Loop or Scan"],
    )
