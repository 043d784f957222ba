"""All experts on all tokens: exact for every block and routing, whatever the experts that nobody chose compute."""

from __future__ import annotations

import collections

import numpy as np
import onnx_ir as ir
import pytest
from any_block import KINDS, constant_weights, expected, frozen, open_sizes, routing, shapes
from any_body import dense_model, outlined
from bodies_of_experts import linear
from builders import Shape, layered_model, routed_model
from harness import check_rewrite, run_model
from hypothesis import given, settings
from hypothesis import strategies as st
from moe_cases import Case, close, label, routings, specs
from onnx import TensorProto, helper
from quantized_blocks import Storage, quantized_model

from sparse_onnx.blocks import ExpertSpec
from sparse_onnx.passes.dense_experts import DenseExperts

#: All that the form may consist of.
STATIC = {
    "Add", "Cast", "Clip", "Equal", "Erf", "Gelu", "Greater", "MatMul", "Min", "Mul", "ReduceMax", "ReduceSum", "Relu",
    "Sigmoid", "Slice", "Split", "Squeeze", "Tanh", "Transpose", "Unsqueeze", "Where",
}  # fmt: skip


@settings(max_examples=60, deadline=None, derandomize=True)
@given(shapes(), st.sampled_from([0, 1, 2, 7, 33]), st.sampled_from(KINDS), st.sampled_from([18, 20, 23]))
def test_any_block_any_routing(shape: Shape, tokens: int, kind: str, opset: int) -> None:
    model = routed_model(shape, opset=opset)
    after, _ = check_rewrite(
        model, DenseExperts(), rewritten=1, feeds=[routing(shape, tokens, kind)], tolerance=3e-6
    )
    assert {node.op_type for node in after.graph} <= STATIC
    for name in set(model.graph.initializers) - {"fc1_bias", "fc2_bias", "gate_bias", "up_bias", "down_bias"}:
        assert name in after.graph.initializers, "matrices stay as they are stored"


@pytest.mark.slow
@settings(max_examples=1000, deadline=None, derandomize=True)
@given(shapes(), st.integers(0, 40), st.sampled_from(KINDS), st.integers(18, 24))
def test_any_block_any_routing_sweep(shape: Shape, tokens: int, kind: str, opset: int) -> None:
    feeds = [routing(shape, tokens, kind)]
    check_rewrite(routed_model(shape, opset=opset), DenseExperts(), rewritten=1, feeds=feeds, tolerance=3e-6)


