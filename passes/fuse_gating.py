"""Gating fused into a TopK + GatherND dispatch, so that each expert runs on its own tokens only.

For `y[t] = sum_k weight[t, k] * expert_{index[t, k]}(x[t])`, over the flattened slots `s = t K + k`:

    order   = TopK(index, smallest first)          a stable sort: slots of expert 0, then of expert 1, ...
    rows    = GatherND(x, order / K)               [T K, D], one row a slot
    rows_e  = Split(rows, tokens an expert)        runtime sizes; 0 rows for a cold expert
    out     = Concat(expert_e(rows_e) for each e)  many experts share the activation between their two matrices
    y[t]    = weight[t, :] @ GatherND(out, order^-1)[t]

Gemm on 0 rows returns at once and never reads its weights, so one graph serves decode and prefill: ORT reads the
weights of the active experts once, and computes nothing else. Expert weights are byte ranges of the packed tensors;
nothing is copied or transposed. The combine is a gather by the inverse permutation, never ScatterND(reduction=add),
which loses updates on several threads in ORT's CPU provider (microsoft/onnxruntime#18048).

Exact for every routing: ties and duplicate indices, experts without tokens, no tokens at all, and dropped slots
(index = E, gathered into a piece that no expert runs on and that becomes fresh zeros). Enters If, Loop and Scan
bodies. Function bodies are inlined before this pass.

Refused: weights that are not constants of the model; numbers of experts that the graph does not tell; opsets below 18.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from sparse_onnx.blocks import MoEBlock, blocks, is_zero
from sparse_onnx.blocks.expert import Linear, emit_hidden, emit_linear
from sparse_onnx.blocks.lowered import FORM_KEY, NAME_KEY, LoweredBlock, record_lowered
from sparse_onnx.blocks.routing import never_dropped
from sparse_onnx.core.passes import Outcome, Pass
from sparse_onnx.core.report import Refusal
from sparse_onnx.graph.build import Emitter, Namespace
from sparse_onnx.graph.external import slice_first_axis

#: Experts whose activation is computed at once. Measured on ORT 1.32, 2 threads: with 64 experts, groups of 8 take 8 %
#: off one token (a cold expert costs two nodes instead of five) and nothing off larger batches, whose rows stay in
#: cache. Up to 8 experts the copies cost what the nodes save.
_GROUP = 8


@dataclasses.dataclass(frozen=True)
class FuseGating(Pass):
    __doc__ = __doc__
    name: ClassVar[str] = "fuse_gating"
    summary: ClassVar[str] = (
        "gating fused into TopK + GatherND dispatch: each expert runs on its own tokens only"
    )

    def call(self, model: ir.Model) -> Outcome:
        opset = model.opset_imports.get("", 0)
        names = Namespace(model)
        nodes = [block.node for block in blocks(model)]
        refusals, lowered = [], []
        for node in nodes:
            block = MoEBlock.of(node)  # now, since rewriting the block before it may have replaced its tokens
            assert block is not None
            reason = _obstacle(block, opset)
            if reason is None:
                lowered.append(LoweredBlock.of(block, form="grouped"))
                _rewrite(block, opset, names)
            else:
                text, hint = reason
                refusals.append(Refusal(f"block '{block.name}': {text}", node.name or "", hint, self.name))
        record_lowered(model, lowered)
        return Outcome(model, bool(lowered), len(nodes), len(lowered), tuple(refusals))


def _obstacle(block: MoEBlock, opset: int) -> tuple[str, str] | None:
    """Why the block has to stay as it is, and what to do about it."""
    if opset < 18:
        return (
            f"opset {opset} has no Split and ScatterElements of the needed kind",
            "export at opset 18 or newer",
        )
    for role, value in block.weights.items():
        if value.const_value is None or not value.is_initializer() or value.is_graph_input():
            return (
                f"{role} is computed or passed in at run time",
                "weights must be initializers that are not graph inputs",
            )
    sizes = {"experts": block.experts, "experts of a token": block.top_k, "outputs": block.hidden_out}
    for what, size in sizes.items():
        if not size:
            known = "zero" if size == 0 else "not known from the graph"
            return (
                f"the number of {what} is {known}",
                "shapes of weights and routing must be static but for the tokens",
            )
    if block.expert_weight.dtype is None:
        return (
            "the type of expert_weight is not known from the graph",
            "save the model with its inferred types",
        )
    return None


def _rewrite(block: MoEBlock, opset: int, names: Namespace) -> None:
    node, experts, top_k = block.node, block.experts, block.top_k
    assert isinstance(node.graph, ir.Graph)
    assert experts is not None and top_k is not None and block.hidden_out is not None
    emit = Emitter(node.graph, names, block.name, {NAME_KEY: block.name, FORM_KEY: "grouped"})
    bins = experts if never_dropped(block.expert_index, experts) else experts + 1

    slots = emit.op("Reshape", block.expert_index, emit.ints(-1))
    count = emit.op("Shape", slots)
    order = emit.ops("TopK", (slots, count), 2, axis=0, largest=0, sorted=1)[1]
    ones = emit.op("Expand", emit.ints(1), count)
    sizes = emit.op(
        "ScatterElements", emit.constant(np.zeros(bins, np.int64)), slots, ones, axis=0, reduction="add"
    )
    token = order if top_k == 1 else emit.op("Div", order, emit.ints(top_k))
    last_axis = emit.ints(-1)
    rows = emit.op("GatherND", block.tokens, emit.op("Unsqueeze", token, last_axis))
    pieces = emit.ops("Split", (rows, sizes), bins, axis=0)

    weights = _ExpertWeights(block, names)
    results: list[ir.Value] = []
    groups = [range(at, min(at + _GROUP, experts)) for at in range(0, experts, _GROUP)]
    if len(groups) == 1:
        groups = [range(expert, expert + 1) for expert in range(experts)]
    heights = _heights(emit, sizes, groups, bins)
    for group, height in zip(groups, heights, strict=True):
        linears = [weights.of(expert) for expert in group]
        projected = [
            _joined(
                emit,
                [
                    emit_linear(emit, block.spec, pieces[e], linear)
                    for e, linear in zip(group, role, strict=True)
                ],
            )
            for role in zip(*(first for first, _ in linears), strict=True)
        ]
        hidden = emit_hidden(emit, block.spec, projected, block.dtype, opset)
        own = [hidden] if height is None else emit.ops("Split", (hidden, height), len(group), axis=0)
        results += [emit_linear(emit, block.spec, x, last) for x, (_, last) in zip(own, linears, strict=True)]
    routing_weight = block.expert_weight
    weight_dtype = routing_weight.dtype
    assert weight_dtype is not None
    if bins > experts:
        # Not the piece times zero: a dropped token may hold an infinity, and a dropped slot's weight may too.
        height = emit.op("Shape", pieces[experts], start=0, end=1)
        shape = emit.op("Concat", height, emit.ints(block.hidden_out), axis=0)
        results.append(emit.op("Expand", emit.scalar(0.0, block.dtype), shape))
        kept = emit.op("Less", block.expert_index, emit.constant(np.asarray(experts, np.int64)))
        routing_weight = emit.op("Where", kept, routing_weight, emit.scalar(0.0, weight_dtype))
    sorted_out = _joined(emit, results)

    inverse = emit.ops("TopK", (order, count), 2, axis=0, largest=0, sorted=1)[1]
    by_slot = emit.op("GatherND", sorted_out, emit.op("Unsqueeze", inverse, last_axis))
    if weight_dtype != block.dtype:
        by_slot = emit.op("Cast", by_slot, to=weight_dtype)
    if top_k == 1:
        combined = emit.op("Mul", by_slot, routing_weight)
    else:
        by_token = emit.op("Reshape", by_slot, emit.ints(-1, top_k, block.hidden_out))
        row = emit.op("Unsqueeze", routing_weight, emit.ints(1))
        combined = emit.op("Squeeze", emit.op("MatMul", row, by_token), emit.ints(1))
    if weight_dtype != block.dtype:
        combined = emit.op("Cast", combined, to=block.dtype)
    emit.replace(node, combined)
    weights.drop_unused()


def _heights(emit: Emitter, sizes: ir.Value, groups: Sequence[range], bins: int) -> Sequence[ir.Value | None]:
    """Rows of each expert of a group `[len(group)]`; None for groups of one."""
    if len(groups[0]) == 1:
        return [None] * len(groups)
    lengths = [len(group) for group in groups]
    if bins > sum(lengths):
        lengths.append(bins - sum(lengths))
    return emit.ops("Split", (sizes, emit.ints(*lengths)), len(lengths), axis=0)[: len(groups)]


def _joined(emit: Emitter, rows: Sequence[ir.Value]) -> ir.Value:
    return rows[0] if len(rows) == 1 else emit.op("Concat", *rows, axis=0)


class _ExpertWeights:
    """Each expert's matrices as initializers of the graph that holds the packed ones."""

    def __init__(self, block: MoEBlock, names: Namespace) -> None:
        self.names = names
        self.values = block.weights
        self.present = {
            role: not (role.endswith("_bias") and is_zero(value)) for role, value in block.weights.items()
        }
        self.first_roles = ("fc1",) if block.op == "MoE" else ("gate", "up")
        self.last_role = "fc2" if block.op == "MoE" else "down"

    def of(self, expert: int) -> tuple[tuple[Linear, ...], Linear]:
        first = tuple(self._linear(role, expert) for role in self.first_roles)
        return first, self._linear(self.last_role, expert)

    def _linear(self, role: str, expert: int) -> Linear:
        bias = f"{role}_bias"
        return Linear(self._slice(role, expert), self._slice(bias, expert) if self.present[bias] else None)

    def _slice(self, role: str, expert: int) -> ir.Value:
        packed = self.values[role]
        assert packed.const_value is not None and isinstance(packed.graph, ir.Graph)
        tensor = slice_first_axis(packed.const_value, expert, f"{packed.name}.{expert}")
        return self.names.initializer(packed.graph, (packed.name, expert), tensor)

    def drop_unused(self) -> None:
        for value in self.values.values():
            graph = value.graph
            if isinstance(graph, ir.Graph) and not value.uses() and not value.is_graph_output():
                graph.initializers.pop(value.name or "", None)
