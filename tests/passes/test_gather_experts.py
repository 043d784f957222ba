"""Weights gathered a slot: exact for every block and routing, static shapes, only chosen experts dequantized."""

from __future__ import annotations

import collections
import dataclasses

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from any_block import KINDS, constant_weights, expected, frozen, open_sizes, routing, shapes
from builders import Shape, layered_model, routed_model
from harness import check_rewrite, run_model
from hypothesis import given, settings
from hypothesis import strategies as st
from moe_cases import Case, close, label, routings, specs
from onnx import TensorProto, helper, numpy_helper
from quantized_blocks import Storage, quantized_model

from sparse_onnx.blocks import ExpertSpec
from sparse_onnx.passes.gather_experts import GatherExperts

#: All that the form may consist of: each one's shapes follow from its inputs' shapes and constants.
STATIC = {
    "Add", "Cast", "Clip", "Concat", "Erf", "Expand", "Flatten", "Floor", "Gather", "Gelu", "Less", "MatMul", "Min",
    "Mul", "Relu", "Reshape", "Sigmoid", "Slice", "Split", "Squeeze", "Sub", "Tanh", "Unsqueeze", "Where",
}  # fmt: skip


@settings(max_examples=60, deadline=None, derandomize=True)
@given(shapes(), st.sampled_from([0, 1, 2, 7, 33]), st.sampled_from(KINDS), st.sampled_from([18, 20, 23]))
def test_any_block_any_routing(shape: Shape, tokens: int, kind: str, opset: int) -> None:
    feeds = routing(shape, tokens, kind)
    after, _ = check_rewrite(
        routed_model(shape, opset=opset), GatherExperts(), rewritten=1, feeds=[feeds], tolerance=3e-6
    )
    assert {node.op_type for node in after.graph} <= STATIC


@pytest.mark.slow
@settings(max_examples=1000, deadline=None, derandomize=True)
@given(shapes(), st.integers(0, 40), st.sampled_from(KINDS), st.integers(18, 24))
def test_any_block_any_routing_sweep(shape: Shape, tokens: int, kind: str, opset: int) -> None:
    feeds = routing(shape, tokens, kind)
    check_rewrite(
        routed_model(shape, opset=opset), GatherExperts(), rewritten=1, feeds=[feeds], tolerance=3e-6
    )