@pytest.mark.parametrize("biases", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("spec", list(specs()), ids=label)
def test_equals_the_reference(spec: ExpertSpec, dtype: str, biases: bool) -> None:
    rng = np.random.default_rng(0)
    case = Case(spec, dtype=dtype, weight_dtype=dtype)
    weights = case.weights(rng, biases)
    model = constant_weights(case, weights)
    assert DenseExperts()(model).rewritten == 1
    for index in routings(case.experts, case.top_k, rng).values():
        feeds = case.routing(rng, index)
        assert close(run_model(model, feeds)[0], expected(case, feeds, weights), dtype)


@pytest.mark.parametrize(
    ("dtype", "weight_dtype", "tolerance"),
    [("float16", "float16", 4e-3), ("float16", "float32", 2e-3), ("float32", "float16", 1e-3)],
)
@pytest.mark.parametrize("kind", ["random", "dropped", "duplicates"])
def test_element_types(dtype: str, weight_dtype: str, tolerance: float, kind: str) -> None:
    shape = Shape(dtype=dtype, weight_dtype=weight_dtype, biases=True)
    feeds = [routing(shape, tokens, kind) for tokens in (0, 1, 19)]
    check_rewrite(routed_model(shape), DenseExperts(), rewritten=1, feeds=feeds, tolerance=tolerance)


def test_bfloat16_is_a_valid_model() -> None:
    shape = Shape(dtype="bfloat16", weight_dtype="bfloat16")
    check_rewrite(routed_model(shape), DenseExperts(), rewritten=1)


@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize("weight_layout", [0, 1])
@pytest.mark.parametrize("gate", [0, 1, 2, 3])
def test_shapes_are_static_where_the_number_of_tokens_is(gate: int, weight_layout: int, tokens: int) -> None:
    shape = Shape(gate_layout=min(gate, 2), separate=gate == 3, weight_layout=weight_layout, biases=True)
    after, _ = check_rewrite(frozen(routed_model(shape), tokens), DenseExperts(), rewritten=1)
    assert open_sizes(after) == []


@pytest.mark.parametrize("poison", [np.nan, np.inf])
@pytest.mark.parametrize("weight_layout", [0, 1])
def test_what_others_compute_does_not_matter(weight_layout: int, poison: float) -> None:
    """Expert 1 is poison: it shows in the tokens that chose it, even with weight 0, and in no other."""
    shape = Shape(experts=3, top_k=2, weight_layout=weight_layout, biases=True)
    model = routed_model(shape)
    bias = model.graph.initializers["fc2_bias"]
    spoiled = bias.const_value.numpy().copy()
    spoiled[1] = poison
    bias.const_value = ir.Tensor(spoiled, name="fc2_bias")
    feeds = routing(shape, 5, "random")
    feeds["index"] = np.asarray([[0, 2], [2, 1], [3, 0], [3, 3], [1, 0]])
    feeds["weight"] = np.abs(feeds["weight"])
    feeds["weight"][4, 0] = 0
    after, _ = check_rewrite(model, DenseExperts(), rewritten=1, feeds=[feeds], tolerance=3e-6)
    finite = np.isfinite(run_model(after, feeds)[0]).all(axis=1)
    assert finite.tolist() == [True, False, True, True, False]


def test_layers_with_a_router() -> None:
    model = layered_model(Shape(experts=6, top_k=3), layers=2)
    feeds = [{"x": np.random.default_rng(0).standard_normal((n, 16)).astype(np.float32)} for n in (0, 1, 9)]
    after, _ = check_rewrite(
        model, DenseExperts(), rewritten=2, feeds=[*feeds, {"x": np.zeros((5, 16), np.float32)}]
    )
    ops = collections.Counter(node.op_type for node in after.graph)
    assert ops["MatMul"] == 2 + 2 * 2 and ops["TopK"] == 2


@pytest.mark.parametrize("storage", [Storage(), Storage("int8", axis=1, block=0)], ids=str)
def test_quantized_weights_stay_behind_their_node(storage: Storage) -> None:
    shape = Shape(experts=5, hidden=32, inner=48)
    feeds = [routing(shape, 9, "dropped")]
    after, _ = check_rewrite(quantized_model(shape, storage), DenseExperts(), rewritten=1, feeds=feeds)
    assert sum(node.op_type == "DequantizeLinear" for node in after.graph) == 2


def test_computed_weights() -> None:
    model = ir.to_proto(routed_model(Shape()))
    model.graph.node.insert(0, helper.make_node("Neg", ["fc2"], ["negative"], name="neg"))
    model.graph.node[1].input[5] = "negative"
    feeds = [routing(Shape(), 5, "random")]
    check_rewrite(ir.from_proto(model), DenseExperts(), rewritten=1, feeds=feeds)


def test_inside_a_branch() -> None:
    model = ir.to_proto(routed_model(Shape()))
    out = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["T", 16])
    then = helper.make_graph([model.graph.node[0]], "then", [], [out])
    none = helper.make_tensor_value_info("z", TensorProto.FLOAT, ["T", 16])
    other = helper.make_graph(
        [helper.make_node("Identity", ["tokens"], ["z"], name="pass")], "else", [], [none]
    )
    del model.graph.node[:]
    choice = helper.make_node("If", ["use"], ["out"], name="choice", then_branch=then, else_branch=other)
    model.graph.node.append(choice)
    model.graph.input.append(helper.make_tensor_value_info("use", TensorProto.BOOL, []))
    model.graph.output[0].name = "out"
    feeds = routing(Shape(), 9, "dropped")
    both = [feeds | {"use": np.asarray(use)} for use in (True, False)]
    check_rewrite(ir.from_proto(model), DenseExperts(), rewritten=1, feeds=both)


def test_an_unknown_number_of_experts_is_refused() -> None:
    model = routed_model(Shape())
    model.graph.inputs[1].shape = model.graph.inputs[2].shape = ir.Shape(["T", "K"])
    check_rewrite(model, DenseExperts(), rewritten=0, refused=["experts of a token is not known"])


def test_experts_of_any_body_are_left() -> None:
    model, _ = outlined(dense_model(lambda graph, x, expert: linear(graph, x, 16, 16)))
    check_rewrite(model, DenseExperts(), rewritten=0)
