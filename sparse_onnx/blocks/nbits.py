"""A quantized matrix for com.microsoft::MatMulNBits, which multiplies by it as it is stored.

The operator takes `[N, K]` unsigned integers of 2, 4 or 8 bits, a scale for each block along K; blocks are a power of
two, at least 16. Weights keep their bytes. Other blocks (a whole row, 48 of 96) are cut into the largest ones that fit,
with the scale repeated.

With accuracy level 1 results equal dequantize-then-multiply: measured on ORT 1.32, relative error below 1e-6 for 2, 4
and 8 bits, 1 to 200 rows. Level 4 rounds activations to 8 bits, each row in blocks of its own: off by 5e-3 to 7e-3 of
the results' root mean square, and faster: 3 times (4 bits) to 30 times (8 bits) at one row. The kernels take float16
activations and scales as they are, to half precision.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence

import numpy as np
import onnx_ir as ir

from sparse_onnx.blocks.quantized import Quantized
from sparse_onnx.graph.build import Emitter
from sparse_onnx.graph.external import read_array
from sparse_onnx.graph.retyped import retyped

DOMAIN = "com.microsoft"
#: Accuracy levels: activations as they are, and rounded to 8 bits.
EXACT, ROUNDED = 1, 4
_BLOCKS = (16, 256)
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
        blocks = inputs // block
        data = retyped(weight.data, ir.DataType.UINT8, (outputs, blocks, block * bits // 8), name)
        scales, zeros = weight.scale, weight.zero_point
        if min(block, inputs) != min(weight.block, inputs):
            cut = functools.partial(_cut_scales, scales, weight.block, block, blocks)
            scales = _when_read(scales, cut, scales.dtype, (outputs, blocks), scales.name)
        if zeros is None:
            zeros = ir.Tensor(np.zeros((outputs, -(-inputs // weight.block)), np.uint8))
        packed: ir.TensorProtocol | None = None
        if isinstance(zeros, ir.LazyTensor) or (read_array(zeros).astype(np.uint8) != 1 << (bits - 1)).any():
            pack = functools.partial(_packed_points, zeros, weight.block, block, blocks, bits)
            shape = (outputs, -(-blocks * bits // 8))
            packed = _when_read(zeros, pack, ir.DataType.UINT8, shape, f"{name}.zero_point")
        return NBits(data, scales, packed, inputs, outputs, bits, block)


def _when_read(
    source: ir.TensorProtocol,
    make: Callable[[], ir.Tensor],
    dtype: ir.DataType,
    shape: Sequence[int],
    name: str | None,
) -> ir.TensorProtocol:
    """What is made of the source: now, or where that is lazy (computed from weights), not before it is read."""
    if isinstance(source, ir.LazyTensor):
        return ir.LazyTensor(make, dtype, ir.Shape(shape), name=name)
    made = make()
    made.name = name
    return made


def block_size(weight: Quantized) -> int | None:
    """The blocks that a weight ``[..., N, K]`` can be given to MatMulNBits in; None where it cannot."""
    inputs = weight.shape[-1]
    if weight.data.dtype not in _TYPES or not weight.block or weight.axis != len(weight.shape) - 1:
        return None
    if weight.dtype not in (ir.DataType.FLOAT, ir.DataType.FLOAT16) or weight.scale.dtype != weight.dtype:
        return None
    # A block that is cut must end where a new one does; the last one ends with the row.
    shared = math.gcd(inputs, weight.block) if weight.block < inputs else inputs
    block = min(shared & -shared, _BLOCKS[1])
    return block if block >= _BLOCKS[0] else None


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


def _cut_scales(scales: ir.TensorProtocol, old: int, new: int, blocks: int) -> ir.Tensor:
    return ir.Tensor(_cut(read_array(scales), old, new, blocks), scales.dtype)


def _packed_points(zeros: ir.TensorProtocol, old: int, new: int, blocks: int, bits: int) -> ir.Tensor:
    return ir.Tensor(_packed(_cut(read_array(zeros).astype(np.uint8), old, new, blocks), bits))


def _cut(parameter: np.ndarray, old: int, new: int, blocks: int) -> np.ndarray:
    return np.ascontiguousarray(np.repeat(parameter, max(1, -(-old // new)), axis=1)[:, :blocks])


def _packed(points: np.ndarray, bits: int) -> np.ndarray:
    """``[N, blocks]`` numbers, several a byte, the first in the lowest bits; each row begins with a byte."""
    each = 8 // bits
    points = np.pad(points, ((0, 0), (0, -points.shape[1] % each)))
    shifted = points.reshape(len(points), -1, each) << (np.arange(each, dtype=np.uint8) * bits)
    return np.bitwise_or.reduce(shifted, axis=2).astype(np.uint8)
