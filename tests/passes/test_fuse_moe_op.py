"""Blocks as com.microsoft::MoE and QMoE: numbers, weights that keep their bytes, what the operators cannot express."""

from __future__ import annotations

import collections
import dataclasses
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from builders import DTYPES, Shape, layered_model, routed_model, save_external
from contrib_models import Case, feeds, model
from harness import assert_close, check_rewrite, run_model
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from quantized_blocks import Storage, quantized_model

from sparse_onnx.blocks import blocks, reference
from sparse_onnx.blocks.lowered import lowered_blocks
from sparse_onnx.blocks.lowering import ACTIVATIONS_KEY
from sparse_onnx.blocks.quantized import Quantized
from sparse_onnx.graph import io, stacked
from sparse_onnx.passes.fuse_moe_op import REQUIRES_KEY, FuseMoEOp
from sparse_onnx.passes.recognise_contrib import RecogniseContrib

KINDS = ["random", "one", "dropped", "all dropped", "zeros", "tiny", "large"]
SILU, GELU, GELU_TANH, RELU, RELU2 = range(5)


def proven(plain: ir.Model, operator: str = "Abs") -> ir.Model:
    """The model of `routed_model`, with its weights behind an operator that gives nothing negative."""
    proto = ir.to_proto(plain)
    [block] = [node for node in proto.graph.node if node.domain == "sparse_onnx"]
    block.input[2] = "positive"
    attributes = {"axis": -1} if operator == "Softmax" else {}
    proto.graph.node.insert(0, helper.make_node(operator, ["weight"], ["positive"], "proof", **attributes))
    [weight] = [value for value in proto.graph.input if value.name == "weight"]
    info = proto.graph.value_info.add()
    info.CopyFrom(weight)
    info.name = "positive"
    return ir.from_proto(proto)


def routing(shape: Shape, tokens: int, kind: str) -> dict[str, np.ndarray]:
    """Inputs of `proven`. A token without any weight and dropped slots are poison: they must not matter."""
    rng = np.random.default_rng([tokens, KINDS.index(kind)])
    x = rng.standard_normal((tokens, shape.hidden))
    index = rng.integers(0, shape.experts, (tokens, shape.top_k))  # experts of a token repeat
    weight = rng.uniform(-1, 1, index.shape)
    if kind == "one":
        index[:] = rng.integers(shape.experts)
    elif kind == "dropped":
        index[rng.random(index.shape) < 0.5] = shape.experts
        weight[index == shape.experts] = np.inf
        x[(index == shape.experts).all(axis=1)] = np.nan
    elif kind == "all dropped":
        index[:] = shape.experts
        x[:1] = np.inf
    elif kind == "zeros":
        weight[rng.random(index.shape) < 0.5] = 0
        weight[:1] = 0
    elif kind == "tiny":
        weight = 10.0 ** rng.uniform(-12, 0, index.shape)
    elif kind == "large":
        weight *= 10.0 ** rng.uniform(-6, 4, (tokens, 1))
    numbers = (DTYPES[shape.dtype], DTYPES[shape.weight_dtype])
    return {"tokens": x.astype(numbers[0]), "index": index, "weight": weight.astype(numbers[1])}


def run_file(path: Path, inputs: dict[str, np.ndarray]) -> list[np.ndarray]:
    return run_model(ir.external_data.load_to_model(io.load(path)), inputs)


def fused(after: ir.Model) -> ir.Node:
    [node] = [node for node in after.graph.all_nodes() if node.domain == "com.microsoft"]
    return node


def attributes(node: ir.Node) -> dict[str, object]:
    return {name: attribute.value for name, attribute in node.attributes.items()}


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


# Quantized weights.

