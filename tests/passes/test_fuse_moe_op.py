"""Blocks as com.microsoft::MoE: numbers, weights that keep their bytes, and what the operators cannot express."""

from __future__ import annotations

import collections
import dataclasses
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from builders import Shape, layered_model, routed_model, save_external
from contrib_models import Case, feeds, model
from fused_blocks import KINDS, attributes, fused, proven, routing, run_file
from harness import assert_close, check_rewrite, run_model
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper
from quantized_blocks import Storage, quantized_model

from sparse_onnx.blocks import blocks, reference
from sparse_onnx.blocks.lowered import lowered_blocks
from sparse_onnx.graph import io, stacked
from sparse_onnx.passes.fuse_moe_op import REQUIRES_KEY, FuseMoEOp

SILU, GELU, GELU_TANH, RELU, RELU2 = range(5)
SHAPE = Shape(experts=5, hidden=32, inner=48, biases=True, gate_layout=1)


@st.composite
def shapes(draw: st.DrawFn) -> Shape:
    """What the operators can express."""
    gated = draw(st.booleans())
    activation = SILU if gated else draw(st.sampled_from([SILU, GELU_TANH, RELU]))
    return Shape(
        experts=draw(st.sampled_from([1, 2, 5, 8, 19])),
        top_k=draw(st.integers(1, 4)),
        hidden=draw(st.sampled_from([1, 8, 20])),
        inner=draw(st.sampled_from([1, 8, 20])),
        activation=activation,
        gate_layout=draw(st.sampled_from([1, 2])) if gated else 0,
        weight_layout=draw(st.sampled_from([0, 1])),
        biases=draw(st.booleans()),
        separate=gated and draw(st.booleans()),
        limit=draw(st.sampled_from([0.0, 0.7])) if gated else 0.0,
        alpha=draw(st.sampled_from([1.0, 1.702])) if gated else 1.0,
        beta=draw(st.sampled_from([0.0, 1.0])) if gated else 0.0,
    )


@settings(max_examples=60, deadline=None, derandomize=True)
@given(shapes(), st.sampled_from([0, 1, 2, 7, 33]), st.sampled_from(KINDS), st.sampled_from([18, 20, 23]))
def test_any_block_any_routing(shape: Shape, tokens: int, kind: str, opset: int) -> None:
    inputs = routing(shape, tokens, kind)
    check_rewrite(proven(routed_model(shape, opset=opset)), FuseMoEOp(), rewritten=1, feeds=[inputs])


@pytest.mark.slow
@settings(max_examples=1500, deadline=None, derandomize=True)
@given(shapes(), st.integers(0, 40), st.sampled_from(KINDS), st.integers(18, 24))
def test_any_block_any_routing_sweep(shape: Shape, tokens: int, kind: str, opset: int) -> None:
    inputs = routing(shape, tokens, kind)
    check_rewrite(proven(routed_model(shape, opset=opset)), FuseMoEOp(), rewritten=1, feeds=[inputs])


@pytest.mark.parametrize("kind", KINDS)
def test_against_the_reference(kind: str) -> None:
    """In float64: the share of a weight is computed through its logarithm, and is off by less than a rounding."""
    shape = Shape(experts=16, top_k=4, hidden=32, inner=48, gate_layout=2, biases=True)
    before = proven(routed_model(shape))
    [block] = blocks(before)
    weights = {role: value.const_value.numpy() for role, value in block.weights.items()}
    after, _ = check_rewrite(before, FuseMoEOp(), rewritten=1)
    inputs = routing(shape, 61, kind)
    with np.errstate(invalid="ignore"):
        expected = reference(
            block.spec, inputs["tokens"], inputs["index"], np.abs(inputs["weight"]), **weights
        )
    [actual] = run_model(after, inputs)
    # Token by token: one whose weights are small is as exact as its neighbour.
    for left, right in zip(expected, actual, strict=True):
        np.testing.assert_allclose(right, left, rtol=0, atol=2e-6 * np.abs(left).max(initial=0))


