"""The matrix of a linear layer as it is stored, in numbers or in integers, and read as numbers."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import onnx_ir as ir

from sparse_onnx.blocks.quantized import Quantized
from sparse_onnx.graph.external import read_array, slice_first_axis
from sparse_onnx.graph.retyped import retyped
from sparse_onnx.matching.linear import Matrix, matrix, stored_shape
from sparse_onnx.matching.values import attribute, producer, tensor

#: Bits of MatMulNBits and the type that its bytes hold, the first element in the lowest bits.
_BITS = {2: ir.DataType.UINT2, 4: ir.DataType.UINT4, 8: ir.DataType.UINT8}


@dataclasses.dataclass(frozen=True, eq=False)
class LayerWeight:
    """A matrix ``[K, N]``.

    Attributes:
        stored: the numbers, or the integers with their scales.
        out_in: whether it lies as ``[N, K]``.
        inputs, outputs: K and N.
        values: the constants in the graph: the matrix, then scales and zero points where there are any; none for
            integers that are a part of a stack.
    """

    stored: Matrix | Quantized
    out_in: bool
    inputs: int
    outputs: int
    values: tuple[ir.Value, ...]

    @property
    def nbytes(self) -> int:
        """As it is stored, scales and zero points included."""
        if isinstance(self.stored, Matrix) and self.stored.index is not None:
            return -(-self.inputs * self.outputs * self._tensors()[0].dtype.bitwidth // 8)
        if isinstance(self.stored, Quantized) and not self.values:  # a part of a stack
            parts = (self.stored.data, self.stored.scale, self.stored.zero_point)
            return sum(part.nbytes for part in parts if part is not None)
        return sum(kept.nbytes for kept in self._tensors())

    def _tensors(self) -> list[ir.TensorProtocol]:
        return [kept for value in self.values if (kept := tensor(value)) is not None]

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(value.name or "" for value in self.values)

    def numbers(self) -> np.ndarray:
        """``[K, N]`` float32, read when asked for and kept by nobody.

        Raises:
            ModelError: the weight file is gone.
        """
        if isinstance(self.stored, Quantized):
            array = self.stored.dequantized()
        else:
            [kept] = self._tensors()
            if self.stored.index is not None:
                kept = slice_first_axis(kept, self.stored.index, kept.name or "")
            array = read_array(kept)
        array = array.astype(np.float32, copy=False)
        if self.out_in:
            array = array.T
        return array[: self.inputs]


def plain_weight(stored: Matrix, out_in: bool) -> LayerWeight | None:
    """Of a matrix of floating-point numbers."""
    shape, kept = stored_shape(stored), tensor(stored.source)
    if shape is None or len(shape) != 2 or kept is None or not kept.dtype.is_floating_point():
        return None
    inputs, outputs = shape[::-1] if out_in else shape
    return LayerWeight(stored, out_in, inputs, outputs, (stored.source,))


def dequantized_weight(value: ir.Value | None, turned: bool) -> LayerWeight | None:
    """Of the output of a DequantizeLinear, or of one transposed. `turned`: the product takes it as ``[N, K]``."""
    node = producer(value)
    if node is not None and node.op_type in ("Identity", "Transpose") and node.inputs[0] is not None:
        swaps = node.op_type == "Transpose"
        if swaps and list(attribute(node, "perm", [1, 0])) != [1, 0]:
            return None
        return dequantized_weight(node.inputs[0], turned != swaps)
    quantized = None if value is None else Quantized.of(value)
    return None if quantized is None else _of(quantized, turned)


def integer_weight(
    data: ir.Value | None, scale: ir.Value | None, zero_point: ir.Value | None
) -> LayerWeight | None:
    """Of an integer product: ``[K, N]`` with one scale, or one a column."""
    parts = [None if value is None else tensor(value) for value in (data, scale, zero_point)]
    if data is None or scale is None or parts[0] is None or parts[1] is None or len(parts[0].shape) != 2:
        return None
    if (zero_point is not None and parts[2] is None) or parts[0].dtype.bitwidth > 8:
        return None
    columns = parts[0].shape.numpy()[1]
    if any(part is not None and part.size not in (1, columns) for part in parts[1:]):
        return None
    values = tuple(value for value in (data, scale, zero_point) if value is not None)
    dtype = parts[1].dtype
    return _of(Quantized(parts[0], parts[1], parts[2], 1, 0, dtype, values), False)


def nbits_weight(node: ir.Node) -> LayerWeight | str:
    """Of a MatMulNBits node, or why it cannot be read."""
    inputs, outputs = attribute(node, "K", 0), attribute(node, "N", 0)
    bits, block = attribute(node, "bits", 4), attribute(node, "block_size", 0)
    given = [*node.inputs, None, None, None][:6]
    parts = [None if value is None else tensor(value) for value in given[1:4]]
    if bits not in _BITS or block < 1 or min(inputs, outputs) < 1:
        return f"weights of {bits} bits in blocks of {block}"
    if parts[0] is None or parts[1] is None or (given[3] is not None and parts[2] is None):
        return "weights that are computed or passed in at run time"
    if given[4] is not None and given[4].name:
        return "weights in another order (g_idx)"
    data, scale, points = parts
    assert data is not None and scale is not None
    blocks = -(-inputs // block)
    if data.size * 8 != outputs * blocks * block * bits or scale.size != outputs * blocks:
        return "weights whose sizes contradict its attributes"
    codes = retyped(data, _BITS[bits], (outputs, blocks * block), data.name or "")
    scales = ir.Tensor(read_array(scale).reshape(outputs, blocks), scale.dtype, name=scale.name)
    middle: ir.TensorProtocol
    if points is None:
        middle = ir.Tensor(np.full((outputs, blocks), 1 << (bits - 1), np.uint8))
    elif points.dtype.is_floating_point():
        middle = ir.Tensor(read_array(points).reshape(outputs, blocks), points.dtype)
    else:
        middle = ir.Tensor(_unpacked(read_array(points), bits, outputs, blocks))
    values = tuple(value for value in given[1:4] if value is not None)
    stored = Quantized(codes, scales, middle, 1, block, scale.dtype, values)
    return LayerWeight(stored, True, inputs, outputs, values)


def _unpacked(points: np.ndarray, bits: int, outputs: int, blocks: int) -> np.ndarray:
    """Zero points ``[N, blocks]`` out of rows that end on whole bytes, lowest bits first."""
    rows = points.reshape(outputs, -1).astype(np.uint8)
    shifts = np.arange(0, 8, bits, dtype=np.uint8)
    apart = (rows[:, :, None] >> shifts) & np.uint8((1 << bits) - 1)
    return np.ascontiguousarray(apart.reshape(outputs, -1)[:, :blocks])


def _of(quantized: Quantized, out_in: bool) -> LayerWeight | None:
    shape = quantized.shape
    if len(shape) != 2 or math.prod(shape) == 0:
        return None
    inputs, outputs = shape[::-1] if out_in else shape
    return LayerWeight(quantized, out_in, inputs, outputs, quantized.values)


def float_weight(value: ir.Value | None, turned: bool) -> LayerWeight | None:
    """Of the second input of a product that takes it as ``[N, K]`` where `turned`: stored numbers or dequantized."""
    found = matrix(value)
    if found is not None:
        return plain_weight(found, found.transposed != turned)
    return dequantized_weight(value, turned)
