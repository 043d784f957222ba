"""Products of integers: accuracy levels where activations may be rounded, and DynamicQuantizeMatMul."""

from __future__ import annotations

import dataclasses

import numpy as np
import onnx_ir as ir
import pytest
from builders import Shape, layered_model, routed_model
from harness import assert_close, check_rewrite, run_model
from quantized_blocks import Storage, quantized_model

from sparse_onnx.blocks import blocks
from sparse_onnx.blocks.lowered import lowered_blocks
from sparse_onnx.blocks.lowering import Form, want
from sparse_onnx.blocks.quantized import Quantized
from sparse_onnx.core.errors import UsageError
from sparse_onnx.inspect.blocks import block_records
from sparse_onnx.passes.fuse_gating import FuseGating
from sparse_onnx.passes.quantize_experts import QuantizeExperts

SHAPE = Shape(experts=5, hidden=64, inner=96, biases=True)


def stored(shape: Shape = SHAPE, **options: object) -> ir.Model:
    model = routed_model(shape, opset=21)
    outcome = QuantizeExperts(**options)(model)
    assert outcome.rewritten == 1
    return model


def feeds(shape: Shape = SHAPE, tokens: int = 21) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(1)
    return {
        "tokens": rng.standard_normal((tokens, shape.hidden)).astype(shape.dtype),
        "index": rng.integers(0, shape.experts, (tokens, shape.top_k)),
        "weight": rng.uniform(0.2, 1, (tokens, shape.top_k)).astype(shape.weight_dtype),
    }


def attributes(model: ir.Model, op_type: str, name: str) -> list[int]:
    return [node.attributes[name].as_int() for node in model.graph if node.op_type == op_type]


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("activations", "level"), [("int8", 4), ("float", 1)])
def test_the_accuracy_level_is_what_was_allowed(bits: int, activations: str, level: int) -> None:
    model = stored(bits=bits, activations=activations)
    tolerance = 5e-2 if level == 4 else 2e-6
    after, _ = check_rewrite(
        model, FuseGating(), rewritten=1, feeds=[feeds(), feeds(tokens=0)], tolerance=tolerance
    )
    assert attributes(after, "MatMulNBits", "accuracy_level") == [level] * 2 * SHAPE.experts
    [record] = lowered_blocks(after)
    assert record.activations == ("int8" if level == 4 else None)
    difference = np.abs(run_model(model, feeds())[0] - run_model(after, feeds())[0]).max()
    assert (difference > 1e-3) == (level == 4), "the kernel rounds"


