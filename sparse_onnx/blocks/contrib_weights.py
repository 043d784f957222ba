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
    zero points of fc1 alone         up to ORT 1.30 fc2 is quantized again, and is off by 3 %
"""

from __future__ import annotations

import dataclasses
import math

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
    if points and block_size == min(inputs.values()):
        block_size //= 2
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


class ContribWeights:
    """Both projections of one block. What must be computed or retyped becomes initializers of the graph that holds the
    block's own weights, shared by all blocks with the same weights.

    Args:
        block: whose weights can be cut into experts.
        names: of the model.
        form: of quantized weights; None where they are not.
    """

    def __init__(self, block: MoEBlock, names: Namespace, form: Format | None) -> None:
        self.block, self.names, self.form = block, names, form
        self.quantized = quantized_roles(block)
        self.turned = block.spec.weight_layout is WeightLayout.IN_OUT

    def projections(self) -> tuple[Projection, Projection]:
        """fc1 and fc2."""
        roles = self.block.spec.roles
        return self._projection(roles[:-1], self.block.spec.gate_layout), self._projection(roles[-1:], None)

    def _projection(self, roles: tuple[str, ...], gate: GateLayout | None) -> Projection:
        bias = self._bias(roles, gate)
        if self.form is None:
            return Projection(self._matrix(roles, gate), bias)
        points = self._points(roles, gate) if self.form.points else None
        return Projection(self._bytes(roles, gate), bias, self._scales(roles, gate), points)

    def _bias(self, roles: tuple[str, ...], gate: GateLayout | None) -> ir.Value | None:
        values = [self.block.weights[f"{role}_bias"] for role in roles]
        if all(map(is_zero, values)):
            return None
        return self._packed(values, "bias", gate, [_constant(value) for value in values])

    def _matrix(self, roles: tuple[str, ...], gate: GateLayout | None) -> ir.Value:
        values = [self.block.weights[role] for role in roles]
        return self._packed(
            values, "weight", gate, [_constant(value) for value in values], turned=self.turned
        )

    def _packed(
        self,
        values: list[ir.Value],
        what: str,
        gate: GateLayout | None,
        tensors: list[ir.TensorProtocol],
        turned: bool = False,
    ) -> ir.Value:
        """``[E, N, ...]`` of floats, as it is where it can be."""
        if not turned and not _interleaves(gate):
            return values[0]
        parts = []
        for expert in range(tensors[0].shape.numpy()[0]):
            own = [slice_first_axis(tensor, expert, f"{tensor.name}.{expert}") for tensor in tensors]
            if turned:
                own = [transpose(tensor, tensor.name or "") for tensor in own]
            parts.append(_in_turn(own, gate))
        return self._put(values, what, gate, stack(parts, f"{values[0].name}.{_LABEL[what]}"))

    def _bytes(self, roles: tuple[str, ...], gate: GateLayout | None) -> ir.Value:
        assert self.form is not None
        weights = [self.quantized[role] for role in roles]
        values = [self.block.weights[role] for role in roles]
        signed = any(weight.data.dtype in _SIGNED for weight in weights)
        name, data = f"{values[0].name}.{_LABEL['data']}", weights[0].data
        if not (self.turned or signed or _interleaves(gate) or isinstance(data, FirstAxis)):
            experts, rows, columns = weights[0].shape
            shape = (experts, rows, columns * self.form.bits // 8)
            return self._put(values, "data", gate, retyped(data, _BYTE, shape, name))
        parts = []
        for expert in range(weights[0].shape[0]):
            own = [self._part(weight, expert) for weight in weights]
            parts.append(_in_turn([_unsigned_bytes(part) for part in own], gate))
        return self._put(values, "data", gate, stack(parts, name))

    def _scales(self, roles: tuple[str, ...], gate: GateLayout | None) -> ir.Value:
        form, weights = self.form, [self.quantized[role] for role in roles]
        assert form is not None
        values = [self.block.weights[role] for role in roles]
        name, scale, dtype = f"{values[0].name}.{_LABEL['scales']}", weights[0].scale, self.block.dtype
        whole = not (self.turned or _interleaves(gate))
        if whole and form.block == weights[0].block:
            return weights[0].values[1]
        if whole and not form.block and not isinstance(scale, FirstAxis):
            return self._put(values, "scales", gate, retyped(scale, dtype, weights[0].shape[:2], name))
        parts = []
        for expert in range(weights[0].shape[0]):
            own = []
            for part in (self._part(weight, expert) for weight in weights):
                rows, columns = part.shape
                shape = (rows, columns // form.block) if form.block else (rows,)
                recipe = Repeat(_times(part.block, form.block), shape)
                own.append(computed(recipe, (part.scale,), dtype, shape, name))
            parts.append(_in_turn(own, gate))
        return self._put(values, "scales", gate, stack(parts, name))

    def _points(self, roles: tuple[str, ...], gate: GateLayout | None) -> ir.Value:
        """``[E, N, blocks]``, rows packed into bytes; ``[E, N]``, experts packed into bytes, with one scale a row."""
        form, weights = self.form, [self.quantized[role] for role in roles]
        assert form is not None
        values = [self.block.weights[role] for role in roles]
        name, held = f"{values[0].name}.{_LABEL['points']}", weights[0].zero_point
        each = 8 // form.bits
        whole = not (self.turned or _interleaves(gate)) and form.block in (0, weights[0].block)
        if whole and held is not None and held.dtype in _UNSIGNED and not isinstance(held, FirstAxis):
            *lead, last = held.shape.numpy() if form.block else held.shape.numpy()[:2]
            if last % each == 0:
                return self._put(values, "points", gate, retyped(held, _BYTE, (*lead, last // each), name))
        parts = []
        for expert in range(weights[0].shape[0]):
            own = []
            for part in (self._part(weight, expert) for weight in weights):
                rows, columns = part.shape
                shape = (rows, columns // form.block) if form.block else (rows,)
                own.append(_points(part, form, shape, name))
            turns = _in_turn(own, gate)
            *lead, last = turns.shape.numpy()
            parts.append(computed(Pack(form.bits), (turns,), _BYTE, (*lead, -(-last // each)), name))
        return self._put(values, "points", gate, stack(parts, name))

    def _part(self, weight: Quantized, expert: int) -> Quantized:
        """One expert's ``[N, K]``, with its blocks along K."""
        part = weight.part(expert, f"{weight.data.name}.{expert}")
        return part.turned() if self.turned else part

    def _put(
        self, values: list[ir.Value], what: str, gate: GateLayout | None, tensor: ir.TensorProtocol
    ) -> ir.Value:
        quantized = Quantized.of(values[0])
        graph = (values[0] if quantized is None else quantized.values[0]).graph
        assert isinstance(graph, ir.Graph)
        key = (what, *(value.name for value in values), gate, self.turned, self.form)
        return self.names.initializer(graph, ("contrib", *key), tensor)


