"""Blocks as com.microsoft::QMoE: integers that keep their bytes, and what their kernels need."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from builders import Shape, routed_model
from contrib_models import Case, feeds, model
from fused_blocks import attributes, fused, proven, routing, run_file
from harness import assert_close, check_rewrite, run_model
from onnx import numpy_helper
from quantized_blocks import Storage, quantized_model

from sparse_onnx.blocks import blocks
from sparse_onnx.blocks.lowered import lowered_blocks
from sparse_onnx.blocks.lowering import ACTIVATIONS_KEY
from sparse_onnx.blocks.quantized import Quantized
from sparse_onnx.graph import io
from sparse_onnx.passes.fuse_moe_op import REQUIRES_KEY, FuseMoEOp
from sparse_onnx.passes.quantize_experts import QuantizeExperts
from sparse_onnx.passes.recognise_contrib import RecogniseContrib

RELU = 3
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
    (dataclasses.replace(SHAPE, inner=64), Storage("int4", block=32, points="none"), 16, False),
    (dataclasses.replace(SHAPE, hidden=64, inner=32), Storage("int4", block=32, points="none"), 32, False),
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


def test_rounding_can_be_left_out() -> None:
    before = proven(quantized_model(SHAPE, Storage(block=16)))
    inputs = [routing(SHAPE, tokens, "random") for tokens in (1, 19)]
    reason = "no lossy step allows to round its activations"
    check_rewrite(before.clone(), FuseMoEOp(rounded=False), rewritten=0, refused=[reason])
    [neutral] = blocks(before)
    neutral.node.metadata_props[ACTIVATIONS_KEY] = "int8"
    after, _ = check_rewrite(before, FuseMoEOp(rounded=False), rewritten=1, feeds=inputs, tolerance=3e-6)
    assert "accuracy_level" not in fused(after).attributes and REQUIRES_KEY not in after.metadata_props
    [record] = lowered_blocks(after)
    assert record.form == "fused:rounded=false" and record.activations is None


def test_rows_that_have_no_blocks_are_exact_even_so() -> None:
    shape = dataclasses.replace(SHAPE, hidden=24, inner=20)
    before = proven(quantized_model(shape, Storage("uint8", block=24)))
    [neutral] = blocks(before)
    neutral.node.metadata_props[ACTIVATIONS_KEY] = "int8"
    after, _ = check_rewrite(
        before, FuseMoEOp(), rewritten=1, feeds=[routing(shape, 19, "random")], tolerance=3e-6
    )
    assert "accuracy_level" not in fused(after).attributes and REQUIRES_KEY not in after.metadata_props


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("activations", ["float", "int8"])
@pytest.mark.parametrize("gate_layout", [1, 2])
def test_behind_quantize_experts(bits: int, activations: str, gate_layout: int, tmp_path: Path) -> None:
    """Integers that are computed while the model is written, and interleaved then."""
    shape = dataclasses.replace(SHAPE, hidden=64, inner=96, gate_layout=gate_layout)
    before = proven(routed_model(shape, opset=21))
    assert QuantizeExperts(bits=bits, activations=activations)(before).modified
    neutral = io.save(before.clone(), tmp_path / "neutral.onnx")
    outcome = FuseMoEOp()(before)
    assert outcome.rewritten == 1, outcome.refusals
    saved = io.save(before, tmp_path / "out.onnx")
    found = attributes(fused(io.load(saved.path)))
    block = {"float4": 32, "int84": 32, "float8": 0, "int88": 32}[f"{activations}{bits}"]
    assert (found.get("block_size", 0), found.get("accuracy_level")) == (
        block,
        4 if activations == "int8" else None,
    )
    for tokens in (0, 1, 19):
        inputs = routing(shape, tokens, "random")
        tolerance = 5e-2 if activations == "int8" else 3e-6
        assert_close(run_file(neutral.path, inputs)[0], run_file(saved.path, inputs)[0], tolerance)


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


def with_bias_of(dtype: type) -> ir.Model:
    before = proven(quantized_model(SHAPE, Storage()))
    value = before.graph.initializers["fc2_bias"]
    value.const_value = ir.Tensor(value.const_value.numpy().astype(dtype), name="fc2_bias")
    value.dtype = ir.DataType.FLOAT16
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


REFUSED = [
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


def test_onnx_knows_the_result(tmp_path: Path) -> None:
    """The checker, the shape inference and a second load accept what was written."""
    FuseMoEOp()(before := proven(quantized_model(SHAPE, Storage())))
    saved = io.save(before, tmp_path / "out.onnx", size_threshold=64)
    onnx.checker.check_model(str(saved.path), full_check=True)
    inputs = routing(SHAPE, 9, "random")
    assert_close(run_model(before, inputs)[0], run_file(saved.path, inputs)[0], 0)