@pytest.mark.parametrize("operator", ["Abs", "Sigmoid", "Softmax", "Relu"])
@pytest.mark.parametrize("weight_dtype", ["float32", "float16"])
def test_weights_that_are_proved(operator: str, weight_dtype: str) -> None:
    shape = Shape(weight_dtype=weight_dtype, biases=True)
    tolerance = 2e-6 if weight_dtype == "float32" else 1e-3  # the block sums up in the weights' type
    inputs = [routing(shape, tokens, "random") for tokens in (0, 1, 19)]
    check_rewrite(
        proven(routed_model(shape), operator), FuseMoEOp(), rewritten=1, feeds=inputs, tolerance=tolerance
    )


def test_ties_follow_the_router() -> None:
    """The operators would take the highest of equal experts, TopK takes the lowest: only logits of its choice are."""
    inputs = [{"x": np.zeros((5, 16), np.float32)}, {"x": np.tile(np.ones(16, np.float32), (7, 1))}]
    after, _ = check_rewrite(layered_model(Shape(experts=6, top_k=3)), FuseMoEOp(), rewritten=2, feeds=inputs)
    assert collections.Counter(node.op_type for node in after.graph)["Slice"] == 0, "nothing can be dropped"


def test_what_stands_in_the_graph() -> None:
    shape = Shape(experts=4, top_k=2, limit=7.0, alpha=1.702, beta=1.0, gate_layout=2)
    after, _ = check_rewrite(proven(routed_model(shape)), FuseMoEOp(), rewritten=1)
    node = fused(after)
    assert attributes(node) == {
        "k": 2, "activation_type": "swiglu", "normalize_routing_weights": 1, "swiglu_fusion": 1,
        "activation_alpha": pytest.approx(1.702), "activation_beta": 1.0, "swiglu_limit": 7.0,
    }  # fmt: skip
    assert [None if value is None else value.name for value in node.inputs[2:]] == ["fc1", None, "fc2"]
    assert after.opset_imports["com.microsoft"] == 1 and REQUIRES_KEY not in after.metadata_props
    assert node.metadata_props["sparse_onnx.form"] == "fused"
    [record] = lowered_blocks(after)
    assert (record.form, record.experts, record.top_k, record.inner) == ("fused", 4, 2, 24)
    more, _ = check_rewrite(
        proven(routed_model(dataclasses.replace(shape, top_k=7))), FuseMoEOp(), rewritten=1
    )
    assert attributes(fused(more))["k"] == 4, "the kernel has only as many"


def test_weights_that_lie_right_keep_their_bytes(tmp_path: Path) -> None:
    path = save_external(proven(routed_model(Shape(gate_layout=2, biases=True))), tmp_path / "m.onnx")
    before = io.load(path)
    tensors = {name: value.const_value for name, value in before.graph.initializers.items()}
    FuseMoEOp()(before)
    assert [value.const_value for value in fused(before).inputs[2:]] == [
        tensors[name] for name in ("fc1", "fc1_bias", "fc2", "fc2_bias")
    ]


@pytest.mark.parametrize("separate", [False, True])
@pytest.mark.parametrize("weight_layout", [0, 1])
def test_other_weights_are_written_anew(separate: bool, weight_layout: int, tmp_path: Path) -> None:
    """Expert by expert, from the file: nothing of them is read before."""
    shape = Shape(separate=separate, weight_layout=weight_layout, biases=True)
    path = save_external(proven(routed_model(shape)), tmp_path / "m.onnx")
    before = io.load(path)
    names = [value.name for value in blocks(before)[0].weights.values()]
    inputs = routing(shape, 9, "random")
    [expected] = run_file(path, inputs)
    whole = {name: before.graph.initializers[name].const_value.numpy() for name in names}
    FuseMoEOp()(before)
    moved = [
        value.const_value
        for value in fused(before).inputs[2:]
        if not isinstance(value.const_value, ir.ExternalTensor)
    ]
    assert len(moved) == (3 if weight_layout else 2) and all(isinstance(t, stacked.Stacked) for t in moved)
    kept = set() if weight_layout else {"down" if separate else "fc2"}
    kept.add("down_bias" if separate else "fc2_bias")
    assert {name for name in names if name in before.graph.initializers} == kept
    saved = io.save(before, tmp_path / "out.onnx")
    after = io.load(saved.path)
    assert_close(expected, run_file(saved.path, inputs)[0], 2e-6)
    fc1 = fused(after).inputs[2].const_value.numpy()
    first = whole["gate"] if separate else whole["fc1"]
    if weight_layout:
        first = first.swapaxes(1, 2)
    np.testing.assert_array_equal(fc1[:, 0::2], first[:, : shape.inner])


