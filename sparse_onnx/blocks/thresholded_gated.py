"""Gated layers whose gate says which hidden units are computed: `sparse_onnx::ThresholdedGatedMLP` (CATS).

    h = S(A) * (X up^T + up_bias)        S(a) = a where |a| > tau, else 0
    Y = h down + bias

A is the activation of the gate, act(X gate), which the graph computes as it did before. Where |A| <= tau neither the
row of `up` [I, K] nor the row of `down` [I, N] counts (CATS, arXiv 2404.08763, eq. 4); h is 0 there whatever the row of
`up` holds. A NaN is kept. The function's body computes all of it; a native kernel registered under the same name reads
no weights of units that are skipped.

The n-bit variant holds both matrices as integers, (W - zero_points) * scales, in blocks along one axis each, as
`ThresholdedLinearNBits` does.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from onnx.defs import OpSchema

from sparse_onnx.blocks.spec import DOMAIN
from sparse_onnx.blocks.thresholded_schema import layer_schema

GATED, GATED_N_BITS = "ThresholdedGatedMLP", "ThresholdedGatedMLPNBits"
#: DequantizeLinear in blocks.
GATED_OPSET = {GATED: 18, GATED_N_BITS: 21}

_ATTRIBUTES = ("up_axis", "up_block_size", "down_axis", "down_block_size")
_HEAD = {
    GATED: "(A, X, up, up_bias, down, tau, bias)",
    GATED_N_BITS: f"<{', '.join(_ATTRIBUTES)}>(A, X, stored_up, up_scales, up_zero_points, up_bias, "
    "stored_down, down_scales, down_zero_points, tau, bias)",
}
_DEQUANTIZE = "".join(
    f"\n  {name} = DequantizeLinear<axis: int = @{name}_axis, block_size: int = @{name}_block_size>"
    f"(stored_{name}, {name}_scales, {name}_zero_points)"
    for name in ("up", "down")
)
_BODY = """
  size = Abs(A)
  skipped = LessOrEqual(size, tau)
  turned = Transpose<perm = [1, 0]>(up)
  product = MatMul(X, turned)
  unit = Add(product, up_bias)
  gated = Mul(A, unit)
  none = Constant<value = float {0.0}>()
  nothing = CastLike(none, A)
  hidden = Where(skipped, nothing, gated)
  result = MatMul(hidden, down)
  Y = Add(result, bias)
"""


def is_gated(node: ir.Node) -> bool:
    return node.domain == DOMAIN and node.op_type in GATED_OPSET


def gated_text(op: str, opset: int) -> str:
    """The function in ONNX's text format, for a model of that opset."""
    dequantize = _DEQUANTIZE if op == GATED_N_BITS else ""
    return (
        f'<domain: "{DOMAIN}", opset_import: ["" : {opset}]>\n'
        f"{op} {_HEAD[op]} => (Y)\n{{{dequantize}{_BODY}}}"
    )


def gated_reference(
    gate: np.ndarray,
    x: np.ndarray,
    up: np.ndarray,
    up_bias: np.ndarray,
    down: np.ndarray,
    tau: np.ndarray,
    bias: np.ndarray,
) -> np.ndarray:
    """The layer in numpy, in float64: gate ``[..., I]``, x ``[..., K]``, up ``[I, K]`` and down ``[I, N]`` as numbers,
    up_bias ``[I]``, tau ``[1]``, bias ``[N]``. Sizes are compared in float32, as the kernel does."""
    skipped = np.abs(gate.astype(np.float32)) <= tau.astype(np.float32)
    with np.errstate(invalid="ignore", over="ignore"):
        units = x.astype(np.float64) @ up.astype(np.float64).T + up_bias.astype(np.float64)
        hidden = np.where(skipped, 0.0, gate.astype(np.float64) * units)
        return hidden @ down.astype(np.float64) + bias.astype(np.float64)


def gated_schemas() -> list[OpSchema]:
    return [_schema(op) for op in (GATED, GATED_N_BITS)]


def _schema(op: str) -> OpSchema:
    parameter, integers = OpSchema.FormalParameter, op == GATED_N_BITS

    def weights(name: str, outputs: str) -> list[OpSchema.FormalParameter]:
        kind, shape = ("Q" if integers else "T"), f"[I, {outputs}]"
        found = [parameter(name, kind, f"{shape}: a row for each hidden unit")]
        if integers:
            grid = f"[I, {outputs} / block_size] or [I / block_size, {outputs}]"
            found += [parameter(f"{name}_scales", "T", grid), parameter(f"{name}_zero_points", "Q", grid)]
        return found

    attributes = [
        OpSchema.Attribute(name, OpSchema.AttrType.INT, "Axis of blocks, 0 or 1; weights that share a scale.")
        for name in _ATTRIBUTES
    ]
    return layer_schema(
        op,
        "Y = (S(A) * (X up^T + up_bias)) down + bias, S(a) = a where |a| > tau, else 0.",
        [
            parameter("A", "T", "[..., I]: the activation of the gate"),
            parameter("X", "T", "[..., K]"),
            *weights("up", "K"),
            parameter("up_bias", "T", "[I]"),
            *weights("down", "N"),
            parameter("tau", "T", "[1]; -1 skips nothing"),
            parameter("bias", "T", "[N]"),
        ],
        tokens=1,
        attributes=attributes if integers else (),
    )
