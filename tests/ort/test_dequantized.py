"""Products by dequantized weights: ORT makes another operator of some, which rounds activations."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import pytest
from ort.graphs import model, operators, optimized, run, session, since

#: [K, N] = [64, 96], with a scale for each block of inputs or for each output.
SHAPE = (64, 96)
BY_BLOCK = {
    "w": np.random.default_rng(0).integers(0, 15, SHAPE).astype(ml_dtypes.uint4),
    "s": np.full((2, 96), 0.1, np.float32),
    "z": np.full((2, 96), 8).astype(ml_dtypes.uint4),
}
BY_OUTPUT = {
    "w": np.random.default_rng(0).integers(-127, 127, SHAPE).astype(np.int8),
    "s": np.full(96, 0.01, np.float32),
}
BLOCKS, OUTPUTS = (
    "m = DequantizeLinear <axis = 0, block_size = 32> (w, s, z)",
    "m = DequantizeLinear <axis = 1> (w, s)",
)
X = np.random.default_rng(1).standard_normal((8, 64)).astype(np.float32)


def made(dequantize: str, product: str, constants: dict[str, np.ndarray]) -> onnx.ModelProto:
    return model("float[T,64] x", f"{dequantize} {product}", "float[T,96] y", constants, opset=21)


def error(of: onnx.ModelProto) -> float:
    exact = run(of, {"x": X}, level=0)[0]
    return float(np.abs(run(of, {"x": X})[0] - exact).max() / np.abs(exact).max())


@since(1, 31)
@pytest.mark.parametrize("product", ["y = MatMul (x, m)", "y = Gemm (x, m)"])
@pytest.mark.parametrize(("dequantize", "constants"), [(BLOCKS, BY_BLOCK), (OUTPUTS, BY_OUTPUT)])
def test_a_product_by_a_dequantized_matrix_rounds_its_rows(
    product: str, dequantize: str, constants: dict[str, np.ndarray], tmp_path: Path
) -> None:
    """It becomes MatMulNBits at accuracy level 4. Why `blocks/expert_weights.py` turns matrices that lie
    `[inputs, outputs]` before it dequantizes them."""
    of = made(dequantize, product, constants)
    graph = optimized(of, tmp_path)
    [node] = [node for node in graph.node if node.op_type == "MatMulNBits"]
    levels = [each.i for each in node.attribute if each.name == "accuracy_level"]
    assert levels == [4] and error(of) > 1e-3, (
        "ORT no longer rounds them: matrices need not be turned, and `blocks/rounding.py` not go round it"
    )


@pytest.mark.parametrize(
    ("dequantize", "product", "constants"),
    [
        (
            "m = DequantizeLinear <axis = 1, block_size = 32> (w, s, z)",
            "y = Gemm <transB = 1> (x, m)",
            {name: np.ascontiguousarray(array.T) for name, array in BY_BLOCK.items()},
        ),
        (
            "m = DequantizeLinear <axis = 0> (w, s)",
            "y = Gemm <transB = 1> (x, m)",
            BY_OUTPUT | {"w": np.ascontiguousarray(BY_OUTPUT["w"].T)},
        ),
        (
            OUTPUTS,
            "a = Unsqueeze (x, at) b = Unsqueeze (m, at) c = MatMul (a, b) y = Squeeze (c, at)",
            BY_OUTPUT | {"at": np.asarray([0])},
        ),
    ],
)
def test_what_we_write_in_its_place_does_not(
    dequantize: str, product: str, constants: dict[str, np.ndarray], tmp_path: Path
) -> None:
    of = made(dequantize, product, constants)
    assert "MatMulNBits" not in operators(optimized(of, tmp_path)) and error(of) < 1e-6


@since(1, 32)
def test_such_a_product_in_a_branch_does_not_load() -> None:
    """Its weights lie in the graph around it, where that rewrite does not look. `blocks/rounding.py` writes another."""
    branch = f"then_branch = then () => (float[T,96] a) {{ {OUTPUTS} a = MatMul (x, m) }}"
    other = "else_branch = else () => (float[T,96] b) { b = Expand (zero, shape) }"
    body = f"y = If (go) <{branch}, {other}>"
    constants = BY_OUTPUT | {"zero": np.zeros(1, np.float32), "shape": np.asarray([8, 96])}
    of = model("float[T,64] x, bool go", body, "float[T,96] y", constants, opset=21)
    with pytest.raises(Exception, match="Missing required weight"):
        session(of)
