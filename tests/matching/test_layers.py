"""Linear layers in all spellings: what is read off them is what ONNX Runtime multiplies by."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from onnx import helper
from text_graphs import graph

from sparse_onnx.graph.infer import infer
from sparse_onnx.matching.layers import layers

K, N = 32, 6
RNG = np.random.default_rng(0)
W = RNG.standard_normal((K, N)).astype(np.float32)
T = np.ascontiguousarray(W.T)
BIAS = RNG.standard_normal(N).astype(np.float32)
INT8 = RNG.integers(-90, 90, (K, N)).astype(np.int8)
SCALES = RNG.uniform(0.01, 0.02, N).astype(np.float32)
POINTS = RNG.integers(-9, 9, N).astype(np.int8)
NIBBLES = RNG.integers(0, 256, (N, 2, 8)).astype(np.uint8)
PAIRS = RNG.integers(0, 256, N).astype(np.uint8)
BYTES = RNG.integers(0, 256, (N, 2, 16)).astype(np.uint8)
BLOCK_SCALES = RNG.uniform(0.01, 0.02, (N, 2)).astype(np.float32)
BLOCK_SCALES_3 = RNG.uniform(0.01, 0.02, (N, 3)).astype(np.float32)
DYNAMIC = """
    q, s, z = DynamicQuantizeLinear (x) p = MatMulInteger (q, w, z{points}) c = Cast <to = 1> (p)
    f = Mul ({factor}) y = Mul ({product})
