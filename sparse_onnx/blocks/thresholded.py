"""Thresholded layers: `sparse_onnx::ThresholdedLinear`, and its variant for integer weights.

    Y = S(X - centre) W + folded_bias        S(v) = v where |v| > tau, else 0

With folded_bias = bias + centre W that is the layer X W + bias but for the inputs within tau of the centre, which
count as the centre itself (SCAP, arXiv 2412.07174; TEAL, arXiv 2408.14690, where the centre is 0). A NaN is kept. The
function's body computes all of it; a native kernel registered under the same name reads no weights of skipped inputs.

The n-bit variant holds its weights as integers, (W - zero_points) * scales, in blocks along one axis: `axis` 1 gives
each input its own scales [K, N / block_size], which are skipped together with its weights, `axis` 0 blocks of inputs
[K / block_size, N]. Blocks divide the axis.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from onnx.defs import OpSchema

from sparse_onnx.blocks.spec import DOMAIN
from sparse_onnx.blocks.thresholded_schema import layer_schema

LINEAR, N_BITS = "ThresholdedLinear", "ThresholdedLinearNBits"
#: DequantizeLinear in blocks.
MIN_OPSET = {LINEAR: 18, N_BITS: 21}

_HEAD = {
    LINEAR: "(X, W, tau, centre, folded_bias)",
    N_BITS: "<axis, block_size>(X, stored, scales, zero_points, tau, centre, folded_bias)",
}
_DEQUANTIZE = (
    "W = DequantizeLinear<axis: int = @axis, block_size: int = @block_size>(stored, scales, zero_points)"
)
_BODY = """
  distance = Sub(X, centre)
  size = Abs(distance)
  skipped = LessOrEqual(size, tau)
  none = Constant<value = float {0.0}>()
  nothing = CastLike(none, X)
  kept = Where(skipped, nothing, distance)
  product = MatMul(kept, W)
  Y = Add(product, folded_bias)
"""


def is_thresholded(node: ir.Node) -> bool:
    return node.domain == DOMAIN and node.op_type in (LINEAR, N_BITS)


def thresholded_text(op: str, opset: int) -> str:
    """The function in ONNX's text format, for a model of that opset."""
    dequantize = f"  {_DEQUANTIZE}" if op == N_BITS else ""
    return (
        f'<domain: "{DOMAIN}", opset_import: ["" : {opset}]>\n'
        f"{op} {_HEAD[op]} => (Y)\n{{{dequantize}{_BODY}}}"
    )


def thresholded_schemas() -> list[OpSchema]:
    return [_schema(op) for op in (LINEAR, N_BITS)]


def thresholded_reference(
    x: np.ndarray, weight: np.ndarray, tau: np.ndarray, centre: np.ndarray, folded_bias: np.ndarray
) -> np.ndarray:
    """The layer in numpy, in float64: x ``[..., K]``, weight ``[K, N]`` as numbers, tau and centre ``[1]`` or ``[K]``,
    folded_bias ``[N]``. Distances are taken in float32, as the kernel does."""
    distance = x.astype(np.float32) - centre.astype(np.float32)
    kept = np.where(np.abs(distance) <= tau.astype(np.float32), np.float32(0), distance)
    return kept.astype(np.float64) @ weight.astype(np.float64) + folded_bias.astype(np.float64)


def _schema(op: str) -> OpSchema:
    parameter, integers = OpSchema.FormalParameter, op == N_BITS
    weights = [parameter("W", "T", "[K, N]")]
    if integers:
        weights = [
            parameter("W", "Q", "[K, N]"),
            parameter("scales", "T", "[K, N / block_size] or [K / block_size, N]"),
            parameter("zero_points", "Q", "as scales"),
        ]
    attributes = [
        OpSchema.Attribute("axis", OpSchema.AttrType.INT, "Of W, along which its blocks lie: 0 or 1."),
        OpSchema.Attribute("block_size", OpSchema.AttrType.INT, "Weights that share a scale."),
    ]
    return layer_schema(
        op,
        "Y = S(X - centre) W + folded_bias, S(v) = v where |v| > tau, else 0.",
        [
            parameter("X", "T", "[..., K]"),
            *weights,
            parameter("tau", "T", "[1] or [K]; -1 skips nothing"),
            parameter("centre", "T", "[1] or [K]"),
            parameter("folded_bias", "T", "[N]: bias + centre W"),
        ],
        tokens=0,
        attributes=attributes if integers else (),
    )
