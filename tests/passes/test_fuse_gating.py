"""Before, after, must-not-fire, through one helper; then sizes at which races would show."""

from __future__ import annotations

import collections

import numpy as np
import onnx_ir as ir
import pytest
from builders import DTYPES, Shape, layered_model, routed_model, save_external
from harness import assert_close, check_rewrite, run_model
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from sparse_onnx.blocks.lowered import lowered_blocks
from sparse_onnx.graph import io
from sparse_onnx.passes.fuse_gating import FuseGating


def routing(shape: Shape, tokens: int, rng: np.random.Generator, kind: str) -> dict[str, np.ndarray]:
    x = rng.standard_normal((tokens, shape.hidden)).astype(DTYPES[shape.dtype])
    index = rng.integers(0, shape.experts, (tokens, shape.top_k))
    weight = rng.uniform(-1, 1, index.shape).astype(DTYPES[shape.weight_dtype])
    if kind == "one":
        index[:] = rng.integers(shape.experts)
    elif kind == "dropped":
        index[rng.random(index.shape) < 0.5] = shape.experts
        weight[index == shape.experts] = np.inf  # must not matter
        x[(index == shape.experts).all(axis=1)] = np.nan  # nor this
    elif kind == "all dropped":
        index[:] = shape.experts
    elif kind == "few":
        index[:] = rng.integers(0, max(1, shape.experts // 2), index.shape)
    return {"tokens": x, "index": index.astype(np.int64), "weight": weight}


KINDS = ["random", "one", "dropped", "all dropped", "few"]


@st.composite
def shapes(draw: st.DrawFn) -> Shape:
    gated = draw(st.booleans())
    separate = gated and draw(st.booleans())
    experts = draw(st.sampled_from([1, 2, 5, 8, 9, 16, 19]))
    return Shape(
        experts=experts,
        top_k=draw(st.integers(1, 4)),
        hidden=draw(st.sampled_from([1, 8, 20])),
        inner=draw(st.sampled_from([1, 8, 12])),
        activation=draw(st.integers(0, 4)),
        gate_layout=draw(st.sampled_from([1, 2])) if gated else 0,
        weight_layout=draw(st.sampled_from([0, 1])),
        biases=draw(st.booleans()),
        separate=separate,
        limit=draw(st.sampled_from([0.0, 0.7])) if gated else 0.0,
        alpha=draw(st.sampled_from([1.0, 1.702])),
        beta=draw(st.sampled_from([0.0, 1.0])) if gated else 0.0,
    )


@settings(max_examples=60, deadline=None, derandomize=True)
@given(shapes(), st.sampled_from([0, 1, 2, 7, 33]), st.sampled_from(KINDS), st.sampled_from([18, 20, 23]))
def test_any_block_any_routing(shape: Shape, tokens: int, kind: str, opset: int) -> None:
    rng = np.random.default_rng(tokens)
    feeds = routing(shape, tokens, rng, kind)
    check_rewrite(routed_model(shape, opset=opset), FuseGating(), rewritten=1, feeds=[feeds])


@pytest.mark.slow
@settings(max_examples=1500, deadline=None, derandomize=True)
@given(shapes(), st.integers(0, 40), st.sampled_from(KINDS), st.integers(18, 24))
def test_any_block_any_routing_sweep(shape: Shape, tokens: int, kind: str, opset: int) -> None:
    feeds = routing(shape, tokens, np.random.default_rng(tokens), kind)
    check_rewrite(routed_model(shape, opset=opset), FuseGating(), rewritten=1, feeds=[feeds])


@pytest.mark.parametrize(
    ("dtype", "weight_dtype", "tolerance"),
    [
        ("float16", "float16", 4e-3),
        ("float16", "float32", 2e-3),
        ("float32", "float16", 1e-3),
    ],
)
@pytest.mark.parametrize("kind", ["random", "dropped"])
def test_element_types(dtype: str, weight_dtype: str, tolerance: float, kind: str) -> None:
    shape = Shape(dtype=dtype, weight_dtype=weight_dtype, biases=True)
    feeds = routing(shape, 19, np.random.default_rng(0), kind)
    check_rewrite(routed_model(shape), FuseGating(), rewritten=1, feeds=[feeds], tolerance=tolerance)


def test_bfloat16_is_a_valid_model() -> None:
    """No ORT CPU kernel computes in bfloat16: structure and types are what can be checked."""
    check_rewrite(routed_model(Shape(dtype="bfloat16", weight_dtype="bfloat16")), FuseGating(), rewritten=1)


def test_ties_follow_the_router() -> None:
    """All scores of a token tie: TopK takes the lower experts, before and after."""
    model = layered_model(Shape(experts=6, top_k=3), layers=2)
    feeds = [{"x": np.zeros((5, 16), np.float32)}, {"x": np.tile(np.ones(16, np.float32), (7, 1))}]
    check_rewrite(model, FuseGating(), rewritten=2, feeds=feeds)


def test_what_stands_in_the_graph() -> None:
    shape = Shape(experts=4, top_k=2)
    after, _ = check_rewrite(layered_model(shape, layers=1), FuseGating(), rewritten=1)
    ops = collections.Counter(node.op_type for node in after.graph)
    assert ops["Gemm"] == 8 and ops["Split"] == 1 + 4 and ops["TopK"] == 1 + 2 and ops["GatherND"] == 2
    assert ops["ScatterND"] == 0 and ops["MoE"] == 0
    [dispatch] = [n for n in after.graph if n.op_type == "Split" and len(n.outputs) == 4]
    assert len(dispatch.outputs) == shape.experts, "TopK over E scores proves that nothing is dropped"
    assert all(
        node.metadata_props["sparse_onnx.block"] == "layers.0.experts"
        for node in after.graph
        if node.op_type == "Gemm"
    )
    [record] = lowered_blocks(after)
    assert (record.experts, record.top_k, record.hidden, record.inner) == (4, 2, 16, 24)


def test_many_experts_share_the_activation() -> None:
    """A cold expert costs two nodes."""
    after, _ = check_rewrite(layered_model(Shape(experts=20, top_k=2), layers=1), FuseGating(), rewritten=1)
    ops = collections.Counter(node.op_type for node in after.graph)
    assert ops["Gemm"] == 40 and ops["Sigmoid"] == 3, "groups of 8, 8 and 4"


def test_zero_biases_cost_nothing() -> None:
    after, _ = check_rewrite(routed_model(Shape(biases=False)), FuseGating(), rewritten=1)
    assert all(len(node.inputs) == 2 for node in after.graph if node.op_type == "Gemm")
    after, _ = check_rewrite(routed_model(Shape(biases=True)), FuseGating(), rewritten=1)
    assert all(len(node.inputs) == 3 for node in after.graph if node.op_type == "Gemm")


def test_packed_weights_stay_where_they_lie(tmp_path) -> None:
    path = save_external(layered_model(Shape(biases=True)), tmp_path / "m.onnx")
    model = io.load(path)
    packed = {
        name: value.const_value
        for name, value in model.graph.initializers.items()
        if name.endswith(("fc1", "fc2"))
    }
    FuseGating()(model)
    for name, whole in packed.items():
        assert name not in model.graph.initializers
        for expert in range(4):
            part = model.graph.initializers[f"{name}.{expert}"].const_value
            assert isinstance(part, ir.ExternalTensor) and part.location == whole.location
            assert (
                part.offset == whole.offset + expert * whole.nbytes // 4 and part.nbytes == whole.nbytes // 4
            )
            np.testing.assert_array_equal(part.numpy(), whole.numpy()[expert])


def test_packed_weights_that_others_read_stay() -> None:
    model = routed_model(Shape())
    model.graph.outputs.append(model.graph.initializers["fc2_bias"])
    after, _ = check_rewrite(model, FuseGating(), rewritten=1)
    assert "fc2_bias" in after.graph.initializers and "fc2" not in after.graph.initializers


def test_inside_a_branch() -> None:
    """A block in an If body reads weights of the enclosing graph; only the branch that runs computes."""
    model = ir.to_proto(routed_model(Shape()))
    block = model.graph.node[0]
    inner = helper.make_graph(
        [block], "then", [], [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["T", 16])]
    )
    other = helper.make_graph(
        [helper.make_node("Identity", ["tokens"], ["z"], name="pass")],
        "else",
        [],
        [helper.make_tensor_value_info("z", TensorProto.FLOAT, ["T", 16])],
    )
    del model.graph.node[:]
    model.graph.node.append(
        helper.make_node("If", ["use"], ["out"], name="choice", then_branch=inner, else_branch=other)
    )
    model.graph.input.append(helper.make_tensor_value_info("use", TensorProto.BOOL, []))
    del model.graph.output[:]
    model.graph.output.append(helper.make_tensor_value_info("out", TensorProto.FLOAT, ["T", 16]))
    feeds = routing(Shape(), 9, np.random.default_rng(0), "random")
    check_rewrite(
        ir.from_proto(model),
        FuseGating(),
        rewritten=1,
        feeds=[feeds | {"use": np.asarray(True)}, feeds | {"use": np.asarray(False)}],
    )


def _with_proto(model: ir.Model, change) -> ir.Model:
    proto = ir.to_proto(model)
    change(proto)
    return ir.from_proto(proto)


@pytest.mark.parametrize("kind", ["initializer", "input", "node output", "constant"])
def test_names_that_are_taken(kind: str) -> None:
    """A name of ours that the model uses already, for something else."""
    shape, rng = Shape(), np.random.default_rng(1)

    def change(proto) -> None:
        if kind == "initializer":
            proto.graph.initializer.append(numpy_helper.from_array(np.ones((48, 16), np.float32), "fc1.0"))
            proto.graph.node.append(helper.make_node("Identity", ["fc1.0"], ["other"], name="other"))
        elif kind == "input":
            proto.graph.input.append(helper.make_tensor_value_info("fc1.0", TensorProto.FLOAT, [48, 16]))
            proto.graph.node.append(helper.make_node("Identity", ["fc1.0"], ["other"], name="other"))
        elif kind == "node output":
            proto.graph.node.append(
                helper.make_node("Identity", ["tokens"], ["fc1.0"], name="block/Reshape_0")
            )
            proto.graph.node.append(helper.make_node("Identity", ["fc1.0"], ["other"], name="other"))
        else:
            taken = numpy_helper.from_array(np.asarray([5]), "sparse_onnx/int64[1]=-1")
            proto.graph.initializer.append(taken)
            proto.graph.node.append(helper.make_node("Identity", [taken.name], ["other"], name="other"))
        kinds = {"constant": (TensorProto.INT64, [1]), "node output": (TensorProto.FLOAT, ["T", 16])}
        dtype, dims = kinds.get(kind, (TensorProto.FLOAT, [48, 16]))
        proto.graph.output.append(helper.make_tensor_value_info("other", dtype, dims))

    feeds = routing(shape, 9, rng, "random")
    if kind == "input":
        feeds["fc1.0"] = np.zeros((48, 16), np.float32)
    check_rewrite(_with_proto(routed_model(shape), change), FuseGating(), rewritten=1, feeds=[feeds])


def test_two_nodes_share_weights() -> None:
    def change(proto) -> None:
        again = proto.graph.node.add()
        again.CopyFrom(proto.graph.node[0])
        again.name, again.input[0], again.output[0] = "again", "y", "z"  # chained directly
        again.metadata_props[0].value = "again"
        proto.graph.output.append(helper.make_tensor_value_info("z", TensorProto.FLOAT, ["T", 16]))

    feeds = routing(Shape(), 9, np.random.default_rng(0), "random")
    after, _ = check_rewrite(
        _with_proto(routed_model(Shape()), change), FuseGating(), rewritten=2, feeds=[feeds]
    )
    assert sum(name.startswith("fc1.") for name in after.graph.initializers) == 4


def test_values_of_topk_may_hold_dropped_slots() -> None:
    """Ids sorted by TopK are no choice of TopK's: E among them stays a dropped slot."""

    def change(proto) -> None:
        proto.graph.initializer.append(numpy_helper.from_array(np.asarray([2]), "k"))
        top = helper.make_node("TopK", ["index", "k"], ["sorted_ids", "rank"], name="sort", axis=-1)
        proto.graph.node.insert(0, top)
        proto.graph.node[1].input[1] = "sorted_ids"

    feeds = routing(Shape(), 9, np.random.default_rng(0), "dropped")
    feeds["weight"] = np.ones_like(feeds["weight"])
    check_rewrite(_with_proto(routed_model(Shape()), change), FuseGating(), rewritten=1, feeds=[feeds])


def test_an_unknown_number_of_experts_is_refused() -> None:
    model = routed_model(Shape())
    model.graph.inputs[1].shape = ir.Shape(["T", "K"])
    model.graph.inputs[2].shape = ir.Shape(["T", "K"])
    check_rewrite(model, FuseGating(), rewritten=0, refused=["experts of a token is not known"])


def test_weights_passed_in_are_refused() -> None:
    model = routed_model(Shape())
    model.graph.inputs.append(model.graph.initializers["fc1"])
    check_rewrite(model, FuseGating(), rewritten=0, refused=["block 'block': fc1 is computed or passed in"])


def test_computed_weights_are_refused() -> None:
    model = ir.to_proto(routed_model(Shape()))
    model.graph.node.insert(0, helper.make_node("Neg", ["fc2"], ["negative"], name="neg"))
    model.graph.node[1].input[5] = "negative"
    check_rewrite(ir.from_proto(model), FuseGating(), rewritten=0, refused=["block 'block': fc2 is computed"])


def test_swapping_two_experts_is_seen() -> None:
    """The mutation that every other check here relies on."""
    model = layered_model(Shape(experts=8))
    feeds = {"x": np.random.default_rng(0).standard_normal((24, 16)).astype(np.float32)}
    before = run_model(model, feeds)[0]
    FuseGating()(model)
    initializers = model.graph.initializers
    first, second = initializers["layers.0.fc1.1"], initializers["layers.0.fc1.5"]
    first.const_value, second.const_value = second.const_value, first.const_value
    with pytest.raises(AssertionError):
        assert_close(before, run_model(model, feeds)[0], 1e-2)


@pytest.mark.parametrize("top_k", [2, 8])
def test_no_races_at_realistic_size(top_k: int) -> None:
    """Two threads, rows long enough for ORT to divide them, the same answer every time."""
    shape = Shape(experts=16, top_k=top_k, hidden=1024, inner=64)
    model = routed_model(shape)
    after, _ = check_rewrite(model, FuseGating(), rewritten=1)
    rng = np.random.default_rng(0)
    feeds = routing(shape, 256, rng, "random")
    expected = run_model(model, feeds, threads=1)[0]
    results = [run_model(after, feeds, threads=2)[0] for _ in range(2)]
    for result in results:
        assert_close(expected, result, 2e-6)
        np.testing.assert_array_equal(result, results[0])