@pytest.mark.parametrize("biases", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("spec", list(specs()), ids=label)
def test_equals_the_reference(spec: ExpertSpec, dtype: str, biases: bool) -> None:
    rng = np.random.default_rng(0)
    case = Case(spec, dtype=dtype, weight_dtype=dtype)
    weights = case.weights(rng, biases)
    model = constant_weights(case, weights)
    assert GatherExperts()(model).rewritten == 1
    for index in routings(case.experts, case.top_k, rng).values():
        feeds = case.routing(rng, index)
        assert close(run_model(model, feeds)[0], expected(case, feeds, weights), dtype)


@pytest.mark.parametrize(
    ("dtype", "weight_dtype", "tolerance"),
    [("float16", "float16", 4e-3), ("float16", "float32", 2e-3), ("float32", "float16", 1e-3)],
)
@pytest.mark.parametrize("kind", ["random", "dropped"])
def test_element_types(dtype: str, weight_dtype: str, tolerance: float, kind: str) -> None:
    shape = Shape(dtype=dtype, weight_dtype=weight_dtype, biases=True)
    feeds = [routing(shape, tokens, kind) for tokens in (0, 1, 19)]
    check_rewrite(routed_model(shape), GatherExperts(), rewritten=1, feeds=feeds, tolerance=tolerance)


def test_bfloat16_is_a_valid_model() -> None:
    shape = Shape(dtype="bfloat16", weight_dtype="bfloat16")
    check_rewrite(routed_model(shape), GatherExperts(), rewritten=1)


@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize("weight_layout", [0, 1])
@pytest.mark.parametrize("gate", [0, 1, 2, 3])
def test_shapes_are_static_where_the_number_of_tokens_is(gate: int, weight_layout: int, tokens: int) -> None:
    shape = Shape(gate_layout=min(gate, 2), separate=gate == 3, weight_layout=weight_layout, biases=True)
    after, _ = check_rewrite(frozen(routed_model(shape), tokens), GatherExperts(), rewritten=1)
    assert open_sizes(after) == []
    assert open_sizes(GatherExperts()(routed_model(shape)).model), "the check sees open sizes"


@pytest.mark.parametrize("kind", ["uint4", "int8"])
@pytest.mark.parametrize("block", [16, 48, 20])
def test_shapes_of_quantized_weights_are_static_too(kind: str, block: int) -> None:
    shape = Shape(hidden=48, inner=48)
    after, _ = check_rewrite(
        frozen(quantized_model(shape, Storage(kind, block=block)), 3), GatherExperts(), rewritten=1
    )
    assert open_sizes(after) == []


def test_what_stands_in_the_graph() -> None:
    """TopK proves that nothing is dropped: no Where; the packed weights stay whole, and in place."""
    model = layered_model(Shape(experts=6, top_k=3), layers=2)
    held = {name: value.const_value.tobytes() for name, value in model.graph.initializers.items()}
    feeds = [{"x": np.random.default_rng(0).standard_normal((n, 16)).astype(np.float32)} for n in (0, 1, 9)]
    after, _ = check_rewrite(
        model, GatherExperts(), rewritten=2, feeds=[*feeds, {"x": np.zeros((5, 16), np.float32)}]
    )
    ops = collections.Counter(node.op_type for node in after.graph)
    assert ops["Gather"] == 4 and ops["MatMul"] == 2 + 2 * 3 and ops["Where"] == 0 and ops["TopK"] == 2
    for name in (f"layers.{layer}.{role}" for layer in range(2) for role in ("fc1", "fc2")):
        assert after.graph.initializers[name].const_value.tobytes() == held[name]


def test_a_product_alone_behind_a_gather_widens_all_experts(tmp_path) -> None:
    """What the Squeeze behind each Gather is for. The first half fails once ORT mends it."""
    shape = Shape(experts=8, dtype="float16", weight_dtype="float16", separate=True)
    whole = (shape.experts, shape.inner, shape.hidden)

    def widened(model: onnx.ModelProto) -> list[str]:
        """Packed weights that ORT casts whole: at every run, or once and then holds in float32."""
        options = onnxruntime.SessionOptions()
        options.optimized_model_filepath = str(tmp_path / "o.onnx")
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
        onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        graph = onnx.load(tmp_path / "o.onnx").graph
        packed = {tensor.name: tensor.data_type for tensor in graph.initializer if len(tensor.dims) == 3}
        assert packed
        cast = {node.input[0] for node in graph.node if node.op_type == "Cast"}
        return [name for name, kind in packed.items() if kind == TensorProto.FLOAT or name in cast]

    weight = numpy_helper.from_array(np.zeros(whole, np.float16), "w")
    naive = helper.make_graph(
        [
            helper.make_node("Reshape", ["i", "flat"], ["s"]),
            helper.make_node("Gather", ["w", "s"], ["g"]),
            helper.make_node("MatMul", ["g", "x"], ["y"]),
        ],
        "naive",
        [
            helper.make_tensor_value_info("i", TensorProto.INT64, ["T", 2]),
            helper.make_tensor_value_info("x", TensorProto.FLOAT16, ["S", shape.hidden, 1]),
        ],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT16, ["S", shape.inner, 1])],
        [weight, numpy_helper.from_array(np.asarray([-1]), "flat")],
    )
    assert widened(helper.make_model(naive, opset_imports=[helper.make_opsetid("", 20)], ir_version=10))
    after = GatherExperts()(routed_model(shape)).model
    assert not widened(ir.to_proto(after))


QUANTIZED = [
    Storage(),
    Storage("int4", points="none"),
    Storage("int4"),
    Storage("uint4", points="one"),
    Storage("uint8", axis=-1),
    Storage("int8", points="none", block=8),
    Storage("uint2", opset=25),
    Storage("int2", points="none", opset=25),
    Storage("uint4", block=64),  # more than a row: one scale each
    Storage("uint4", block=20),  # the last block of a row is shorter
    Storage("int8", axis=1, block=16),
    Storage("uint4", axis=1, block=20),
    Storage("int8", axis=0, block=0),
    Storage("int8", axis=1, block=0),
    Storage("uint8", axis=2, block=0),
    Storage("int4", axis=None, block=0),
    Storage("int16", axis=0, block=0, points="none"),
    Storage("uint16", axis=2, block=16),
    Storage("int32", axis=None, block=0, points="none"),
]


@pytest.mark.parametrize("weight_layout", [0, 1])
@pytest.mark.parametrize("storage", QUANTIZED, ids=str)
def test_only_chosen_experts_are_dequantized(storage: Storage, weight_layout: int) -> None:
    shape = Shape(experts=5, hidden=32, inner=48, biases=True, weight_layout=weight_layout)
    model = quantized_model(shape, storage)
    feeds = [routing(shape, tokens, "dropped") for tokens in (0, 1, 9)]
    after, _ = check_rewrite(model, GatherExperts(), rewritten=1, feeds=feeds, tolerance=3e-6)
    assert {node.op_type for node in after.graph} <= STATIC
    for value in after.graph.initializers.values():
        if len(value.shape) > 1 and value.shape[0] == shape.experts and not value.name.endswith("_bias"):
            assert [use.node.op_type for use in value.uses()] == ["Gather"], value.name
    assert not {"fc1", "fc2"} & {node.name.split(".")[0] for node in after.graph}, (
        "nothing is left of the nodes"
    )
    assert ("fc1.data" in after.graph.initializers) == (storage.kind.strip("uint") in ("8", "16", "32"))


