"""Thresholded layers of all experts at once: `sparse_onnx::ThresholdedExpertLinear`, and its variant for integers.

    Y[s] = S(X[s] - centre) W[index[s]] + folded_bias[index[s]]        S(v) = v where |v| > tau, else 0

Each row goes through the layer of the expert that its index names, which is `ThresholdedLinear` (see `thresholded`). A
native kernel registered under the same name computes the rows of one expert together, and reads of its weights those
of inputs that are kept; of experts without rows nothing. The body takes one expert with rows after the other.
Both refuse an index outside [0, E): the body makes E of one below 0, which Gather would count from the end.

The n-bit variant holds integers as `ThresholdedLinearNBits` does, blocks along `axis` 1 or 2 of W [E, K, N]. Its body
takes those of 8 bits as they are. Gather takes none below a byte: those of 4 bits are widened, all at once, and ONNX
Runtime keeps the wide ones from the creation of a session on; all layers of a model share the function, so to what they
are widened is a matter of all their types (`widened`).
"""

from __future__ import annotations

import string
from collections.abc import Iterable

import numpy as np
import onnx_ir as ir
from onnx.defs import OpSchema

from sparse_onnx.blocks.spec import DOMAIN
from sparse_onnx.blocks.thresholded import thresholded_reference
from sparse_onnx.blocks.thresholded_schema import layer_schema

EXPERTS, EXPERTS_N_BITS = "ThresholdedExpertLinear", "ThresholdedExpertLinearNBits"
#: Integers below a byte.
EXPERTS_OPSET = {EXPERTS: 18, EXPERTS_N_BITS: 21}

_HEAD = {
    EXPERTS: "(X, index, W, tau, centre, folded_bias)",
    EXPERTS_N_BITS: "<axis, block_size>(X, index, stored, scales, zero_points, tau, centre, folded_bias)",
}
_WIDE = string.Template("""
  wide = Cast <to = $type> (stored)
  wide_points = Cast <to = $type> (zero_points)""")
_BYTES = frozenset({ir.DataType.INT8, ir.DataType.UINT8})
_TAKEN = {
    EXPERTS: "matrix_row = Gather (W, e_row)",
    EXPERTS_N_BITS: """integers = Gather ($wide, e_row)
    scale = Gather (scales, e_row)
    points = Gather ($points, e_row)
    matrix_row = DequantizeLinear <axis: int = @axis, block_size: int = @block_size> (integers, scale, points)""",
}
_BODY = string.Template("""
  distance = Sub (X, centre)
  size = Abs (distance)
  skipped = LessOrEqual (size, tau)
  none = Constant <value = float {0.0}> ()
  nothing = CastLike (none, X)
  kept = Where (skipped, nothing, distance)
  always = Constant <value = bool {1}> ()
  first_axis = Constant <value_ints = [0]> ()
  first = Constant <value_int = 0> ()
  hit = Unique (index)
  hits = Size (hit)
  rows = Shape <start = 0, end = 1> (X)
  experts = Shape <start = 0, end = 1> (folded_bias)
  width = Shape <start = 1, end = 2> (folded_bias)
  shape = Concat <axis = 0> (rows, width)
  no_rows = Expand (nothing, shape)$wide
  filled = Loop (hits, always, no_rows) <body = expert (int64 i, bool go, done) => (go_on, done_next) {
    go_on = Identity (go)
    e = Gather (hit, i)
    below = Less (e, first)
    e_row = Where (below, experts, e)
    mine = Equal (index, e)
    at = NonZero (mine)
    positions = Transpose <perm = [1, 0]> (at)
    own_rows = Gather (kept, at)
    own = Squeeze (own_rows, first_axis)
    $taken
    matrix = Squeeze (matrix_row, first_axis)
    product = MatMul (own, matrix)
    bias = Gather (folded_bias, e_row)
    y = Add (product, bias)
    done_next = ScatterND (done, positions, y)
  }>
  Y = Reshape (filled, shape)
""")


