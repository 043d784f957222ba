"""The matrices of each slot's expert, gathered out of a block's packed weights, and the product by them.

Quantized weights are gathered as integers; only what was gathered is turned into numbers, by a cast, a difference and
a product: runtimes that need static shapes take DequantizeLinear with constant scales alone. Integers below a byte,
which Gather does not take (ONNX has no such types in it), are gathered as bytes and taken apart by division.
"""

from __future__ import annotations

import math

import numpy as np
import onnx_ir as ir

from sparse_onnx.blocks.moe import MoEBlock, is_zero
from sparse_onnx.blocks.quantized import Quantized
from sparse_onnx.blocks.spec import WeightLayout
from sparse_onnx.graph.build import Emitter, Namespace
from sparse_onnx.graph.external import read_array
from sparse_onnx.graph.retyped import retyped

#: Types that hold all differences of two integers of a byte.
_EXACT_BYTES = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16)


def gather_obstacle(value: ir.Value, role: str) -> tuple[str, str] | None:
    """Why a packed weight cannot be gathered expert by expert, and what to do about it; None where it can."""
    node = value.producer()
    if node is None or node.domain != "" or node.op_type != "DequantizeLinear":
        return None
    weight = None if role.endswith("_bias") else Quantized.of(value)
    if weight is None or len(weight.shape) != 3:
        return (
            f"{role} is dequantized from what is computed or passed in at run time",
            "integers, scales and zero points must be initializers that are not graph inputs",
        )
    if "output_dtype" in node.attributes or weight.dtype not in _EXACT_BYTES:
        return f"{role} is dequantized to a type that is not its scale's", "use scales of the tokens' type"
    problem = ""
    if weight.block and weight.axis == 0:
        problem = "blocks run across experts"
    elif math.prod(weight.shape[1:]) * weight.data.dtype.bitwidth % 8:
        problem = "experts do not begin on whole bytes"
    if problem:
        return (
            f"{role} is quantized, and not expert by expert: {problem}",
            "quantize each expert in blocks of its own",
        )
    return None


