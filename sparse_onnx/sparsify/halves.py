"""A block whose experts hold gate and up in one matrix, as one that holds them apart. Integers stay integers."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import onnx_ir as ir

from sparse_onnx.blocks import MoEBlock, is_zero, make_node
from sparse_onnx.blocks.lowering import Problem
from sparse_onnx.blocks.quantized import Quantized
from sparse_onnx.blocks.spec import GateLayout, WeightLayout
from sparse_onnx.graph.build import Emitter, Namespace
from sparse_onnx.graph.external import read_array, slice_first_axis
from sparse_onnx.graph.stacked import computed, stack
from sparse_onnx.matching.values import tensor


def halves_obstacle(block: MoEBlock) -> Problem | None:
    """Why the matrix that holds gate and up cannot be cut into the two; None where it can."""
    first = block.spec.roles[0]
    bias = block.weights[f"{first}_bias"]
    if tensor(bias) is None and not is_zero(bias):
        return "the bias of its experts' gate and up is quantized, or computed at run time", ""
    value, axis = block.weights[first], _axis(block)
    quantized = Quantized.of(value)
    if quantized is None:
        held = tensor(value)
        same = held is not None and held.dtype == block.dtype
        return None if same else ("its experts' gate and up are no constant of the tokens' type", "")
    units = quantized.shape[axis] // 2
    if quantized.dtype != block.dtype:
        return "its experts' gate and up are numbers of another type than the tokens", ""
    if quantized.block and quantized.axis == axis and units % quantized.block:
        return f"blocks of {quantized.block} reach from its experts' gate into up", ""
    if units * (quantized.shape[2] if axis == 1 else 1) * quantized.data.dtype.bitwidth % 8:
        return "its experts' up does not begin on a whole byte", ""
    return None


def apart(block: MoEBlock, names: Namespace) -> MoEBlock:
    """The block with gate and up as matrices of their own, where one holds both and has no `halves_obstacle`."""
    spec, old = block.spec, block.node
    if spec.gate_layout is not GateLayout.CONCATENATED:
        return block
    first, last = spec.roles
    graph, source, bias = old.graph, block.weights[first], block.weights[f"{first}_bias"]
    assert isinstance(graph, ir.Graph)
    emit = Emitter(graph, names, block.name)
    weights = {"down": block.weights[last], "down_bias": block.weights[f"{last}_bias"]}
    for at, role in enumerate(("gate", "up")):
        weights[role] = _half(emit, block, source, role, at)
        weights[f"{role}_bias"] = _half_bias(names, block, bias, role, at)
    separate = dataclasses.replace(spec, gate_layout=GateLayout.SEPARATE)
    node = make_node(
        separate, block.tokens, block.expert_index, block.expert_weight, weights, name=block.name
    )
    node.metadata_props.update(old.metadata_props)
    emit.nodes.append(node)
    emit.replace(old, node.outputs[0])
    for value in (source, bias):
        _drop(value)
    result = MoEBlock.of(node)
    assert result is not None
    return result


def _axis(block: MoEBlock) -> int:
    """Of the packed matrix, along which gate and up lie one behind the other."""
    return 1 if block.spec.weight_layout is WeightLayout.OUT_IN else 2


def _half(emit: Emitter, block: MoEBlock, source: ir.Value, role: str, at: int) -> ir.Value:
    axis, quantized = _axis(block), Quantized.of(source)
    if quantized is None:
        return _cut(emit.names, source, role, axis, at)
    node = source.producer()
    assert node is not None
    parts = []
    for value in node.inputs:
        held = tensor(value)
        assert value is not None and held is not None
        own = len(held.shape) == 3 or (held.size > 1 and quantized.axis == axis)
        parts.append(_cut(emit.names, value, role, axis if len(held.shape) == 3 else 0, at) if own else value)
    attributes: dict[str, Any] = {name: item.as_int() for name, item in node.attributes.items()}
    result = emit.op("DequantizeLinear", *parts, **attributes)
    result.type, result.shape = source.type, parts[0].shape
    return result


@dataclasses.dataclass(frozen=True)
class _Half:
    """Of one expert's matrix, along that axis."""

    axis: int
    at: int

    def __call__(self, *arrays: np.ndarray) -> np.ndarray:
        return np.ascontiguousarray(np.split(arrays[0], 2, axis=self.axis)[self.at])


def _cut(names: Namespace, value: ir.Value, role: str, axis: int, at: int) -> ir.Value:
    """One half of a constant; of a packed one an expert's at a time."""
    held, home, name = tensor(value), value.graph, f"{value.name}.{role}"
    assert held is not None and isinstance(home, ir.Graph)
    if axis == 0:
        half = ir.Tensor(_Half(0, at)(read_array(held)), held.dtype, name=name)
        return names.initializer(home, (value.name, role), half)
    experts, *shape = held.shape.numpy()
    shape[axis - 1] //= 2
    parts = []
    for expert in range(experts):
        own = slice_first_axis(held, expert, name)
        parts.append(computed(_Half(axis - 1, at), [own], held.dtype, shape, f"{name}.{expert}"))
    return names.initializer(home, (value.name, role), stack(parts, name))


def _half_bias(names: Namespace, block: MoEBlock, bias: ir.Value, role: str, at: int) -> ir.Value:
    assert block.experts is not None and block.inner is not None
    numbers = np.zeros((block.experts, block.inner), block.dtype.numpy())
    if not is_zero(bias):
        kept = tensor(bias)
        assert kept is not None
        numbers = np.ascontiguousarray(np.split(read_array(kept), 2, axis=1)[at])
    assert isinstance(block.node.graph, ir.Graph)
    added = ir.Tensor(numbers, block.dtype, name=f"{bias.name or block.name}.{role}")
    return names.initializer(block.node.graph, (block.name, role, "bias"), added)


def _drop(value: ir.Value) -> None:
    """A constant, or a node that dequantizes one, that nothing reads any more."""
    if value.uses() or value.is_graph_output():
        return
    node = value.producer()
    if node is None:
        if isinstance(value.graph, ir.Graph):
            value.graph.initializers.pop(value.name or "", None)
        return
    read = [each for each in node.inputs if each is not None]
    if node.graph is not None:
        node.graph.remove(node, safe=True)
    for each in read:
        _drop(each)
