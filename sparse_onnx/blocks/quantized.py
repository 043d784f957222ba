"""Expert weights that are stored quantized: outputs of DequantizeLinear, and one expert's part of them.

A packed weight `[E, A, B]` is `(data - zero_point) * scale`. ONNX knows three granularities, all of which have a part
for each expert: blocks along one axis, one scale an index of one axis, one scale for everything.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import onnx_ir as ir

from sparse_onnx.graph.external import read_array, slice_first_axis
from sparse_onnx.graph.stacked import transpose

#: Elements that are turned into numbers at once.
_CHUNK = 1 << 20
#: Types that DequantizeLinear takes and that hold small integers.
_INTEGERS = frozenset(
    {
        ir.DataType.UINT2, ir.DataType.UINT4, ir.DataType.UINT8, ir.DataType.UINT16,
        ir.DataType.INT2, ir.DataType.INT4, ir.DataType.INT8, ir.DataType.INT16, ir.DataType.INT32,
    }
)  # fmt: skip


@dataclasses.dataclass(frozen=True, eq=False)
class Quantized:
    """A constant that a DequantizeLinear node turns into numbers.

    Attributes:
        data: integers ``[...]``.
        scale: of the shape of `data` with `axis` divided by the block, ``[size of axis]``, or ``[]``.
        zero_point: of scale's shape and data's type; None is zero.
        axis: counted from the front.
        block: elements along `axis` that share a scale; 0 where the scale has no blocks.
        dtype: of the result.
        values: the constants in the graph, in the order data, scale, zero point.
    """

    data: ir.TensorProtocol
    scale: ir.TensorProtocol
    zero_point: ir.TensorProtocol | None
    axis: int
    block: int
    dtype: ir.DataType
    values: tuple[ir.Value, ...] = ()

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.data.shape.numpy())

    @staticmethod
    def of(value: ir.Value) -> Quantized | None:
        """The constants behind a dequantized value; None for anything else."""
        node = value.producer()
        if node is None or node.domain != "" or node.op_type != "DequantizeLinear":
            return None
        values = [item for item in node.inputs if item is not None]
        tensors = [_constant(item) for item in values]
        if len(tensors) < 2 or any(tensor is None for tensor in tensors):
            return None
        data, scale, zero_point = [*tensors, None][:3]
        assert data is not None and scale is not None
        if data.dtype not in _INTEGERS:
            return None
        attributes = {
            name: item.as_int()
            for name, item in node.attributes.items()
            if name in ("axis", "block_size", "output_dtype") and not item.is_ref()
        }
        if attributes.get("output_dtype", 0) not in (0, scale.dtype):  # opset 23: computed in another type
            return None
        rank = len(data.shape)
        axis = attributes.get("axis", 1)
        block = attributes.get("block_size", 0)
        whole = len(scale.shape) == 0 or (len(scale.shape) == 1 and scale.size == 1 and rank != 1)
        if not whole and not -rank <= axis < rank:
            return None
        at = 0 if whole else axis % rank
        return Quantized(data, scale, zero_point, at, block, scale.dtype, tuple(values))

    def part(self, index: int, name: str) -> Quantized:
        """One expert's, ``[A, B]``. Nothing is read or copied.

        Raises:
            ValueError: the parts do not begin on whole bytes, or blocks run across experts.
        """
        data = slice_first_axis(self.data, index, name)
        if self.block and self.axis == 0:
            raise ValueError(f"blocks of {self.data.name!r} run across experts")
        own = self.block > 0 or (self.axis == 0 and len(self.scale.shape) == 1 and self.scale.size > 1)
        if not own:  # one scale for all, or one an index of an axis that each expert has
            return dataclasses.replace(self, data=data, axis=max(0, self.axis - 1), values=())
        scale = slice_first_axis(self.scale, index, f"{name}.scale")
        zero = None if self.zero_point is None else _sliced(self.zero_point, index, f"{name}.zero_point")
        return Quantized(data, scale, zero, max(0, self.axis - 1), self.block, self.dtype)

    def turned(self) -> Quantized:
        """A matrix ``[A, B]`` as ``[B, A]``, turned when it is read."""
        name = self.data.name or ""
        parameters = [self.scale, self.zero_point]
        if self.block:
            parameters = [None if item is None else transpose(item, item.name or name) for item in parameters]
        scale, zero = parameters
        assert scale is not None
        axis = self.axis if len(self.scale.shape) == 0 else 1 - self.axis
        return dataclasses.replace(
            self, data=transpose(self.data, name), scale=scale, zero_point=zero, axis=axis, values=()
        )

    def dequantized(self) -> np.ndarray:
        """As numbers of type `dtype`, computed in float32, some rows at a time."""
        data, scale = read_array(self.data), read_array(self.scale)
        points = None if self.zero_point is None else read_array(self.zero_point)
        result = np.empty(self.shape, self.dtype.numpy())
        step = max(1, _CHUNK // max(1, math.prod(self.shape[1:])))
        for start in range(0, self.shape[0], step):
            rows = np.arange(start, min(start + step, self.shape[0]))
            numbers = data[start : start + step].astype(np.float32)
            if points is not None:
                numbers -= self._spread(points, rows)
            result[rows] = numbers * self._spread(scale, rows)
        return result

    def _spread(self, parameter: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """What belongs to these rows of the data, in a shape that goes with theirs."""
        if not self.block and parameter.size == 1:
            return parameter.astype(np.float32).reshape(())
        if self.block and self.axis:
            along = np.arange(self.shape[self.axis]) // self.block
            return parameter[rows].astype(np.float32).take(along, self.axis)
        if self.axis == 0:
            parameter = parameter[rows // max(1, self.block)]
        if not self.block:
            parameter = parameter.reshape([-1 if at == self.axis else 1 for at in range(len(self.shape))])
        return parameter.astype(np.float32)


class Slices:
    """A packed quantized weight of which only single experts ``slices[e]`` are read, dequantized."""

    def __init__(self, weight: Quantized) -> None:
        self.weight, self.shape = weight, weight.shape

    def __getitem__(self, index: int) -> np.ndarray:
        return self.weight.part(int(index), self.weight.data.name or "").dequantized()


def _constant(value: ir.Value) -> ir.TensorProtocol | None:
    if value.is_graph_input() or not (value.is_initializer() or value.producer() is not None):
        return None
    return ir.convenience.get_const_tensor(value)


def _sliced(tensor: ir.TensorProtocol, index: int, name: str) -> ir.TensorProtocol:
    """A slice, copied where it does not begin on a whole byte: zero points are few."""
    if math.prod(tensor.shape.numpy()[1:]) * tensor.dtype.bitwidth % 8:
        return ir.Tensor(read_array(tensor)[index], tensor.dtype, name=name)
    return slice_first_axis(tensor, index, name)