SHAPE = Shape(experts=5, hidden=32, inner=48, biases=True, gate_layout=2)
APART = dataclasses.replace(SHAPE, separate=True)
EXPRESSED = [
    (SHAPE, Storage(), 16, True),
    (SHAPE, Storage(points="one"), 16, True),
    (SHAPE, Storage(points="none"), 16, True),  # of unsigned integers none is zero: not the operator's own
    (SHAPE, Storage("int4"), 16, True),
    (SHAPE, Storage("int4", points="none"), 16, False),
    (APART, Storage("int4"), 16, True),
    (dataclasses.replace(SHAPE, gate_layout=1), Storage(), 16, True),
    (dataclasses.replace(SHAPE, weight_layout=1), Storage(axis=1), 16, True),
    (dataclasses.replace(APART, weight_layout=1), Storage("int4", axis=1), 16, True),
    (SHAPE, Storage(block=32), 16, True),  # the second block of fc2 is half a block
    (dataclasses.replace(SHAPE, inner=64), Storage(block=32), 16, True),  # zero points for one block are not given
    (dataclasses.replace(SHAPE, inner=64), Storage("int4", block=32, points="none"), 32, False),
    (SHAPE, Storage("int4", block=64, points="none"), 16, False),  # a scale a row: repeated
    (dataclasses.replace(SHAPE, hidden=512, inner=512), Storage("int4", block=512, points="none"), 256, False),
    (dataclasses.replace(SHAPE, hidden=24, inner=20), Storage(block=64), 0, True),  # rows without blocks
    (SHAPE, Storage("uint8", block=64), 0, True),
    (SHAPE, Storage("int8", block=64), 0, True),
    (APART, Storage("int8", block=64, points="none"), 0, False),
    (dataclasses.replace(SHAPE, weight_layout=1), Storage("uint8", axis=1, block=64), 0, True),
    (dataclasses.replace(SHAPE, gate_layout=0, activation=RELU), Storage("uint8", block=64, points="none"), 0, True),
]  # fmt: skip


@pytest.mark.parametrize(("shape", "storage", "block", "points"), EXPRESSED)
def test_quantized_weights_stay_quantized(shape: Shape, storage: Storage, block: int, points: bool) -> None:
    inputs = [routing(shape, tokens, kind) for tokens, kind in ((9, "dropped"), (1, "random"), (0, "random"))]
    before = proven(quantized_model(shape, storage))
    after, _ = check_rewrite(before, FuseMoEOp(), rewritten=1, feeds=inputs, tolerance=3e-6)
    node = fused(after)
    assert node.op_type == "QMoE" and attributes(node).get("block_size", 0) == block
    assert "accuracy_level" not in node.attributes, "unknown to ORT before 1.31, and 0 is meant"
    given = [len(node.inputs) > at and node.inputs[at] is not None for at in (11, 12)]
    assert given == [points, points], (
        "zero points of one projection alone make ORT 1.24 quantize the other again"
    )
    stored = sum(value.const_value.nbytes for value in after.graph.initializers.values())
    plain = sum(value.const_value.nbytes for value in routed_model(shape).graph.initializers.values())
    assert stored < 0.8 * plain
    assert not [node for node in after.graph if node.op_type == "DequantizeLinear"]


@pytest.mark.parametrize("storage", [Storage(), Storage("int8", block=64)])
def test_float16(storage: Storage) -> None:
    shape = dataclasses.replace(SHAPE, dtype="float16")
    for weight_dtype in ("float16", "float32"):
        own = dataclasses.replace(shape, weight_dtype=weight_dtype)
        before = proven(quantized_model(own, storage))
        inputs = [routing(own, 19, kind) for kind in ("random", "dropped", "zeros", "tiny")]
        after, _ = check_rewrite(before, FuseMoEOp(), rewritten=1, feeds=inputs, tolerance=3e-3)
        assert {fused(after).inputs[at].dtype for at in (3, 6)} == {ir.DataType.FLOAT16}


ROUNDED = [
    (dataclasses.replace(SHAPE, hidden=256, inner=512), Storage("uint8", block=512), 128),
    (dataclasses.replace(SHAPE, hidden=256, inner=512), Storage("int8", block=512, points="none"), 256),
    (dataclasses.replace(SHAPE, hidden=256, inner=512), Storage("int8", block=32), 32),
    (SHAPE, Storage(block=16), 16),
    (SHAPE, Storage("int4", block=64, points="none"), 16),
]


@pytest.mark.parametrize(("shape", "storage", "block"), ROUNDED)
def test_rounding_that_a_lossy_step_allowed(shape: Shape, storage: Storage, block: int) -> None:
    before = proven(quantized_model(shape, storage))
    [neutral] = blocks(before)
    neutral.node.metadata_props[ACTIVATIONS_KEY] = "int8"
    inputs = [routing(shape, 19, "random")]
    after, _ = check_rewrite(before, FuseMoEOp(), rewritten=1, feeds=inputs, tolerance=5e-2)
    found = attributes(fused(after))
    assert (found["accuracy_level"], found["block_size"]) == (4, block)
    assert after.metadata_props[REQUIRES_KEY] == "onnxruntime>=1.31"
    exact, rounded = run_model(before, inputs[0])[0], run_model(after, inputs[0])[0]
    assert np.abs(exact - rounded).max() > 1e-4 * np.abs(exact).max(), "then nothing has to be allowed"


