"""The matrix of a layer as the thresholded operators take it: ``[K, N]``, so that an input's weights lie together.

What lies the other way round is turned while the model is written, and read then for the first time. Integers keep
their scales:

| stored | becomes |
| --- | --- |
| MatMulNBits, blocks of inputs | the integers turned, blocks along the inputs: `axis` 0 |
| DequantizeLinear in blocks | the same blocks, along the axis that they were on |
| one scale a column, or for everything | one block of all inputs a column |
| one scale an input | one block of all outputs an input: `axis` 1 |
"""

from __future__ import annotations

import dataclasses

import numpy as np
import onnx_ir as ir

from sparse_onnx.blocks.lowering import Problem
from sparse_onnx.blocks.quantized import Quantized
from sparse_onnx.blocks.thresholded import LINEAR, N_BITS
from sparse_onnx.graph.external import read_array, slice_first_axis
from sparse_onnx.graph.stacked import computed, transpose
from sparse_onnx.matching.layer_weights import LayerWeight
from sparse_onnx.matching.values import tensor

_FLOATS = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
_INTEGERS = (ir.DataType.INT4, ir.DataType.UINT4, ir.DataType.INT8, ir.DataType.UINT8)


@dataclasses.dataclass(frozen=True, eq=False)
class Operands:
    """`tensors` by the operator's names for them, in the order of its inputs; `axis` and `block` of integers."""

    op: str
    tensors: dict[str, ir.TensorProtocol]
    axis: int = 0
    block: int = 0

    @property
    def attributes(self) -> dict[str, int]:
        return {"axis": self.axis, "block_size": self.block} if self.op == N_BITS else {}


def outside(node: ir.Node, home: object, mode: str) -> Problem | None:
    """Why a thresholded operator cannot stand where `node` does, with integers that are initializers of `home`.

    ORT 1.32 looks for what the DequantizeLinear of a function's body reads in the graph that the function is called in
    alone (`TransposeDQWeightsForMatMulNBits`), and does not load the model without the native kernels."""
    if mode != "native" or home is node.graph:
        return None
    return (
        "it stands in the body of an If, Loop or Scan and its integers outside of it: ORT does not load that without "
        "the native kernels",
        "the mode 'simulate' takes any",
    )


def operands(weight: LayerWeight, dtype: ir.DataType | None, name: str) -> Operands | str:
    """The weights of a layer whose inputs are of `dtype`, under names that begin with `name`; or why they cannot be."""
    if isinstance(weight.stored, Quantized):
        return _integers(weight.stored, weight, dtype, name)
    kept = tensor(weight.stored.source)
    assert kept is not None
    if kept.dtype not in _FLOATS or kept.dtype != dtype:
        return f"weights of type {kept.dtype.name.lower()}"
    if weight.stored.index is not None:
        kept = slice_first_axis(kept, weight.stored.index, name)
    return Operands(LINEAR, {"W": transpose(kept, name) if weight.out_in else kept})


def _integers(stored: Quantized, weight: LayerWeight, dtype: ir.DataType | None, name: str) -> Operands | str:
    if stored.data.dtype not in _INTEGERS:
        return f"weights of type {stored.data.dtype.name.lower()}"
    if stored.dtype != dtype or stored.scale.dtype != dtype:
        return "scales of another type than the inputs"
    if stored.zero_point is not None and stored.zero_point.dtype.is_floating_point():
        return "zero points that are no integers"
    turned = stored.turned() if weight.out_in else stored
    if turned.shape != (weight.inputs, weight.outputs):
        return "blocks that reach beyond the inputs"
    axis, block, grid = _grid(turned)
    if turned.shape[axis] % block:
        return f"blocks of {block} that do not divide {turned.shape[axis]}"
    scales = _spread(turned.scale, turned.dtype, grid, f"{name}.scales")
    if turned.zero_point is None:
        zeros: ir.TensorProtocol = ir.Tensor(np.zeros(grid, turned.data.dtype.numpy()), turned.data.dtype)
    else:
        zeros = _spread(turned.zero_point, turned.data.dtype, grid, f"{name}.zero_points")
    tensors = {"W": turned.data, "scales": scales, "zero_points": zeros}
    return Operands(N_BITS, tensors, axis, block)


def _grid(stored: Quantized) -> tuple[int, int, tuple[int, int]]:
    """Axis and length of the blocks, and the shape of what belongs to them."""
    inputs, outputs = stored.shape
    if stored.block:
        block = min(stored.block, stored.shape[stored.axis])
        across = (inputs // block, outputs) if stored.axis == 0 else (inputs, outputs // block)
        return stored.axis, block, across
    if stored.axis == 0 and stored.scale.size > 1:
        return 1, outputs, (inputs, 1)
    return 0, inputs, (1, outputs)


@dataclasses.dataclass(frozen=True)
class _Spread:
    """One for everything, one a row or one a column, as a grid."""

    grid: tuple[int, int]
    dtype: ir.DataType

    def __call__(self, *arrays: np.ndarray) -> np.ndarray:
        array = arrays[0].astype(self.dtype.numpy())
        return np.broadcast_to(array.reshape(()) if array.size == 1 else array.reshape(self.grid), self.grid)


def _spread(
    parameter: ir.TensorProtocol, dtype: ir.DataType, grid: tuple[int, int], name: str
) -> ir.TensorProtocol:
    if tuple(parameter.shape.numpy()) == grid and parameter.dtype == dtype:
        return parameter
    return computed(_Spread(grid, dtype), [parameter], dtype, grid, name)


def folded(weight: LayerWeight, centre: np.ndarray, bias: ir.TensorProtocol | None) -> np.ndarray:
    """bias + centre W in float64, ``[N]``. The weights are read only where the centre is not zero."""
    total = np.zeros(weight.outputs)
    if bias is not None:
        total += read_array(bias).astype(np.float64).reshape(-1)
    if np.any(centre):
        numbers = weight.numbers().astype(np.float64)
        spread = np.broadcast_to(centre.astype(np.float64).reshape(-1), (weight.inputs,))
        total += spread @ numbers
    return total
