"""An expert of two layers, read backwards from its output: the last matrix, what lies between, the first matrices."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import onnx_ir as ir

from sparse_onnx.blocks.spec import GateLayout
from sparse_onnx.matching.elementwise import known
from sparse_onnx.matching.halves import Skip, half_of
from sparse_onnx.matching.kinds import Input, Kind, Step, find_kind
from sparse_onnx.matching.layout import rows_of
from sparse_onnx.matching.linear import MICROSOFT, Linear, linear, stored_bias
from sparse_onnx.matching.values import attribute, is_float, scalar

Reader = Callable[[ir.Value], Linear | None]
Leading = list[int | ir.SymbolicDim] | str | None
"""Axes of a value but the last; a text where it is a view whose shape is not known, None where nothing is."""


@dataclasses.dataclass(frozen=True)
class Expert:
    """One expert, or all of a block where their matrices are packed.

    Attributes:
        kind: activation and gating.
        layers: projections by role, ``fc1, fc2`` or ``gate, up, down``.
        entry: the rows that the first projections read.
    """

    kind: Kind
    layers: dict[str, Linear]
    entry: ir.Value


def read_expert(exit: ir.Value, reader: Reader = linear, skip: Skip = rows_of) -> Expert | str:
    """The expert whose output is `exit`, read backwards; a text says why it is none of two layers that we know.

    Args:
        exit: ``[..., D_out]``.
        reader: one projection, None for what is none. Also asked about the two halves of a gated activation.
        skip: looks through reshapes (and casts that change nothing) of rows.
    """
    last = reader(skip(exit))
    if last is None or last.activation is not None:
        return f"no product with a constant matrix at '{exit.name}'"
    region = _Region(reader, skip)
    problem = region.read(skip(last.x))
    if problem:
        return problem
    shape = region.shape()
    if isinstance(shape, str):
        return shape
    gate_layout, order, layers = shape
    entries = {id(skip(layer.x)) for layer in layers}
    if len(entries) != 1:
        return f"its first layers read different rows, '{layers[0].x.name}' and '{layers[1].x.name}'"
    kind = find_kind(tuple(region.steps), order, gate_layout, region.half)
    if kind is None:
        return f"no known activation between '{layers[0].node.name}' and '{last.node.name}'"
    roles = {
        GateLayout.NONE: ("fc1", "fc2"),
        GateLayout.CONCATENATED: ("fc1", "fc2"),
        GateLayout.INTERLEAVED: ("fc1", "fc2"),
        GateLayout.SEPARATE: ("gate", "up", "down"),
    }[gate_layout]
    return _matched(kind, dict(zip(roles, (*layers, last), strict=True)), layers[0].x)


def _matched(kind: tuple[Kind, bool], layers: dict[str, Linear], entry: ir.Value) -> Expert | str:
    found, swapped = kind
    if swapped:
        if found.gate_layout is GateLayout.SEPARATE:
            layers["gate"], layers["up"] = layers["up"], layers["gate"]
        elif found.gate_layout is GateLayout.CONCATENATED:
            first = layers["fc1"]
            if first.weight.half is not None:
                return "its gate is a half of a half"
            layers = {"gate": _half(first, 1), "up": _half(first, 0), "down": layers["fc2"]}
            found = dataclasses.replace(found, gate_layout=GateLayout.SEPARATE)
        else:
            return "its gate is in the odd outputs of the first layer, up in the even ones"
    return Expert(found, layers, entry)


def _half(layer: Linear, half: int) -> Linear:
    bias = None if layer.bias is None else dataclasses.replace(layer.bias, half=half)
    return dataclasses.replace(layer, weight=dataclasses.replace(layer.weight, half=half), bias=bias)


def _meet(a: list[int | ir.SymbolicDim], b: list[int | ir.SymbolicDim]) -> bool:
    """Whether no axis of length 1 meets another one. Axes put before the first may be of length 1."""
    longer, shorter = (a, b) if len(a) > len(b) else (b, a)
    extra = len(longer) - len(shorter)
    return all(length == 1 for length in longer[:extra]) and all(
        (x == 1) == (y == 1) for x, y in zip(longer[extra:], shorter, strict=True)
    )


class _Region:
    """The elementwise nodes between the projections, as a hashable program over its leaves."""

    def __init__(self, reader: Reader, skip: Skip) -> None:
        self.reader, self.skip = reader, skip
        self.steps: list[Step] = []
        self.leaves: list[tuple[Linear, ir.Value, int | None]] = []
        self.half = False
        self._known: dict[int, Input] = {}
        self._leading: dict[ir.Value, Leading] = {}

    def read(self, value: ir.Value) -> str:
        result = self._value(value)
        if isinstance(result, str):
            return result
        if not self.steps:
            self.steps.append(("", "Identity", (result,), ()))
        return ""

    def _value(self, value: ir.Value) -> Input | str:
        value = self.skip(value)
        if id(value) in self._known:
            return self._known[id(value)]
        result: Input | str = self._leaf(value)
        if result is None:
            result = self._node(value)
        if not isinstance(result, str):
            self._known[id(value)] = result
        return result

    def _leaf(self, value: ir.Value) -> Input:
        layer = self.reader(value)
        part: int | None = None
        at = value
        if layer is None:
            half = half_of(value, self.skip)
            if half is None:
                return None
            at, part = half
            layer = self.reader(at)
            if layer is None:
                return None
        if layer.activation is not None and not known("", layer.activation[0]):
            return None
        for index, (_, whole, known_part) in enumerate(self.leaves):
            if whole is at and known_part == part and layer.activation is None:
                return ("leaf", index)
        self.leaves.append((layer, at, part))
        leaf: Input = ("leaf", len(self.leaves) - 1)
        if layer.activation is not None:
            name, attributes = layer.activation
            self.steps.append(("", name, (leaf,), attributes))
            return ("step", len(self.steps) - 1)
        return leaf

    def _node(self, value: ir.Value) -> Input | str:
        node = value.producer()
        if node is None:
            return f"'{value.name}' comes from outside between its layers"
        if node.domain == MICROSOFT and node.op_type in ("BiasGelu", "FastGelu") and len(node.inputs) == 2:
            return self._biased_gelu(node)
        if not known(node.domain, node.op_type) or node.overload:
            return f"operator {node.op_type} at '{node.name}' lies between its layers"
        inputs: list[Input] = []
        operands: list[ir.Value] = []
        for item in node.inputs:
            if item is None:
                inputs.append(None)
                continue
            number = scalar(item)
            if number is not None:
                inputs.append(("constant", float(number)))
                self.half |= item.dtype in (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
                continue
            result = self._value(item)
            if isinstance(result, str):
                return result
            inputs.append(result)
            operands.append(item)
        if not self._elementwise(value, operands):
            return f"operands of {node.op_type} at '{node.name}' are not proved to have the same axes"
        if node.op_type == "Cast" and not is_float(attribute(node, "to")):
            kind = ir.DataType(attribute(node, "to"))
            what = "a type of eight bits or less" if kind.is_floating_point() else "integers"
            return f"a cast to {what} at '{node.name}' lies between its layers"
        attributes = tuple(
            (name, item.value) for name, item in sorted(node.attributes.items()) if node.op_type != "Cast"
        )
        self.steps.append((node.domain, node.op_type, tuple(inputs), attributes))
        return ("step", len(self.steps) - 1)

    def _elementwise(self, value: ir.Value, operands: list[ir.Value]) -> bool:
        """Whether equal rows meet: no operand is repeated along an axis that another has."""
        found = [self._leading_axes(item) for item in operands]
        if len(found) > 1 and "reshaped" in found:
            return False
        shapes = [shape for shape in found if isinstance(shape, list)]
        if shapes:
            self._leading[value] = shapes[0]
        return all(_meet(shapes[0], shape) for shape in shapes[1:])

    def _leading_axes(self, value: ir.Value) -> Leading:
        if value.shape is not None:
            return list(value.shape[:-1])
        behind = self.skip(value)
        return self._leading.get(value) if behind is value else "reshaped"

    def _biased_gelu(self, node: ir.Node) -> Input | str:
        """ORT's fusion of a layer's bias into its activation."""
        product, added = node.inputs
        layer = None if product is None else self.reader(self.skip(product))
        bias = None if added is None else stored_bias(added)
        if layer is None or layer.bias is not None or layer.activation is not None or bias is None:
            return f"operator {node.op_type} at '{node.name}' reads no plain layer"
        assert product is not None
        self.leaves.append((dataclasses.replace(layer, bias=bias), product, None))
        op_type = "Gelu" if node.op_type == "BiasGelu" else node.op_type
        self.steps.append((MICROSOFT, op_type, (("leaf", len(self.leaves) - 1),), ()))
        return ("step", len(self.steps) - 1)

    def shape(self) -> tuple[GateLayout, tuple[int, ...], tuple[Linear, ...]] | str:
        """Layout, leaves in the order (gate, up) if the gate comes first, and the layers that they are."""
        parts = [part for _, _, part in self.leaves]
        layers = [layer for layer, _, _ in self.leaves]
        if parts == [None]:
            return GateLayout.NONE, (0,), (layers[0],)
        if parts == [None, None]:
            return GateLayout.SEPARATE, (0, 1), (layers[0], layers[1])
        if len(parts) == 2 and self.leaves[0][1] is self.leaves[1][1] and layers[0].activation is None:
            order = (0, 1) if (parts[0] or 0) < (parts[1] or 0) else (1, 0)
            if sorted(parts, key=str) == [0, 1]:
                return GateLayout.CONCATENATED, order, (layers[0],)
            if sorted(parts, key=str) == [2, 3]:
                return GateLayout.INTERLEAVED, order, (layers[0],)
        return f"its hidden values come from {len(parts)} projections or pieces of them"