@pytest.mark.parametrize("kind", ["uint4", "int8", "int16", "uint16"])
def test_scales_of_half_precision(kind: str) -> None:
    """The largest integers of 16 bits are infinite in float16."""
    shape = Shape(experts=5, hidden=32, inner=48, dtype="float16", weight_dtype="float16")
    model = quantized_model(shape, Storage(kind, points="none" if "16" in kind else "any"))
    feeds = [routing(shape, 9, "random")]
    check_rewrite(model, GatherExperts(), rewritten=1, feeds=feeds, tolerance=4e-3)


def test_dequantized_weights_that_others_read_stay() -> None:
    model = quantized_model(Shape(experts=5, hidden=32, inner=48), Storage())
    values = ir.convenience.create_value_mapping(model.graph)
    model.graph.outputs.append(values["fc2"])
    after, _ = check_rewrite(model, GatherExperts(), rewritten=1)
    assert [node.name for node in after.graph if node.op_type == "DequantizeLinear"] == ["fc2.node"]


@pytest.mark.parametrize(
    ("shape", "storage", "constant", "reason"),
    [
        (Shape(), Storage(axis=0, block=2), True, "not expert by expert: blocks run across experts"),
        (Shape(hidden=1, inner=3, gate_layout=0), Storage(block=0), True, "experts do not begin on whole bytes"),
        (Shape(), Storage(), False, "fc2 is dequantized from what is computed or passed in at run time"),
    ],
)  # fmt: skip
def test_refused(shape: Shape, storage: Storage, constant: bool, reason: str) -> None:
    check_rewrite(quantized_model(shape, storage, constant), GatherExperts(), rewritten=0, refused=[reason])


def test_computed_weights_are_gathered() -> None:
    """Nothing needs them to be constants."""
    model = ir.to_proto(routed_model(Shape(biases=True)))
    model.graph.node.insert(0, helper.make_node("Neg", ["fc2"], ["negative"], name="neg"))
    model.graph.node[1].input[5] = "negative"
    feeds = [routing(Shape(), 5, "random")]
    check_rewrite(ir.from_proto(model), GatherExperts(), rewritten=1, feeds=feeds)


def test_an_unknown_number_of_experts_is_refused() -> None:
    model = routed_model(Shape())
    model.graph.inputs[1].shape = model.graph.inputs[2].shape = ir.Shape(["T", "K"])
    check_rewrite(model, GatherExperts(), rewritten=0, refused=["experts of a token is not known"])


def test_inside_a_branch() -> None:
    model = ir.to_proto(routed_model(Shape()))
    out = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["T", 16])
    then = helper.make_graph([model.graph.node[0]], "then", [], [out])
    other_out = helper.make_tensor_value_info("z", TensorProto.FLOAT, ["T", 16])
    other = helper.make_graph(
        [helper.make_node("Identity", ["tokens"], ["z"], name="pass")], "else", [], [other_out]
    )
    del model.graph.node[:]
    choice = helper.make_node("If", ["use"], ["out"], name="choice", then_branch=then, else_branch=other)
    model.graph.node.append(choice)
    model.graph.input.append(helper.make_tensor_value_info("use", TensorProto.BOOL, []))
    model.graph.output[0].name = "out"
    feeds = routing(Shape(), 9, "dropped")
    both = [feeds | {"use": np.asarray(use)} for use in (True, False)]
    check_rewrite(ir.from_proto(model), GatherExperts(), rewritten=1, feeds=both)


def test_two_blocks_share_weights() -> None:
    model = ir.to_proto(quantized_model(Shape(experts=5, hidden=32, inner=48), Storage()))
    again = model.graph.node.add()
    again.CopyFrom(next(node for node in model.graph.node if node.op_type == "MoE"))
    again.name, again.input[0], again.output[0] = "again", "y", "z"
    again.metadata_props[0].value = "again"
    model.graph.output.append(helper.make_tensor_value_info("z", TensorProto.FLOAT, ["T", 32]))
    feeds = [routing(dataclasses.replace(Shape(experts=5), hidden=32), 9, "random")]
    after, _ = check_rewrite(ir.from_proto(model), GatherExperts(), rewritten=2, feeds=feeds)
    assert sum(name.endswith(".bytes") for name in after.graph.initializers) == 2