def test_rows_that_have_no_blocks_are_exact_even_so() -> None:
    shape = dataclasses.replace(SHAPE, hidden=24, inner=20)
    before = proven(quantized_model(shape, Storage("uint8", block=24)))
    [neutral] = blocks(before)
    neutral.node.metadata_props[ACTIVATIONS_KEY] = "int8"
    after, _ = check_rewrite(
        before, FuseMoEOp(), rewritten=1, feeds=[routing(shape, 19, "random")], tolerance=3e-6
    )
    assert "accuracy_level" not in fused(after).attributes and REQUIRES_KEY not in after.metadata_props


CONTRIB = [
    Case(bits=4, block=16),
    Case(bits=4, block=16, points=True),
    Case(bits=4, block=16, points=True, hidden=64, inner=64),
    Case(bits=4, block=16, kind="gelu"),
    Case(bits=4, block=16, dtype=np.float16),
    Case(bits=4, block=64, hidden=128, inner=64, biases=False, rank=3),
    Case(bits=8),
    Case(bits=8, points=True, kind="relu"),
]


@pytest.mark.parametrize("case", CONTRIB)
def test_the_operator_comes_back_as_it_was(case: Case, tmp_path: Path) -> None:
    """Its weights, lifted to the neutral form and back, are the same ranges of the same file."""
    ir.save(model(case), tmp_path / "m.onnx", external_data="m.data", size_threshold_bytes=64)
    original = io.load(tmp_path / "m.onnx")
    [was] = [node for node in original.graph if node.domain == "com.microsoft"]
    ranges = [_range(value) for value in was.inputs]
    known = attributes(was)
    again = original.clone()
    assert RecogniseContrib(any_width=True)(again).rewritten == 1
    outcome = FuseMoEOp()(again)
    assert outcome.rewritten == 1 and not outcome.refusals
    node = fused(again)
    assert node.op_type == was.op_type
    # Zero points that do not fill their bytes are made anew.
    packed = case.bits == 4 and (case.inner // (case.block or 1)) % 2
    for at in (2, 3, 4, 5, 6, 7, *(() if packed else (11, 12))):
        if at < len(ranges):
            assert _range(node.inputs[at]) == ranges[at], at
    swiglu = {"activation_alpha": 1.0, "activation_beta": 0.0}
    assert attributes(node).items() <= (swiglu | known).items()
    saved = io.save(again, tmp_path / "again.onnx")
    for kind in ("random", "ties", "far"):
        inputs = feeds(case, 7, kind)
        tolerance = 2e-6 if case.dtype == np.float32 else 2e-3
        assert_close(run_file(tmp_path / "m.onnx", inputs)[0], run_file(saved.path, inputs)[0], tolerance)
    # Our own nodes are left alone, or the next run would begin again.
    outcome = RecogniseContrib(any_width=True)(again)
    assert outcome.matched == 0 and not outcome.modified


def _range(value: ir.Value | None) -> object:
    tensor = None if value is None else value.const_value
    if isinstance(tensor, ir.ExternalTensor):
        return tensor.dtype, tuple(tensor.shape.numpy()), tensor.offset, tensor.nbytes
    return None if tensor is None else tensor.numpy().tolist()


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
    shape = dataclasses.replace(SHAPE, gate_layout=1)
    plain = quantized_model(shape, Storage()) if quantized else routed_model(shape)
    before = in_a_branch(proven(plain))
    inputs = routing(shape, 9, "random")
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


# What is refused.


def with_bias_of(dtype: type) -> ir.Model:
    before = proven(quantized_model(SHAPE, Storage()))
    value = before.graph.initializers["fc2_bias"]
    value.const_value = ir.Tensor(value.const_value.numpy().astype(dtype), name="fc2_bias")
    value.dtype = ir.DataType.FLOAT16
    return before


def wider() -> ir.Model:
    """D_out is not D."""
    before = proven(routed_model(Shape()))
    for name, axis in (("fc2", 1), ("fc2_bias", 1)):
        value = before.graph.initializers[name]
        array = np.concatenate([value.const_value.numpy()] * 2, axis)
        value.const_value, value.shape = ir.Tensor(array, name=name), ir.Shape(array.shape)
    before.graph.outputs[0].shape = ir.Shape(["T", 32])
    return before


def partly_quantized() -> ir.Model:
    before = proven(quantized_model(SHAPE, Storage()))
    proto = ir.to_proto(before)
    node = next(node for node in proto.graph.node if node.output[0] == "fc2")
    proto.graph.node.remove(node)
    proto.graph.initializer.append(
        numpy_helper.from_array(np.ones((SHAPE.experts, SHAPE.hidden, SHAPE.inner), np.float32), "fc2")
    )
    return ir.from_proto(proto)


def passed_in(name: str) -> ir.Model:
    before = proven(routed_model(Shape()))
    before.graph.inputs.append(before.graph.initializers[name])
    return before


def mixed_widths() -> ir.Model:
    before = proven(quantized_model(SHAPE, Storage()))
    eight = quantized_model(SHAPE, Storage("uint8", block=64))
    proto, other = ir.to_proto(before), ir.to_proto(eight)
    for info in [info for info in proto.graph.value_info if info.name.startswith("fc2.")]:
        proto.graph.value_info.remove(info)
    for name in ("fc2.data", "fc2.scale", "fc2.points"):
        proto.graph.initializer.remove(next(t for t in proto.graph.initializer if t.name == name))
        proto.graph.initializer.append(next(t for t in other.graph.initializer if t.name == name))
    node = next(node for node in proto.graph.node if node.output[0] == "fc2")
    node.CopyFrom(next(node for node in other.graph.node if node.output[0] == "fc2"))
    return ir.from_proto(proto)


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
    (partly_quantized, "fc1 is quantized and fc2 is not"),
    (mixed_widths, "quantized to different widths"),
    (lambda: proven(quantized_model(SHAPE, Storage("int16", block=64))), "fc1 is stored as int16"),
    (lambda: proven(quantized_model(SHAPE, Storage(axis=1))), "no scales for blocks of its inputs"),
    (lambda: proven(quantized_model(SHAPE, Storage("int8", axis=None, block=0))), "no scales for blocks"),
    (lambda: proven(quantized_model(dataclasses.replace(SHAPE, hidden=24), Storage(block=8))), "rows of 24, 48"),
    (lambda: proven(quantized_model(SHAPE, Storage("uint8"))), "rounds activations to 8 bits"),
    (lambda: proven(quantized_model(dataclasses.replace(SHAPE, hidden=34, inner=33), Storage(block=64))),
     "rows that do not end on whole bytes"),
]  # fmt: skip