def dynamically(rows: np.ndarray, codes: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """``rows [n, K]`` rounded together, by ``codes [N, K]`` of integers and a scale a row of them."""
    low, high = min(rows.min(), 0), max(rows.max(), 0)
    scale = np.float32((high - low) / 255)
    point = np.rint(np.clip(-low / scale, 0, 255))
    rounded = np.clip(np.rint(rows / scale) + point, 0, 255) - point
    return (rounded @ codes.T.astype(np.float64)) * (scale * scales)


@pytest.mark.parametrize("threads", [1, 2])
def test_all_rows_of_an_expert_are_rounded_together(threads: int) -> None:
    """Against numpy: experts without a gate, so that nothing but two products and a ReLU is computed."""
    shape = Shape(experts=4, hidden=64, inner=32, gate_layout=0, activation=3)
    model, inputs = stored(shape, bits=8), feeds(shape, 40)
    inputs["index"][inputs["index"] == 2] = 1  # an expert without tokens
    [block] = blocks(model)
    codes, scales = {}, {}
    for role in block.spec.roles:
        weight = Quantized.of(block.weights[role])
        assert weight is not None
        codes[role] = weight.data.numpy().astype(np.int64) - 128
        scales[role] = weight.scale.numpy()[..., 0]
    expected = np.zeros_like(inputs["tokens"], np.float64)
    for expert in np.unique(inputs["index"]):
        token, slot = np.nonzero(inputs["index"] == expert)
        rows = inputs["tokens"][token]
        hidden = np.maximum(dynamically(rows, codes["fc1"][expert], scales["fc1"][expert]), 0)
        out = dynamically(hidden, codes["fc2"][expert], scales["fc2"][expert])
        np.add.at(expected, token, out * inputs["weight"][token, slot, None])
    after, _ = check_rewrite(model, FuseGating(product="dynamic"), rewritten=1)
    assert_close(expected.astype(np.float32), run_model(after, inputs, threads)[0], 1e-4)


@pytest.mark.parametrize(
    "shape", [SHAPE, Shape(experts=17, hidden=40, inner=24, separate=True, weight_layout=1)]
)
def test_integer_products(shape: Shape) -> None:
    model = stored(shape, bits=8)
    inputs = [feeds(shape), feeds(shape, 1), feeds(shape, 0)]
    after, _ = check_rewrite(
        model, FuseGating(product="dynamic"), rewritten=1, feeds=inputs, tolerance=0.1, threads=2
    )
    kinds = [node.op_type for node in after.graph]
    roles = 3 if shape.separate else 2
    assert kinds.count("DynamicQuantizeMatMul") == roles * shape.experts and "MatMulNBits" not in kinds
    assert after.opset_imports["com.microsoft"] == 1
    [record] = lowered_blocks(after)
    assert record.activations == "int8_batch" and record.form == "grouped:product=dynamic"
    assert block_records(after)[0].rounding == "int8_batch"
    [block] = blocks(model)
    weight = Quantized.of(block.weights[block.spec.roles[-1]])
    last = [node for node in after.graph if node.op_type == "DynamicQuantizeMatMul"][-1]
    assert weight is not None
    turned = weight.data.numpy()[-1].T.astype(np.int16) - 128
    np.testing.assert_array_equal(last.inputs[1].const_value.numpy(), turned)


def test_the_form_of_a_block_may_ask_for_it() -> None:
    model = stored(bits=8)
    [block] = blocks(model)
    want(block.node, [Form.parse("grouped:product=dynamic")])
    after, _ = check_rewrite(model, FuseGating(), rewritten=1)
    assert "DynamicQuantizeMatMul" in {node.op_type for node in after.graph}


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"bits": 8, "activations": "float"}, "the integer product rounds activations"),
        ({"bits": 4}, "its weights have 4 bits, not 8"),
        ({"bits": 8, "block": 32}, "its weights do not have one scale a row"),
        ({"bits": 8, "symmetric": False}, "its zero points are not all in the middle"),
    ],
)
def test_integer_products_are_refused(options: dict, reason: str) -> None:
    check_rewrite(stored(**options), FuseGating(product="dynamic"), rewritten=0, refused=[reason])


def test_integer_products_of_other_blocks_are_refused() -> None:
    half = Shape(hidden=64, inner=96, dtype="float16", weight_dtype="float16")
    for model, reason in (
        (stored(half, bits=8), "takes float32 activations, not float16"),
        (routed_model(SHAPE), "the integer product rounds activations"),
    ):
        check_rewrite(model, FuseGating(product="dynamic"), rewritten=0, refused=[reason])
    model = stored(bits=8)
    check_rewrite(
        model,
        FuseGating(product="dynamic", contrib=False),
        rewritten=0,
        refused=["the integer product is off"],
    )
    with pytest.raises(UsageError, match="product=other"):
        FuseGating(product="other")


@pytest.mark.parametrize(
    "storage",
    [
        Storage(axis=1),  # blocks along the inputs: MatMulNBits once they are turned
        Storage("int8", block=0, axis=2),  # a scale an output: dequantized, and turned all the same
        Storage("uint8", block=0, axis=2),
        Storage("int8", block=0, axis=None),
    ],
)
@pytest.mark.parametrize("contrib", [True, False])
def test_matrices_that_lie_turned_are_not_rounded(storage: Storage, contrib: bool) -> None:
    """ORT makes MatMulNBits at accuracy level 4 of a product by such a matrix."""
    shape = dataclasses.replace(SHAPE, weight_layout=1, hidden=32, inner=48)
    model = quantized_model(shape, storage)
    after, _ = check_rewrite(model, FuseGating(contrib=contrib), rewritten=1, feeds=[feeds(shape)])
    kinds = {node.op_type for node in after.graph}
    assert ("MatMulNBits" in kinds) == (contrib and storage.axis == 1)
    assert lowered_blocks(after)[0].activations is None


def test_no_races_at_realistic_size() -> None:
    """Two threads, many rows, the same answer every time."""
    shape = Shape(experts=16, top_k=4, hidden=1024, inner=64)
    model = layered_model(shape, layers=1, opset=21)
    QuantizeExperts(bits=8)(model)
    x = {"x": np.random.default_rng(0).standard_normal((256, 1024)).astype(np.float32)}
    for product in ("nbits", "dynamic"):
        after = model.clone()
        FuseGating(product=product)(after)
        results = [run_model(after, x, threads=2)[0] for _ in range(3)]
        assert_close(run_model(model, x)[0], results[0], 0.1)
        for result in results[1:]:
            np.testing.assert_array_equal(result, results[0])