_LABEL = {
    "weight": "moe",
    "bias": "moe",
    "data": "qmoe",
    "scales": "qmoe_scales",
    "points": "qmoe_zero_points",
}


def _constant(value: ir.Value) -> ir.TensorProtocol:
    assert value.const_value is not None
    return value.const_value


def _interleaves(gate: GateLayout | None) -> bool:
    return gate in (GateLayout.CONCATENATED, GateLayout.SEPARATE)


def _in_turn(parts: list[ir.TensorProtocol], gate: GateLayout | None) -> ir.TensorProtocol:
    """One expert's rows in the operator's order."""
    first = parts[0]
    if gate is GateLayout.CONCATENATED:
        rows, *rest = first.shape.numpy()
        both = retyped(first, first.dtype, (2, rows // 2, *rest), first.name or "")
        parts = [slice_first_axis(both, half, first.name or "") for half in range(2)]
    return interleave(parts[0], parts[1], first.name or "") if _interleaves(gate) else first


def _unsigned_bytes(part: Quantized) -> ir.TensorProtocol:
    """``[N, K bits / 8]``. A signed integer is the unsigned one of the flipped top bit, less half of the range."""
    rows, columns = part.shape
    bits, name = part.data.dtype.bitwidth, part.data.name or ""
    shape = (rows, columns * bits // 8)
    raw = retyped(part.data, _BYTE, shape, name)
    if part.data.dtype not in _SIGNED:
        return raw
    return computed(Flip(0x80 if bits == 8 else 0x88), (raw,), _BYTE, shape, name)


def _points(part: Quantized, form: Format, shape: tuple[int, ...], name: str) -> ir.TensorProtocol:
    """One expert's zero points ``[N, blocks]`` or ``[N]``, a byte each."""
    middle = 1 << (form.bits - 1) if part.data.dtype in _SIGNED else 0
    if part.zero_point is None:
        return ir.Tensor(np.full(shape, middle, np.uint8), name=name)
    recipe = Points(middle, _times(part.block, form.block), shape)
    return computed(recipe, (part.zero_point,), _BYTE, shape, name)


def _times(old: int, new: int) -> int:
    """How many new blocks have the scale of an old one; the last old block may be cut short."""
    return -(-old // new) if new else 1
