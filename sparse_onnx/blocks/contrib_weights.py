"""A block's weights in the layout of `com.microsoft::MoE` and `QMoE`, which keep their bytes where they can.

    fc1    [E, N, D]    N = I, or 2 I with the rows of gate and up in turn
    fc2    [E, D, I]
    QMoE   unsigned integers of 4 or 8 bits in bytes, the first in the lowest bits; a scale for each block of a row

Weights that lie so already are the same range of the same file. Others - gate and up apart or one behind the other,
inputs before outputs, signed integers - are computed expert by expert while the model is written.

What the CPU kernel makes of quantized weights, measured on ORT 1.24 to 1.32:

    one scale a row, no block_size   exact, 10 times slower than blocks of 256 with that scale repeated
    4 bits in blocks                 exact, but for accuracy_level 4: activations are rounded to 8 bits
    8 bits in blocks                 from ORT 1.31 on activations are always rounded to 8 bits
    zero points of one block a row   another layout in ORT 1.24 than in 1.32
    one block a row in fc1 alone     up to ORT 1.30 fc2 is held to have one, too
    zero points of fc1 alone         up to ORT 1.30 fc2 is quantized again, and is off by 3 %
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import numpy as np
import onnx_ir as ir

from sparse_onnx.blocks.contrib_recipes import Flip, Pack, Points, Repeat
from sparse_onnx.blocks.lowering import Problem
from sparse_onnx.blocks.moe import MoEBlock, is_zero
from sparse_onnx.blocks.quantized import Quantized
from sparse_onnx.blocks.spec import GateLayout, WeightLayout
from sparse_onnx.graph.build import Namespace
from sparse_onnx.graph.external import FirstAxis, read_array, slice_first_axis
from sparse_onnx.graph.retyped import retyped
from sparse_onnx.graph.stacked import computed, interleave, stack, stored, transpose

_BYTE = ir.DataType.UINT8
_UNSIGNED = (ir.DataType.UINT4, ir.DataType.UINT8)
_SIGNED = (ir.DataType.INT4, ir.DataType.INT8)
_BLOCKS = (16, 256)


@dataclasses.dataclass(frozen=True)
class Format:
    """How QMoE is given quantized weights. `block` elements of a row share a scale, 0 for all of it. `points`: zero
    points are given, since some are not half of the range."""

    bits: int
    block: int
    points: bool


@dataclasses.dataclass(frozen=True)
class Projection:
    """Inputs of one projection. `bias` is None where all are zero, the last two where there are none."""

    weight: ir.Value
    bias: ir.Value | None
    scales: ir.Value | None = None
    zero_points: ir.Value | None = None


def quantized_roles(block: MoEBlock) -> dict[str, Quantized]:
    """The matrices that are outputs of DequantizeLinear."""
    found = {role: Quantized.of(block.weights[role]) for role in block.spec.roles}
    return {role: weight for role, weight in found.items() if weight is not None}


def quantized_format(block: MoEBlock, weights: dict[str, Quantized], rounded: bool) -> Format | Problem:
    """The format for a block whose matrices are all quantized, or why there is none.

    Args:
        block: the block; its weights can be cut into experts.
        weights: its matrices by role.
        rounded: whether activations may be rounded to 8 bits.
    """
    axis = 2 if block.spec.weight_layout is WeightLayout.OUT_IN else 1
    for role, weight in weights.items():
        kind = weight.data.dtype
        if kind not in _UNSIGNED + _SIGNED:
            return f"{role} is stored as {kind.name.lower()}", "the operator takes integers of 4 and 8 bits"
        if not weight.block or weight.axis != axis:
            return f"{role} has no scales for blocks of its inputs", "quantize it in blocks along the inputs"
        if weight.scale.dtype != block.dtype:
            types = f"{weight.scale.dtype.name.lower()}, and tokens are {block.dtype.name.lower()}"
            return f"{role} has scales of type {types}", "the operator takes both of one type"
        if weight.shape[axis] * kind.bitwidth % 8:
            return f"{role} has rows that do not end on whole bytes", "the operator cannot hold such rows"
    bits = {weight.data.dtype.bitwidth for weight in weights.values()}
    if len(bits) > 1:
        return "its matrices are quantized to different widths", "use one width for all"
    width, points = bits.pop(), not all(map(_in_the_middle, weights.values()))
    inputs = {role: weight.shape[axis] for role, weight in weights.items()}
    whole_rows = all(weight.block >= inputs[role] for role, weight in weights.items())
    if width == 8 and not rounded:
        if whole_rows:
            return Format(width, 0, points)
        return (
            "with 8-bit weights in blocks the CPU kernel rounds activations to 8 bits, about 1 % off, and no lossy "
            "step allows that",
            "quantize to one scale a row, or with a step that allows it (--quantize int8)",
        )
    block_size = min(_fitting(inputs[role], weight.block) for role, weight in weights.items())
    single = [role for role, size in inputs.items() if size == block_size]
    apart = block.spec.roles[0] in single and len(single) < len(inputs) and not rounded
    if single and (points or apart):
        block_size //= 2  # kernels that still run such models misread what belongs to one block a row
    if block_size >= _BLOCKS[0]:
        return Format(width, block_size, points)
    if whole_rows:
        return Format(width, 0, points)
    return (
        f"its rows of {', '.join(map(str, sorted(set(inputs.values()))))} and their scales have no blocks in common of "
        f"{_BLOCKS[0]} to {_BLOCKS[1]} elements, a power of two",
        "quantize in blocks of 32",
    )


def _in_the_middle(weight: Quantized) -> bool:
    """Whether each zero point is what the operator takes for one that is not given."""
    middle = 0 if weight.data.dtype in _SIGNED else 1 << (weight.data.dtype.bitwidth - 1)
    if weight.zero_point is None:
        return middle == 0
    held = {id(tensor): tensor for tensor in stored(weight.zero_point)}.values()
    if any(isinstance(tensor, ir.LazyTensor) for tensor in held):
        return False  # computed from weights: too much work for the answer
    return all((read_array(tensor).astype(np.int16) == middle).all() for tensor in held)


def _fitting(inputs: int, block: int) -> int:
    """The largest block that divides rows, and blocks of rows, into whole ones: each ends where an old one does."""
    shared = math.gcd(inputs, block) if block < inputs else inputs
    return min(shared & -shared, _BLOCKS[1])


def projections(block: MoEBlock, names: Namespace, form: Format | None) -> tuple[Projection, Projection]:
    """Both projections of a block, fc1 and fc2.

    What must be retyped or computed becomes initializers of the graph that holds the block's own weights, shared by all
    blocks with the same weights.

    Args:
        block: whose weights can be cut into experts.
        names: of the model.
        form: of quantized weights; None where they are not.
    """
    roles = block.spec.roles
    first = _Source(block, names, form, roles[:-1], block.spec.gate_layout)
    return first.projection(), _Source(block, names, form, roles[-1:], GateLayout.NONE).projection()


class _Source:
    """The matrices of one projection: one, or gate's and up's."""

    def __init__(
        self, block: MoEBlock, names: Namespace, form: Format | None, roles: tuple[str, ...], gate: GateLayout
    ) -> None:
        self.names, self.form, self.gate, self.dtype = names, form, gate, block.dtype
        self.values = [block.weights[role] for role in roles]
        self.biases = [block.weights[f"{role}_bias"] for role in roles]
        self.quantized = [weight for value in self.values if (weight := Quantized.of(value)) is not None]
        self.turned = block.spec.weight_layout is WeightLayout.IN_OUT
        self.in_turn = gate in (GateLayout.CONCATENATED, GateLayout.SEPARATE)
        self.experts = block.experts or 0

    def projection(self) -> Projection:
        biased = not all(map(is_zero, self.biases))
        bias = self._floats("bias", self.biases, turned=False) if biased else None
        if self.form is None:
            return Projection(self._floats("weight", self.values, self.turned), bias)
        points = self._points(self.form) if self.form.points else None
        return Projection(self._bytes(self.form), bias, self._scales(self.form), points)

    def _floats(self, what: str, values: list[ir.Value], turned: bool) -> ir.Value:
        """``[E, N, ...]``, as it is where it can be."""
        if not turned and not self.in_turn:
            return values[0]
        parts = []
        for expert in range(self.experts):
            own = []
            for value in values:
                assert value.const_value is not None
                part = slice_first_axis(value.const_value, expert, f"{value.name}.{expert}")
                own.append(transpose(part, part.name or "") if turned else part)
            parts.append(self._rows(own))
        return self._put(what, values, stack(parts, f"{values[0].name}.moe"))

    def _bytes(self, form: Format) -> ir.Value:
        """``[E, N, K bits / 8]``"""
        first = self.quantized[0]
        signed = any(weight.data.dtype in _SIGNED for weight in self.quantized)
        if self._whole(first.data) and not signed:
            experts, rows, columns = first.shape
            data = retyped(first.data, _BYTE, (experts, rows, columns * form.bits // 8), self._name("qmoe"))
            return self._put("data", self.values, data)
        return self._put("data", self.values, self._stack(_unsigned_bytes, "qmoe"))

    def _scales(self, form: Format) -> ir.Value:
        """``[E, N, blocks]``, or ``[E, N]`` with one a row."""
        first = self.quantized[0]
        if self._whole(first.scale) and form.block == min(first.block, first.shape[2]):
            return first.values[1]
        if self._whole(first.scale) and not form.block:
            scales = retyped(first.scale, self.dtype, first.shape[:2], self._name("qmoe_scales"))
            return self._put("scales", self.values, scales)

        def own(part: Quantized) -> ir.TensorProtocol:
            shape = _grid(part, form)
            recipe = Repeat(_times(part, form), shape)
            return computed(recipe, (part.scale,), self.dtype, shape, part.scale.name or "")

        return self._put("scales", self.values, self._stack(own, "qmoe_scales"))

    def _points(self, form: Format) -> ir.Value:
        """``[E, N, blocks]``, rows packed into bytes; ``[E, N]``, experts packed into bytes, with one scale a row."""
        first, each = self.quantized[0], 8 // form.bits
        held, same = first.zero_point, form.block in (0, min(first.block, first.shape[-1]))
        if held is not None and same and self._whole(held) and held.dtype in _UNSIGNED:
            *lead, last = held.shape.numpy()[: 3 if form.block else 2]
            if last % each == 0:
                points = retyped(held, _BYTE, (*lead, last // each), self._name("qmoe_zero_points"))
                return self._put("points", self.values, points)

        def own(part: Quantized) -> ir.TensorProtocol:
            middle = 1 << (form.bits - 1) if part.data.dtype in _SIGNED else 0
            shape = _grid(part, form)
            if part.zero_point is None:
                return ir.Tensor(np.full(shape, middle, np.uint8))
            recipe = Points(middle, _times(part, form), shape)
            return computed(recipe, (part.zero_point,), _BYTE, shape, part.zero_point.name or "")

        def packed(rows: ir.TensorProtocol) -> ir.TensorProtocol:
            *lead, last = rows.shape.numpy()
            return computed(Pack(form.bits), (rows,), _BYTE, (*lead, -(-last // each)), rows.name or "")

        return self._put("points", self.values, self._stack(own, "qmoe_zero_points", packed))

    def _whole(self, tensor: ir.TensorProtocol) -> bool:
        """Whether all experts' rows are as they are wanted, one behind the other."""
        return not (self.turned or self.in_turn or isinstance(tensor, FirstAxis))

    def _stack(
        self,
        make: Callable[[Quantized], ir.TensorProtocol],
        label: str,
        finish: Callable[[ir.TensorProtocol], ir.TensorProtocol] | None = None,
    ) -> ir.TensorProtocol:
        """What is made of each expert's matrices ``[N, K]``, their blocks along K, then of all of its rows."""
        parts = []
        for expert in range(self.experts):
            own = []
            for weight in self.quantized:
                part = weight.part(expert, f"{weight.data.name}.{expert}")
                own.append(make(part.turned() if self.turned else part))
            rows = self._rows(own)
            parts.append(rows if finish is None else finish(rows))
        return stack(parts, self._name(label))

    def _rows(self, parts: list[ir.TensorProtocol]) -> ir.TensorProtocol:
        """One expert's rows in the operator's order."""
        first, name = parts[0], parts[0].name or ""
        if self.gate is GateLayout.CONCATENATED:
            rows, *rest = first.shape.numpy()
            both = retyped(first, first.dtype, (2, rows // 2, *rest), name)
            parts = [slice_first_axis(both, half, name) for half in range(2)]
        return interleave(parts[0], parts[1], name) if self.in_turn else first

    def _name(self, label: str) -> str:
        return f"{self.values[0].name}.{label}"

    def _put(self, what: str, values: list[ir.Value], tensor: ir.TensorProtocol) -> ir.Value:
        quantized = Quantized.of(values[0])
        graph = (values[0] if quantized is None else quantized.values[0]).graph
        assert isinstance(graph, ir.Graph)
        key = ("contrib", what, *(value.name for value in values), self.gate, self.turned, self.form)
        return self.names.initializer(graph, key, tensor)


def _unsigned_bytes(part: Quantized) -> ir.TensorProtocol:
    """``[N, K bits / 8]``. A signed integer is the unsigned one of the flipped top bit, less half of the range."""
    rows, columns = part.shape
    bits, name = part.data.dtype.bitwidth, part.data.name or ""
    shape = (rows, columns * bits // 8)
    raw = retyped(part.data, _BYTE, shape, name)
    if part.data.dtype not in _SIGNED:
        return raw
    return computed(Flip(0x80 if bits == 8 else 0x88), (raw,), _BYTE, shape, name)


def _grid(part: Quantized, form: Format) -> tuple[int, ...]:
    """How many scales one expert's ``[N, K]`` has."""
    rows, columns = part.shape
    return (rows, columns // form.block) if form.block else (rows,)


def _times(part: Quantized, form: Format) -> int:
    """How many blocks have the scale of one that the part has; its last one may be cut short."""
    return -(-part.block // form.block) if form.block else 1