def test_blocks_that_share_weights_share_what_becomes_of_them() -> None:
    proto = ir.to_proto(proven(routed_model(Shape(biases=True))))
    again = proto.graph.node.add()
    again.CopyFrom(next(node for node in proto.graph.node if node.domain == "sparse_onnx"))
    again.name, again.input[0], again.output[0] = "again", "y", "z"
    again.metadata_props[0].value = "again"
    proto.graph.output.append(helper.make_tensor_value_info("z", TensorProto.FLOAT, ["T", 16]))
    inputs = routing(Shape(), 9, "random")
    after, _ = check_rewrite(ir.from_proto(proto), FuseMoEOp(), rewritten=2, feeds=[inputs])
    first, second = [node for node in after.graph if node.op_type == "MoE"]
    assert first.inputs[2:] == second.inputs[2:]
    kinds = {"fc1", "fc1_bias"} & set(after.graph.initializers)
    assert not kinds, "what only the blocks read is gone"


def test_weights_that_others_read_stay() -> None:
    before = proven(routed_model(Shape(biases=True)))
    before.graph.outputs.append(before.graph.initializers["fc1_bias"])
    after, _ = check_rewrite(before, FuseMoEOp(), rewritten=1)
    assert "fc1_bias" in after.graph.initializers and "fc1" not in after.graph.initializers


def in_a_branch(plain: ir.Model) -> ir.Model:
    """Everything but the constants in the body of an If."""
    proto = ir.to_proto(plain)
    out = [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["T", SHAPE.hidden])]
    then = helper.make_graph(list(proto.graph.node), "then", [], out, value_info=list(proto.graph.value_info))
    other = helper.make_graph([helper.make_node("Identity", ["tokens"], ["z"], "pass")], "else", [], [
        helper.make_tensor_value_info("z", TensorProto.FLOAT, ["T", SHAPE.hidden])])  # fmt: skip
    del proto.graph.node[:], proto.graph.output[:], proto.graph.value_info[:]
    proto.graph.node.append(
        helper.make_node("If", ["use"], ["out"], name="choice", then_branch=then, else_branch=other)
    )
    proto.graph.input.append(helper.make_tensor_value_info("use", TensorProto.BOOL, []))
    proto.graph.output.append(helper.make_tensor_value_info("out", TensorProto.FLOAT, ["T", SHAPE.hidden]))
    return ir.from_proto(proto)


@pytest.mark.parametrize("quantized", [False, True])
def test_inside_a_branch(quantized: bool) -> None:
    plain = quantized_model(SHAPE, Storage()) if quantized else routed_model(SHAPE)
    before = in_a_branch(proven(plain))
    inputs = routing(SHAPE, 9, "random")
    after, _ = check_rewrite(
        before,
        FuseMoEOp(),
        rewritten=1,
        feeds=[inputs | {"use": np.asarray(value)} for value in (True, False)],
    )
    weight = fused(after).inputs[2]
    assert weight.graph is after.graph, "weights of a body are not packed ahead, and are held twice"


def test_swapping_two_experts_is_seen() -> None:
    shape = Shape(experts=8, gate_layout=2)
    before = proven(routed_model(shape))
    inputs = routing(shape, 24, "random")
    [expected] = run_model(before, inputs)
    FuseMoEOp()(before)
    weight = fused(before).inputs[2]
    array = weight.const_value.numpy().copy()
    array[[1, 5]] = array[[5, 1]]
    weight.const_value = ir.Tensor(array, name=weight.name)
    with pytest.raises(AssertionError):
        assert_close(expected, run_model(before, inputs)[0], 1e-2)