"""
NBITS = "y = com.microsoft.MatMulNBits <K = {K}, N = 6, bits = {bits}, block_size = 16> ({inputs})"

#: body, constants, whether there is a bias, and how exactly ORT multiplies.
SPELLINGS: dict[str, tuple[str, dict[str, Any], bool, float]] = {
    "matmul": ("y = MatMul (x, w)", {"w": W}, False, 1e-6),
    "transposed": ("t = Transpose (w) y = MatMul (x, t)", {"w": T}, False, 1e-6),
    "gemm": ("y = Gemm (x, w, b)", {"w": W, "b": BIAS}, True, 1e-6),
    "gemm transB": ("y = Gemm <transB = 1> (x, w)", {"w": T}, False, 1e-6),
    "fused": ("y = com.microsoft.FusedMatMul <transB = 1> (x, w)", {"w": T}, False, 1e-6),
    "einsum": ('y = Einsum <equation = "ti,io->to"> (x, w)', {"w": W}, False, 1e-6),
    "one of a stack": ("i = Constant <value = int64 {1}> () v = Gather (w, i) y = MatMul (x, v)",
                       {"w": np.stack([W + 1, W])}, False, 1e-6),
    "dequantized": ("v = DequantizeLinear <axis = 1> (w, s, z) y = MatMul (x, v)",
                    {"w": INT8, "s": SCALES, "z": POINTS}, False, 1e-6),
    "dequantized, turned": ("v = DequantizeLinear <axis = 1> (w, s, z) t = Transpose (v)"
                            " y = Gemm <transB = 1> (x, t, b)",
                            {"w": INT8, "s": SCALES, "z": POINTS, "b": BIAS}, True, 1e-6),
    "dequantized, in blocks": ("v = DequantizeLinear <axis = 0, block_size = 16> (w, s) y = MatMul (x, v)",
                               {"w": INT8, "s": np.ascontiguousarray(BLOCK_SCALES.T)}, False, 1e-2),
    "integers": (DYNAMIC.format(points=", zp", factor="s, ws", product="c, f"),
                 {"w": INT8, "ws": SCALES, "zp": POINTS}, False, 1e-5),
    "integers, other order": (DYNAMIC.format(points="", factor="ws, s", product="f, c"),
                              {"w": INT8, "ws": SCALES[:1]}, False, 1e-5),
    "integers, fused": ("y = com.microsoft.DynamicQuantizeMatMul (x, w, ws, zp, b)",
                        {"w": INT8, "ws": SCALES, "zp": POINTS, "b": BIAS}, True, 1e-5),
    "integers to float": (
        "q, s, z = DynamicQuantizeLinear (x) y = com.microsoft.MatMulIntegerToFloat (q, w, s, ws, z, zp, b)",
        {"w": INT8, "ws": SCALES, "zp": POINTS, "b": BIAS}, True, 1e-5),
    "4 bits": (NBITS.format(K=K, bits=4, inputs="x, w, s"), {"w": NIBBLES, "s": BLOCK_SCALES}, False, 1e-2),
    "4 bits, flat": (NBITS.format(K=K, bits=4, inputs="x, w, s, , , b"),
                     {"w": NIBBLES, "s": BLOCK_SCALES.ravel(), "b": BIAS}, True, 1e-2),
    "4 bits, zero points": (NBITS.format(K=K, bits=4, inputs="x, w, s, z"),
                            {"w": NIBBLES, "s": BLOCK_SCALES, "z": PAIRS}, False, 1e-2),
    "4 bits, zero points that are numbers": (
        NBITS.format(K=K, bits=4, inputs="x, w, s, z"),
        {"w": NIBBLES, "s": BLOCK_SCALES, "z": RNG.uniform(5, 9, (N, 2)).astype(np.float32)}, False, 1e-2),
    "8 bits": (NBITS.format(K=K, bits=8, inputs="x, w, s, z"),
               {"w": BYTES, "s": BLOCK_SCALES, "z": RNG.integers(0, 256, 2 * N).astype(np.uint8)}, False, 1e-2),
    "4 bits, filled up": (
        NBITS.format(K=40, bits=4, inputs="x, w, s, z"),
        {"w": RNG.integers(0, 256, (N, 3, 8)).astype(np.uint8), "s": BLOCK_SCALES_3,
         "z": RNG.integers(0, 256, (N, 2)).astype(np.uint8)}, False, 1e-2),
}  # fmt: skip


def model(body: str, constants: dict[str, Any], inputs: str = "float[T, 32] x") -> onnx.ModelProto:
    return graph(body, "float[T, 6] y", constants, inputs)


def found(proto: onnx.ModelProto) -> Any:
    loaded = ir.from_proto(proto)
    infer(loaded)
    return list(layers(loaded))


def multiplied(proto: onnx.ModelProto, x: np.ndarray) -> np.ndarray:
    session = onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(["y"], {"x": x})[0]


@pytest.mark.parametrize("name", SPELLINGS)
def test_the_weight_is_what_onnxruntime_multiplies_by(name: str) -> None:
    body, constants, biased, tolerance = SPELLINGS[name]
    inputs = 40 if "filled up" in name else K
    proto = model(body, constants, f"float[T, {inputs}] x")
    [layer] = found(proto)
    rows = multiplied(proto, np.concatenate([np.zeros((1, inputs)), np.eye(inputs)]).astype(np.float32))
    weight = layer.weight.numbers()
    assert weight.shape == (inputs, N) == (layer.weight.inputs, layer.weight.outputs)
    np.testing.assert_allclose(weight, rows[1:] - rows[0], atol=tolerance * np.abs(weight).max())
    assert (layer.bias is not None) == biased
    np.testing.assert_allclose(rows[0], BIAS if biased else np.zeros(N), atol=1e-6)
    assert (layer.input.name, layer.output.name) == ("x", "y")
    assert layer.weight.names[0] == "w"


def test_bytes_are_those_of_the_file() -> None:
    def nbytes(name: str) -> int:
        [layer] = found(model(*SPELLINGS[name][:2]))
        return int(layer.weight.nbytes)

    assert nbytes("matmul") == nbytes("one of a stack") == K * N * 4
    assert nbytes("dequantized") == K * N + N * 4 + N
    assert nbytes("4 bits") == K * N // 2 + 2 * N * 4


NO_LAYERS = {
    "two values": ("y = MatMul (x, v)", {}, "float[T, 32] x, float[32, 6] v"),
    "a weight that callers may override": ("y = MatMul (x, v)", {"v": W}, "float[T, 32] x, float[32, 6] v"),
    "scaled": ("y = Gemm <alpha = 2.0> (x, w)", {"w": W}, "float[T, 32] x"),
    "turned rows": ("y = Gemm <transA = 1> (x, w)", {"w": W}, "float[32, T] x"),
    "a bias that is no constant": ("y = Gemm (x, w, b)", {"w": W}, "float[T, 32] x, float[6] b"),
    "integers with other rows": (
        DYNAMIC.format(points="", factor="s2, ws", product="c, f"),
        {"w": INT8, "ws": SCALES, "s2": SCALES[:1]},
        "float[T, 32] x",
    ),
}


@pytest.mark.parametrize("name", NO_LAYERS)
def test_what_is_no_layer_is_left_out(name: str) -> None:
    body, constants, inputs = NO_LAYERS[name]
    assert found(model(body, constants, inputs)) == []


def test_weights_in_another_order_are_left_out() -> None:
    order = np.arange(K, dtype=np.int32)
    body = NBITS.format(K=K, bits=4, inputs="x, w, s, , g")
    assert found(model(body, {"w": NIBBLES, "s": BLOCK_SCALES, "g": order})) == []


def test_layers_in_branches_are_found() -> None:
    inner = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["inner"])],
        "branch",
        [],
        [helper.make_tensor_value_info("inner", onnx.TensorProto.FLOAT, None)],
    )
    proto = model("y = MatMul (x, w)", {"w": W}, "float[T, 32] x, bool on")
    proto.graph.node.append(helper.make_node("If", ["on"], ["z"], then_branch=inner, else_branch=inner))
    assert len(found(proto)) == 3