def is_of_experts(node: ir.Node) -> bool:
    return node.domain == DOMAIN and node.op_type in EXPERTS_OPSET


def widened(types: Iterable[ir.DataType | None]) -> ir.DataType | None:
    """What the body casts integers to before it takes one expert's: nothing where those of all layers are bytes, else
    the least type that holds them.

    Args:
        types: of the integers of each layer; None is one that is not known.
    """
    kinds = frozenset(types)
    if kinds and kinds <= _BYTES:
        return None
    if kinds and kinds <= {ir.DataType.INT8, ir.DataType.INT4, ir.DataType.UINT4}:
        return ir.DataType.INT8
    return (
        ir.DataType.UINT8 if kinds and kinds <= {ir.DataType.UINT8, ir.DataType.UINT4} else ir.DataType.INT16
    )


def experts_text(op: str, opset: int, wide: ir.DataType | None = ir.DataType.INT16) -> str:
    """The function in ONNX's text format, for a model of that opset; `wide`: of integers, see `widened`."""
    cast, names = "", {"wide": "stored", "points": "zero_points"}
    if op == EXPERTS_N_BITS and wide is not None:
        cast, names = _WIDE.substitute(type=int(wide)), {"wide": "wide", "points": "wide_points"}
    body = _BODY.substitute(wide=cast, taken=string.Template(_TAKEN[op]).substitute(names))
    return f'<domain: "{DOMAIN}", opset_import: ["" : {opset}]>\n{op} {_HEAD[op]} => (Y)\n{{{body}}}'


def experts_reference(
    x: np.ndarray,
    index: np.ndarray,
    weight: np.ndarray,
    tau: np.ndarray,
    centre: np.ndarray,
    folded_bias: np.ndarray,
) -> np.ndarray:
    """The layers in numpy, in float64: x ``[S, K]``, index ``[S]``, weight ``[E, K, N]`` as numbers, tau and centre
    ``[1]`` or ``[K]``, folded_bias ``[E, N]``.

    Raises:
        ValueError: an index outside [0, E).
    """
    if index.size and not (index.min() >= 0 and index.max() < len(weight)):
        raise ValueError(f"index outside [0, {len(weight)})")
    result = np.zeros((len(x), weight.shape[2]))
    for expert in np.unique(index):
        own = index == expert
        result[own] = thresholded_reference(x[own], weight[expert], tau, centre, folded_bias[expert])
    return result


def experts_schemas() -> list[OpSchema]:
    return [_schema(op) for op in EXPERTS_OPSET]


def _schema(op: str) -> OpSchema:
    parameter, integers = OpSchema.FormalParameter, op == EXPERTS_N_BITS
    weights = [parameter("W", "T", "[E, K, N]")]
    if integers:
        grid = "[E, K, N / block_size] or [E, K / block_size, N]"
        weights = [
            parameter("W", "Q", "[E, K, N]"),
            parameter("scales", "T", grid),
            parameter("zero_points", "Q", grid),
        ]
    attributes = [
        OpSchema.Attribute("axis", OpSchema.AttrType.INT, "Of W, along which its blocks lie: 1 or 2."),
        OpSchema.Attribute("block_size", OpSchema.AttrType.INT, "Weights that share a scale."),
    ]
    return layer_schema(
        op,
        "Y[s] = S(X[s] - centre) W[index[s]] + folded_bias[index[s]], S(v) = v where |v| > tau, else 0.",
        [
            parameter("X", "T", "[S, K]"),
            parameter("index", "tensor(int64)", "[S]: the expert of each row, from 0 to E - 1"),
            *weights,
            parameter("tau", "T", "[1] or [K]; -1 skips nothing"),
            parameter("centre", "T", "[1] or [K]"),
            parameter("folded_bias", "T", "[E, N]: bias + centre W, by expert"),
        ],
        tokens=0,
        attributes=attributes if integers else (),
    )