@pytest.mark.parametrize("quantized", [False, True])
def test_no_races_at_realistic_size(quantized: bool) -> None:
    shape = Shape(experts=16, top_k=8, hidden=1024, inner=64)
    plain = quantized_model(shape, Storage(block=32)) if quantized else routed_model(shape)
    before = proven(plain)
    after, _ = check_rewrite(before, FuseMoEOp(), rewritten=1)
    inputs = routing(shape, 300, "dropped")
    expected = run_model(before, inputs, threads=1)[0]
    results = [run_model(after, inputs, threads=2)[0] for _ in range(3)]
    for result in results:
        assert_close(expected, result, 3e-6)
        np.testing.assert_array_equal(result, results[0])


def wider() -> ir.Model:
    """D_out is not D."""
    before = proven(routed_model(Shape()))
    for name, axis in (("fc2", 1), ("fc2_bias", 1)):
        value = before.graph.initializers[name]
        array = np.concatenate([value.const_value.numpy()] * 2, axis)
        value.const_value, value.shape = ir.Tensor(array, name=name), ir.Shape(array.shape)
    before.graph.outputs[0].shape = ir.Shape(["T", 32])
    return before


def passed_in(name: str) -> ir.Model:
    before = proven(routed_model(Shape()))
    before.graph.inputs.append(before.graph.initializers[name])
    return before


GATED = [(activation, f"a gate with {name}") for activation, name in
         ((GELU, "gelu"), (GELU_TANH, "gelu_tanh"), (RELU, "relu"), (RELU2, "relu2"))]  # fmt: skip
REFUSED = [
    (lambda: routed_model(Shape()), "the weights 'weight' are not proved to be 0 or more"),
    (lambda: proven(routed_model(Shape()), "Tanh"), "the weights 'positive' are not proved"),
    *((lambda a=a: proven(routed_model(Shape(activation=a))), text) for a, text in GATED),
    (lambda: proven(routed_model(Shape(activation=GELU, gate_layout=0))), "no activation that is gelu"),
    (lambda: proven(routed_model(Shape(activation=RELU2, gate_layout=0))), "no activation that is relu2"),
    (lambda: proven(routed_model(Shape(gate_layout=0, alpha=1.702))), "silu of slope 1.702"),
    (wider, "gives 32 values for tokens of 16"),
    (lambda: passed_in("fc1"), "fc1 is computed or passed in"),
    (lambda: passed_in("fc2_bias"), "fc2_bias is computed or passed in"),
    (lambda: proven(routed_model(Shape(dtype="float16"))), "its tokens are float16"),
    (lambda: proven(routed_model(Shape(dtype="bfloat16", weight_dtype="bfloat16"))), "its tokens are bfloat16"),
]  # fmt: skip


@pytest.mark.parametrize(("make", "reason"), REFUSED, ids=[reason for _, reason in REFUSED])
def test_refused(make, reason: str) -> None:
    check_rewrite(make(), FuseMoEOp(), rewritten=0, refused=[reason])


def test_what_the_kernels_do_is_still_so() -> None:
    """Each is a reason for something above; when ORT mends one, this says so."""
    rows = Case(bits=4, points=True, hidden=64, inner=64)
    tied = feeds(Case(), 9, "zeros")
    [first] = run_model(model(Case(top_k=1)), tied)
    logits = np.full_like(tied["logits"], -np.inf)
    logits[:, -1] = 0
    [last] = run_model(model(Case(top_k=1)), tied | {"logits": logits})
    np.testing.assert_array_equal(first, last, "of equal scores the highest expert is taken")
    for case in (Case(), Case(bits=4, block=16), rows):
        inputs = feeds(case, 5)
        inputs["logits"][1] = np.nan
        inputs["input"][1] = np.inf
        [y] = run_model(model(case), inputs)
        assert not y[1].any() and np.isfinite(y).all(), "a token whose logits are NaN runs no expert"
