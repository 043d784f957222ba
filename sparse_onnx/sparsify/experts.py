"""Layers of experts that skip inputs, where a lowering gives each expert layers of its own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

import numpy as np
import onnx_ir as ir

from sparse_onnx.blocks.expert_thresholds import GATED_ROLE, marked
from sparse_onnx.blocks.expert_weights import ExpertWeights
from sparse_onnx.blocks.lowering import Problem
from sparse_onnx.blocks.moe import MoEBlock
from sparse_onnx.blocks.quantized import Quantized
from sparse_onnx.blocks.spec import DOMAIN, WeightLayout
from sparse_onnx.blocks.thresholded import LINEAR, MIN_OPSET
from sparse_onnx.graph.build import Emitter, Namespace
from sparse_onnx.matching.layer_weights import LayerWeight
from sparse_onnx.sparsify.emit import Threshold, emit_masked
from sparse_onnx.sparsify.expert_matrix import expert_weight, experts_outside, integers
from sparse_onnx.sparsify.gated_experts import GatedExperts
from sparse_onnx.sparsify.layers import Product, emit_product, note, oldest_opset, weight_obstacle
from sparse_onnx.sparsify.plan import Mode
from sparse_onnx.sparsify.record import tag


def expert_thresholds(model: ir.Model, node: ir.Node) -> dict[str, Threshold]:
    """By role, with the values that the marks name. A mark whose values are gone is none."""
    marks = marked(node)
    wanted = {mark.bound for mark in marks.values()}
    bounds: dict[str, ir.Value] = {}
    for each in model.graph if marks else ():  # the dial stands in front of everything else
        bounds |= {value.name: value for value in each.outputs if value.name in wanted}
        if len(bounds) == len(wanted):
            break
    found = {}
    for role, mark in marks.items():
        bound, centre = bounds.get(mark.bound), model.graph.initializers.get(mark.centre)
        if bound is not None and centre is not None:
            found[role] = Threshold(mark.site, bound, centre, cast(Mode, mark.mode), mark.top_k)
    return found


def expert_weights(
    block: MoEBlock, names: Namespace, contrib: bool = True, integer: bool = False
) -> ExpertWeights:
    """The experts of a block, whose layers skip inputs where thresholds are marked on it."""
    found = expert_thresholds(names.model, block.node)
    if not found:
        return ExpertWeights(block, names, contrib, integer)
    if GATED_ROLE in found:
        return GatedExperts(block, names, contrib, integer, found[GATED_ROLE])
    return _Thresholded(block, names, contrib, integer, found)


class _Thresholded(ExpertWeights):
    def __init__(
        self,
        block: MoEBlock,
        names: Namespace,
        contrib: bool,
        integer: bool,
        thresholds: Mapping[str, Threshold],
    ) -> None:
        super().__init__(block, names, contrib, integer)
        self.thresholds = thresholds
        self._masked: dict[tuple[int, int], ir.Value] = {}

    def linear(self, emit: Emitter, role: str, expert: int, rows: ir.Value) -> ir.Value:
        threshold = self.thresholds.get(role)
        if threshold is None:
            return super().linear(emit, role, expert, rows)
        x, watched = rows, rows
        if threshold.mode == "simulate" or threshold.top_k:
            key = (id(emit), id(rows))
            if key not in self._masked:
                self._masked[key] = emit_masked(emit, rows, threshold)
            x = self._masked[key]
        if threshold.top_k:
            watched = x
        if threshold.mode == "simulate":
            result = super().linear(emit, role, expert, x)
            tag(emit.nodes[-1], note(threshold, watched.name or "", self._weight(role, expert)))
            return result
        value = self.block.weights[role]
        producer = value.producer()
        home = value.graph if producer is None else producer.graph
        assert isinstance(home, ir.Graph)
        bias = self._slice(self.block.weights[f"{role}_bias"], expert) if self.biased[role] else None
        product = Product(
            self._weight(role, expert),
            None if bias is None else bias.const_value,
            home,
            f"{value.name}.{expert}",
            (id(value), expert),
        )
        self.domains.add(DOMAIN)
        return emit_product(emit, x, self.block.dtype, product, threshold, watched.name or "")

    def _weight(self, role: str, expert: int) -> LayerWeight:
        return expert_weight(self.block, role, expert)


def block_opset(block: MoEBlock, role: str, mode: Mode) -> int:
    """The oldest that a matrix of a block's experts without a `block_obstacle` can be written in."""
    if Quantized.of(block.weights[role]) is None:
        return MIN_OPSET[LINEAR]
    return oldest_opset(expert_weight(block, role, 0), block.dtype, mode)


def block_obstacle(block: MoEBlock, role: str, mode: Mode, centre: np.ndarray) -> Problem | None:
    """Why a matrix of a block's experts cannot skip inputs; None where it can, or where it cannot be cut anyway."""
    value = block.weights[role]
    quantized = Quantized.of(value)
    try:
        if quantized is not None:
            problem = weight_obstacle(integers(block, quantized.part(0, "")), block.dtype, mode, centre)
            return problem or experts_outside(block, role, mode)
    except ValueError as error:
        return str(error), ""
    held = value.const_value
    if held is None:
        return None
    if held.dtype != block.dtype:
        return f"{role} is {held.dtype.name.lower()}, and tokens are {block.dtype.name.lower()}", ""
    inputs = held.shape.numpy()[-1 if block.spec.weight_layout == WeightLayout.OUT_IN else -2]
    if centre.size not in (1, inputs):
        return f"the centre has {centre.size} elements, and {role} has {inputs} inputs", ""
    return None
