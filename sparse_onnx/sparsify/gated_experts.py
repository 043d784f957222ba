"""Gated experts whose gate says which units are skipped: a layer of each expert behind its gate."""

from __future__ import annotations

import dataclasses

import onnx_ir as ir

from sparse_onnx.blocks import MoEBlock
from sparse_onnx.blocks.expert import emit_activation
from sparse_onnx.blocks.expert_weights import ExpertWeights
from sparse_onnx.blocks.lowering import Problem
from sparse_onnx.blocks.spec import DOMAIN, GateLayout
from sparse_onnx.graph.build import Emitter, Namespace
from sparse_onnx.sparsify.emit import Threshold
from sparse_onnx.sparsify.expert_matrix import expert_weight, experts_outside
from sparse_onnx.sparsify.gated import (
    Gated,
    by_unit,
    emit_gated,
    emit_masked_product,
    gated_opset,
    weights_obstacle,
)
from sparse_onnx.sparsify.halves import halves_obstacle
from sparse_onnx.sparsify.layers import FLOATS, Product
from sparse_onnx.sparsify.plan import Mode
from sparse_onnx.sparsify.record import Acting, tag


def experts_gated_obstacle(block: MoEBlock, mode: Mode) -> Problem | None:
    """Why the experts of a block cannot skip units, and what to do about it; None where they can."""
    if block.dtype not in FLOATS:
        return "its tokens are none of float32, float16 and bfloat16", ""
    roles = block.spec.roles
    fused = block.spec.gate_layout is GateLayout.CONCATENATED
    problem = halves_obstacle(block) if fused else None
    if problem is not None:
        return problem
    try:  # a matrix of both gate and up is stored as up will be
        up, down = (expert_weight(block, role, 0) for role in roles[-2:])
    except ValueError as error:
        return str(error), ""
    problem = weights_obstacle(up, down, block.dtype, mode)
    return problem or experts_outside(block, roles[-2], mode) or experts_outside(block, roles[-1], mode)


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
            h.type, h.shape = a.type, a.shape
            result = self.linear(emit, "down", expert, emit_masked_product(emit, a, h, threshold))
            nbytes = sum(expert_weight(block, role, expert).nbytes for role in ("up", "down"))
            bound = threshold.bound.name or ""
            tag(emit.nodes[-1], Acting(threshold.site, a.name or "", bound, "", nbytes, rows=h.name or ""))
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
    return gated_opset(expert_weight(block, block.spec.roles[-1], 0), block.dtype, mode)
