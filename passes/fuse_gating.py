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

Quantized weights (outputs of DequantizeLinear) stay quantized: each expert multiplies by its own integers and scales
with com.microsoft::MatMulNBits (unsigned, 2, 4 or 8 bits, blocks along the inputs of whole multiples of 16), at full
accuracy; by DequantizeLinear and Gemm where that operator cannot express them, or where `contrib` is off.

Refused: weights that are not constants of the model; numbers of experts that the graph does not tell; opsets below 18.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import ClassVar

import onnx_ir as ir

from sparse_onnx.blocks import MoEBlock
from sparse_onnx.blocks.dispatch import Dispatch, emit_combine, emit_dispatch, emit_pieces, joined
from sparse_onnx.blocks.expert import emit_hidden
from sparse_onnx.blocks.expert_weights import ExpertWeights, obstacle
from sparse_onnx.blocks.lowering import Lowering, Problem
from sparse_onnx.graph.build import Emitter

#: Experts whose activation is computed at once. Measured on ORT 1.32, 2 threads: with 64 experts, groups of 8 take 8 %
#: off one token (a cold expert costs two nodes instead of five) and nothing off larger batches, whose rows stay in
#: cache. Up to 8 experts the copies cost what the nodes save.
_GROUP = 8


@dataclasses.dataclass(frozen=True)
class FuseGating(Lowering):
    __doc__ = __doc__
    name: ClassVar[str] = "fuse_gating"
    form: ClassVar[str] = "grouped"
    summary: ClassVar[str] = (
        "gating fused into TopK + GatherND dispatch: each expert runs on its own tokens only"
    )

    contrib: bool = dataclasses.field(
        default=True, metadata={"help": "quantized weights may use operators of com.microsoft"}
    )

    def problem(self, block: MoEBlock, opset: int) -> Problem | None:
        found = (obstacle(value, role) for role, value in block.weights.items())
        return next(filter(None, found), None)

    def rewrite(self, block: MoEBlock, emit: Emitter, opset: int) -> set[str]:
        node, experts, top_k = block.node, block.experts, block.top_k
        assert experts is not None and top_k is not None and block.hidden_out is not None
        dispatch = emit_dispatch(emit, block.expert_index, experts, top_k)
        pieces = emit_pieces(emit, dispatch, block.tokens)

        weights = ExpertWeights(block, emit.names, self.contrib)
        results: list[ir.Value] = []
        groups = [range(at, min(at + _GROUP, experts)) for at in range(0, experts, _GROUP)]
        if len(groups) == 1:
            groups = [range(expert, expert + 1) for expert in range(experts)]
        heights = _heights(emit, dispatch, groups)
        for group, height in zip(groups, heights, strict=True):
            projected = [
                joined(emit, [weights.linear(emit, role, expert, pieces[expert]) for expert in group])
                for role in weights.first_roles
            ]
            hidden = emit_hidden(emit, block.spec, projected, block.dtype, opset)
            own = [hidden] if height is None else emit.ops("Split", (hidden, height), len(group), axis=0)
            results += [
                weights.linear(emit, weights.last_role, expert, rows)
                for expert, rows in zip(group, own, strict=True)
            ]
        dropped = pieces[experts] if dispatch.bins > experts else None
        combined = emit_combine(
            emit, dispatch, results, block.expert_weight, dropped, block.hidden_out, block.dtype
        )
        emit.replace(node, combined)
        weights.drop_unused()
        return weights.domains


def _heights(emit: Emitter, dispatch: Dispatch, groups: Sequence[range]) -> Sequence[ir.Value | None]:
    """Rows of each expert of a group `[len(group)]`; None for groups of one."""
    if len(groups[0]) == 1:
        return [None] * len(groups)
    lengths = [len(group) for group in groups]
    if dispatch.bins > sum(lengths):
        lengths.append(dispatch.bins - sum(lengths))
    return emit.ops("Split", (dispatch.sizes, emit.ints(*lengths)), len(lengths), axis=0)[: len(groups)]
