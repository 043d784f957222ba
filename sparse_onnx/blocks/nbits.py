"""A quantized matrix for com.microsoft::MatMulNBits, which multiplies by it as it is stored.

The operator takes `[N, K]` unsigned integers of 2, 4 or 8 bits, a scale for each block along K; blocks are a power of
two, at least 16. Weights keep their bytes. Other blocks (a whole row, 48 of 96) are cut into the largest ones that fit,
with the scale repeated. Rows that no block divides are filled up with zeros, which costs their bytes a copy.

With accuracy level 1 results equal dequantize-then-multiply: measured on ORT 1.32, relative error below 1e-6 for 2, 4
and 8 bits, 1 to 200 rows. Level 4 rounds activations to 8 bits, each row in blocks of its own: off by 5e-3 to 7e-3 of
the results' root mean square, and faster: 3 times (4 bits) to 30 times (8 bits) at one row. The kernels take float16
activations and scales as they are, to half precision.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import onnx_ir as ir

from sparse_onnx.blocks.contrib_recipes import Pack, Points, Repeat
from sparse_onnx.blocks.quantized import Quantized
from sparse_onnx.graph.build import Emitter
from sparse_onnx.graph.external import read_array
from sparse_onnx.graph.retyped import retyped
from sparse_onnx.graph.stacked import computed

DOMAIN = "com.microsoft"
#: Accuracy levels: activations as they are, and rounded to 8 bits.
EXACT, ROUNDED = 1, 4
_SMALLEST, _LARGEST = 16, 256
_TYPES = (ir.DataType.UINT2, ir.DataType.UINT4, ir.DataType.UINT8)


@dataclasses.dataclass(frozen=True, eq=False)
class NBits:
    """Inputs of MatMulNBits. `zero_points` is None where all are the operator's own, half of the range.

    Attributes:
        data: ``[N, K / block, block * bits / 8]`` bytes.
        scales: ``[N, K / block]``.
        zero_points: ``[N, ceil(K / block * bits / 8)]`` bytes.
    """

    data: ir.TensorProtocol
    scales: ir.TensorProtocol
    zero_points: ir.TensorProtocol | None
    inputs: int
    outputs: int
    bits: int
    block: int

    @staticmethod
    def of(weight: Quantized) -> NBits | None:
        """Of one expert's matrix ``[N, K]``; None where the operator cannot express it."""
        block = block_size(weight)
        if block is None or len(weight.shape) != 2 or weight.axis != 1:
            return None
        outputs, inputs = weight.shape
        bits = weight.data.dtype.bitwidth
        name = weight.data.name or "weight"
        blocks = -(-inputs // block)
        shape = (outputs, blocks, block * bits // 8)
        if blocks * block == inputs:
            data = retyped(weight.data, ir.DataType.UINT8, shape, name)
        else:
            rows = retyped(weight.data, ir.DataType.UINT8, (outputs, inputs * bits // 8), name)
            data = computed(_FillUp(shape), [rows], ir.DataType.UINT8, shape, name)
        scales, zeros, grid = weight.scale, weight.zero_point, (outputs, blocks)
        times = max(1, -(-weight.block // block))
        if min(block, inputs) != min(weight.block, inputs):
            scales = computed(Repeat(times, grid), [scales], scales.dtype, grid, scales.name or name)
        if zeros is None:
            zeros = ir.Tensor(np.zeros((outputs, -(-inputs // weight.block)), np.uint8))
        packed = None
        # A lazy one is computed from the weights, which is too much work for the answer.
        if isinstance(zeros, ir.LazyTensor) or (read_array(zeros).astype(np.uint8) != 1 << (bits - 1)).any():
            points = computed(Points(0, times, grid), [zeros], ir.DataType.UINT8, grid, name)
            row = (outputs, -(-blocks * bits // 8))
            packed = computed(Pack(bits), [points], ir.DataType.UINT8, row, f"{name}.zero_point")
        return NBits(data, scales, packed, inputs, outputs, bits, block)


@dataclasses.dataclass(frozen=True)
class _FillUp:
    """Rows of bytes with zeros behind them, in blocks; the operator multiplies them by nothing."""

    shape: tuple[int, int, int]

    def __call__(self, *arrays: np.ndarray) -> np.ndarray:
        [rows] = arrays
        result = np.zeros((self.shape[0], self.shape[1] * self.shape[2]), np.uint8)
        result[:, : rows.shape[1]] = rows
        return result.reshape(self.shape)


def block_size(weight: Quantized) -> int | None:
    """The blocks that a weight ``[..., N, K]`` can be given to MatMulNBits in; None where it cannot."""
    inputs = weight.shape[-1]
    if weight.data.dtype not in _TYPES or not weight.block or weight.axis != len(weight.shape) - 1:
        return None
    if weight.dtype not in (ir.DataType.FLOAT, ir.DataType.FLOAT16) or weight.scale.dtype != weight.dtype:
        return None
    # A block that is cut must end where a new one does; the last one ends with the row.
    whole = weight.block >= inputs
    shared = inputs if whole else math.gcd(inputs, weight.block)
    block = min(shared & -shared, _LARGEST)
    if block >= _SMALLEST:
        return block
    if inputs * weight.data.dtype.bitwidth % 8:
        return None
    # Rows that no block divides are filled up: a whole row by as little as possible.
    if whole:
        sizes = [_SMALLEST << power for power in range(5)]
        return min(sizes, key=lambda size: (-(-inputs // size) * size, -size))
    block = min(weight.block & -weight.block, _LARGEST)
    return block if block >= _SMALLEST else None


def emit_nbits(
    emit: Emitter, rows: ir.Value, data: ir.Value, scales: ir.Value, points: ir.Value | None, bias: ir.Value | None,
    shape: NBits, accuracy: int = EXACT,
) -> ir.Value:  # fmt: skip
    """``rows [n, K] -> [n, N]``; cold experts, with 0 rows, cost next to nothing and read no weights. `accuracy` is
    `EXACT` or `ROUNDED`."""
    inputs = [rows, data, scales, points, None, bias]
    while inputs[-1] is None:
        inputs.pop()
    return emit.op(
        "MatMulNBits", *inputs, domain=DOMAIN, K=shape.inputs, N=shape.outputs, bits=shape.bits,
        block_size=shape.block, accuracy_level=accuracy,
    )  # fmt: skip