class ChosenWeights:
    """Matrices and biases of the expert of each slot.

    Args:
        block: whose weights have no `gather_obstacle`.
        emit: where the nodes go.
        names: of the model.
        slots: ``[S, 1]`` int64, the expert of each slot, in [0, E).
    """

    def __init__(self, block: MoEBlock, emit: Emitter, names: Namespace, slots: ir.Value) -> None:
        self.block, self.emit, self.names, self.slots = block, emit, names, slots
        self.domains: set[str] = set()

    def linear(self, role: str, rows: ir.Value) -> ir.Value:
        """``rows [S, in] -> [S, out]`` by one matrix of each slot's expert, with its bias. No matrix is turned."""
        emit, value = self.emit, self.block.weights[role]
        quantized = Quantized.of(value)
        matrix = self._chosen(value) if quantized is None else self._dequantized(value, quantized)
        if self.block.spec.weight_layout == WeightLayout.OUT_IN:
            column = emit.op("Unsqueeze", rows, emit.ints(-1))
            result = emit.op("Squeeze", emit.op("MatMul", matrix, column), emit.ints(-1))
        else:
            row = emit.op("Unsqueeze", rows, emit.ints(1))
            result = emit.op("Squeeze", emit.op("MatMul", row, matrix), emit.ints(1))
        bias = self.block.weights[f"{role}_bias"]
        return result if is_zero(bias) else emit.op("Add", result, self._chosen(bias))

    def drop_unused(self) -> None:
        """Removes packed weights, and the nodes that dequantize them, which nothing reads any more."""
        for value in self.block.weights.values():
            node = value.producer()
            if value.uses() or value.is_graph_output():
                continue
            held = [value]
            if node is not None and node.op_type == "DequantizeLinear" and node.graph is not None:
                held = [item for item in node.inputs if item is not None]
                node.graph.remove(node, safe=True)
            for item in held:
                if isinstance(item.graph, ir.Graph) and not item.uses() and not item.is_graph_output():
                    item.graph.initializers.pop(item.name or "", None)

    def _chosen(self, packed: ir.Value) -> ir.Value:
        """``[E, ...] -> [S, ...]``. By a Gather and a Squeeze: ORT runs float16 in float32 on CPU, and moves the cast
        in front of a Gather that feeds a product alone: all experts would be cast (measured: 31 ms in place of 0.4)."""
        return self.emit.op("Squeeze", self.emit.op("Gather", packed, self.slots), self.emit.ints(1))

    def _dequantized(self, value: ir.Value, weight: Quantized) -> ir.Value:
        """``[S, A, B]`` numbers of the scale's type."""
        emit, shape = self.emit, weight.shape
        dtype = ir.DataType.FLOAT if weight.data.dtype.bitwidth > 8 else weight.dtype
        numbers = self._integers(value, weight, dtype)
        split = _split_blocks(weight)
        if split:
            numbers = emit.op("Reshape", numbers, emit.ints(-1, *split))
        points = self._points(value, weight, dtype)
        if points is not None:
            numbers = emit.op("Sub", numbers, points)
        numbers = emit.op("Mul", numbers, self._fitted(weight, weight.values[1], weight.dtype, dtype))
        if split:
            numbers = emit.op("Reshape", numbers, emit.ints(-1, *shape[1:]))
        return numbers if dtype == weight.dtype else emit.op("Cast", numbers, to=weight.dtype)

    def _integers(self, value: ir.Value, weight: Quantized, dtype: ir.DataType) -> ir.Value:
        """``[S, A, B]`` the stored integers as numbers."""
        emit, stored = self.emit, weight.data.dtype
        if stored.bitwidth >= 8:
            return self._numbers(self._chosen(weight.values[0]), stored, dtype)
        count = 8 // stored.bitwidth
        shape = weight.shape[0], math.prod(weight.shape[1:]) // count
        packed = self._put(
            value, "bytes", retyped(weight.data, ir.DataType.UINT8, shape, f"{value.name}.bytes")
        )
        rest = self._numbers(self._chosen(packed), ir.DataType.UINT8, dtype)
        digits = []
        for _ in range(count - 1):
            higher, digit = self._divided(rest, 1 << stored.bitwidth, dtype)
            digits.append(digit)
            rest = higher
        digits = [emit.op("Unsqueeze", digit, emit.ints(-1)) for digit in [*digits, rest]]
        numbers = emit.op("Concat", *digits, axis=-1)
        if stored.is_signed():
            # A digit d of two's complement stands for d, or from half of the range on for d less the whole range.
            negative = emit.op(
                "Floor", emit.op("Mul", numbers, emit.scalar(2 / (1 << stored.bitwidth), dtype))
            )
            whole = emit.scalar(1 << stored.bitwidth, dtype)
            numbers = emit.op("Sub", numbers, emit.op("Mul", negative, whole))
        return emit.op("Reshape", numbers, emit.ints(-1, *weight.shape[1:]))

    def _numbers(self, value: ir.Value, stored: ir.DataType, dtype: ir.DataType) -> ir.Value:
        """A cast. QNN 2.7 on HTP casts bytes to float as if they were bool; by way of int32 it does not."""
        if stored == ir.DataType.UINT8:
            value = self.emit.op("Cast", value, to=ir.DataType.INT32)
        return self.emit.op("Cast", value, to=dtype)

    def _divided(self, number: ir.Value, by: int, dtype: ir.DataType) -> tuple[ir.Value, ir.Value]:
        """Quotient and remainder of whole numbers by a power of two: exact in every floating-point type."""
        emit = self.emit
        quotient = emit.op("Floor", emit.op("Mul", number, emit.scalar(1 / by, dtype)))
        return quotient, emit.op("Sub", number, emit.op("Mul", quotient, emit.scalar(by, dtype)))

    def _points(self, value: ir.Value, weight: Quantized, dtype: ir.DataType) -> ir.Value | None:
        """Zero points in a shape that fits the numbers; None where all are zero. They are few, and read here."""
        if weight.zero_point is None:
            return None
        points = read_array(weight.zero_point)
        first = points.flat[0]
        if (points == first).all():
            return self.emit.scalar(float(first), dtype) if first else None
        held, stored = weight.values[2], weight.zero_point.dtype
        if stored.bitwidth < 8:
            wide = ir.Tensor(points.astype(np.int8), name=f"{value.name}.zero_points")
            held, stored = self._put(value, "zero_points", wide), ir.DataType.INT8
        return self._fitted(weight, held, stored, dtype)

    def _fitted(self, weight: Quantized, held: ir.Value, stored: ir.DataType, dtype: ir.DataType) -> ir.Value:
        """Scales or zero points of the slots' experts as numbers, in a shape that fits the integers'."""
        emit, axis = self.emit, weight.axis
        one = weight.scale.size == 1 and not weight.block
        if weight.block:
            held = self._chosen(held)
        elif axis == 0 and not one:
            held = emit.op("Unsqueeze", emit.op("Gather", held, self.slots), emit.ints(-1))
        if stored != dtype:
            held = self._numbers(held, stored, dtype)
        if one or (not weight.block and axis != 1) or (weight.block and _blocks_of(weight) == 1):
            return held
        held = emit.op("Unsqueeze", held, emit.ints(axis + 1 if weight.block else -1))
        if not weight.block or _split_blocks(weight):
            return held
        # Blocks that end with a shorter one: each scale written out, and what is too much cut off.
        repeats, sizes = [1, 1, 1, 1], [-1, *weight.shape[1:]]
        repeats[axis + 1], sizes[axis] = weight.block, _blocks_of(weight) * weight.block
        spread = emit.op("Reshape", emit.op("Expand", held, emit.ints(*repeats)), emit.ints(*sizes))
        return emit.op("Slice", spread, emit.ints(0), emit.ints(weight.shape[axis]), emit.ints(axis))

    def _put(self, value: ir.Value, what: str, tensor: ir.TensorProtocol) -> ir.Value:
        node = value.producer()
        assert node is not None and isinstance(node.graph, ir.Graph)
        return self.names.initializer(node.graph, (value.name, what), tensor)


def _blocks_of(weight: Quantized) -> int:
    """Along the axis of the scales."""
    return -(-weight.shape[weight.axis] // weight.block) if weight.block else 1


def _split_blocks(weight: Quantized) -> list[int]:
    """``[A, B]`` with its axis of several whole blocks as two: which, and where in it. Empty for all others."""
    if not weight.block or _blocks_of(weight) == 1 or weight.shape[weight.axis] % weight.block:
        return []
    sizes = list(weight.shape)
    sizes[weight.axis : weight.axis + 1] = [_blocks_of(weight), weight.block]
    return sizes[1:]