@pytest.mark.parametrize(("make", "reason"), REFUSED, ids=[reason for _, reason in REFUSED])
def test_refused(make, reason: str) -> None:
    check_rewrite(make(), FuseMoEOp(), rewritten=0, refused=[reason])


def test_a_bias_of_another_type_is_refused() -> None:
    outcome = FuseMoEOp()(with_bias_of(np.float16))
    assert "fc2_bias is float16" in outcome.refusals[0].reason and not outcome.modified


def test_scales_of_another_type_are_refused() -> None:
    before = proven(quantized_model(SHAPE, Storage()))
    weight = Quantized.of(blocks(before)[0].weights["fc1"])
    scale = weight.values[1]
    scale.const_value = ir.Tensor(scale.const_value.numpy().astype(np.float16), name=scale.name)
    outcome = FuseMoEOp()(before)
    assert "fc1 has scales of type float16, and tokens are float" in outcome.refusals[0].reason


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


def test_onnx_knows_the_result(tmp_path: Path) -> None:
    """The checker, the shape inference and a second load accept what was written."""
    FuseMoEOp()(before := proven(quantized_model(SHAPE, Storage())))
    saved = io.save(before, tmp_path / "out.onnx", size_threshold=64)
    onnx.checker.check_model(str(saved.path), full_check=True)
    inputs = routing(SHAPE, 9, "random")
    assert_close(run_model(before, inputs)[0], run_file(saved.path, inputs)[0], 0)
