"""Gated experts whose gate says which units are skipped: their gate and up apart, and a layer of each expert."""

from __future__ import annotations

import dataclasses

import numpy as np
import onnx_ir as ir

from sparse_onnx.blocks import MoEBlock, is_zero, make_node
from sparse_onnx.blocks.expert import emit_activation
from sparse_onnx.blocks.expert_weights import ExpertWeights
from sparse_onnx.blocks.lowering import Problem
from sparse_onnx.blocks.quantized import Quantized
from sparse_onnx.blocks.spec import DOMAIN, GateLayout, WeightLayout
from sparse_onnx.graph.build import Emitter, Namespace
from sparse_onnx.graph.external import read_array, slice_first_axis
from sparse_onnx.graph.stacked import computed, stack
from sparse_onnx.matching.values import tensor
from sparse_onnx.sparsify.emit import Threshold
from sparse_onnx.sparsify.expert_matrix import expert_weight
from sparse_onnx.sparsify.gated import Gated, by_unit, emit_gated, emit_masked_product, gated_opset, weights_obstacle
from sparse_onnx.sparsify.layers import FLOATS, Product
from sparse_onnx.sparsify.plan import Mode
from sparse_onnx.sparsify.record import Acting, tag


def experts_gated_obstacle(block: MoEBlock, mode: Mode) -> Problem | None:
    """Why the experts of a block cannot skip units, and what to do about it; None where they can."""
    if block.dtype not in FLOATS:
        return "its tokens are none of float32, float16 and bfloat16", ""
    roles = block.spec.roles
    if block.spec.gate_layout is GateLayout.CONCATENATED:
        held = [tensor(block.weights[role]) for role in roles]
        if any(each is None or each.dtype != block.dtype for each in held):
            return (
                "its experts' gate and up are one matrix that is no constant of the tokens' type",
                "calibrate the model before it is quantized; --quantize comes behind",
            )
        return None
    try:
        up, down = (expert_weight(block, role, 0) for role in roles[1:])
    except ValueError as error:
        return str(error), ""
    return weights_obstacle(up, down, block.dtype, mode)


@dataclasses.dataclass(frozen=True)
class _Half:
    """Of one expert's matrix, along that axis."""

    axis: int
    at: int

    def __call__(self, *arrays: np.ndarray) -> np.ndarray:
        return np.ascontiguousarray(np.split(arrays[0], 2, axis=self.axis)[self.at])


def apart(block: MoEBlock, names: Namespace) -> MoEBlock:
    """The block with gate and up as matrices of their own, in place of the one that holds both."""
    spec = block.spec
    if spec.gate_layout is not GateLayout.CONCATENATED:
        return block
    first, last = spec.roles
    separate = dataclasses.replace(spec, gate_layout=GateLayout.SEPARATE)
    graph, source = block.node.graph, block.weights[first]
    assert isinstance(graph, ir.Graph) and isinstance(source.graph, ir.Graph)
    home = source.graph
    held, bias = tensor(source), block.weights[f"{first}_bias"]
    assert held is not None and block.experts is not None and block.inner is not None
    experts, *shape = held.shape.numpy()
    axis = 0 if spec.weight_layout is WeightLayout.OUT_IN else 1
    shape[axis] //= 2
    weights = {"down": block.weights[last], "down_bias": block.weights[f"{last}_bias"]}
    zero = is_zero(bias)
    for at, role in enumerate(("gate", "up")):
        name = f"{source.name}.{role}"
        parts = [
            computed(
                _Half(axis, at), [slice_first_axis(held, expert, name)], held.dtype, shape, f"{name}.{expert}"
            )
            for expert in range(experts)
        ]
        weights[role] = names.initializer(home, (source.name, role), stack(parts, name))
        kept = tensor(bias)
        numbers = np.zeros((experts, block.inner), block.dtype.numpy())
        if not zero:
            assert kept is not None
            numbers = np.split(read_array(kept), 2, axis=1)[at]
        added = ir.Tensor(np.ascontiguousarray(numbers), block.dtype, name=f"{name}_bias")
        weights[f"{role}_bias"] = names.initializer(home, (source.name, role, "bias"), added)
    node = make_node(
        separate, block.tokens, block.expert_index, block.expert_weight, weights, name=block.name
    )
    old = block.node
    node.metadata_props.update(old.metadata_props)
    graph.insert_before(old, node)
    output, name = node.outputs[0], old.outputs[0].name
    output.shape, output.type = old.outputs[0].shape, old.outputs[0].type
    ir.convenience.replace_all_uses_with(old.outputs[0], output, replace_graph_outputs=True)
    graph.remove(old, safe=True)
    output.name = name
    for value in (source, bias):
        if isinstance(value.graph, ir.Graph) and not value.uses() and not value.is_graph_output():
            value.graph.initializers.pop(value.name or "", None)
    result = MoEBlock.of(node)
    assert result is not None
    return result


class GatedExperts(ExpertWeights):
    """The experts of a block whose gates and ups are apart, as layers that skip units."""

    def __init__(
        self, block: MoEBlock, names: Namespace, contrib: bool, integer: bool, threshold: Threshold
    ) -> None:
        super().__init__(block, names, contrib, integer)
        self.threshold = threshold

    def whole(self, emit: Emitter, expert: int, rows: ir.Value, opset: int) -> ir.Value:
        """``rows [n, D] -> [n, D_out]``, one expert."""
        block, threshold = self.block, self.threshold
        gate = self.linear(emit, "gate", expert, rows)
        a = emit_activation(emit, block.spec, gate, block.dtype, opset)
        a.dtype, a.shape = block.dtype, ir.Shape([None, block.inner])
        if threshold.mode == "simulate":
            h = emit.op("Mul", a, self.linear(emit, "up", expert, rows))
            h.dtype, h.shape = a.dtype, a.shape
            result = self.linear(emit, "down", expert, emit_masked_product(emit, a, h, threshold))
            nbytes = sum(expert_weight(block, role, expert).nbytes for role in ("up", "down"))
            bound = threshold.bound.name or ""
            tag(
                emit.nodes[-1], Acting(threshold.site, a.name or "", bound, "", nbytes, rows=h.name or "")
            )
            return result
        up, down = (self._product_of(role, expert) for role in ("up", "down"))
        self.domains.add(DOMAIN)
        up = dataclasses.replace(up, weight=by_unit(up.weight))
        return emit_gated(emit, a, rows, block.dtype, Gated(up, down), threshold)

    def _product_of(self, role: str, expert: int) -> Product:
        value = self.block.weights[role]
        producer = value.producer()
        home = value.graph if producer is None else producer.graph
        assert isinstance(home, ir.Graph)
        bias = self._slice(self.block.weights[f"{role}_bias"], expert) if self.biased[role] else None
        return Product(
            expert_weight(self.block, role, expert),
            None if bias is None else bias.const_value,
            home,
            f"{value.name}.{expert}",
            (id(value), expert),
        )


def experts_gated_opset(block: MoEBlock, mode: Mode) -> int:
    """The oldest that a block without an obstacle can be written in."""
    if block.spec.gate_layout is GateLayout.CONCATENATED:
        return 18
    return gated_opset(expert_weight(block, "up", 0), block.dtype, mode)
