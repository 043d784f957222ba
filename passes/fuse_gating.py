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
accuracy; by DequantizeLinear and Gemm where that operator cannot express them, or where `contrib` is off. In blocks
whose activations a lossy step allowed to be rounded, the operator rounds them to 8 bits (accuracy level 4), or with
`product=dynamic` com.microsoft::DynamicQuantizeMatMul does, which is the fastest product for many tokens and rounds
all tokens of an expert alike: what a token gets then depends on the other tokens.

Refused: weights that are not constants of the model; numbers of experts that the graph does not tell; opsets below 18;
`product=dynamic` where activations must stay as they are, or weights are not symmetric 8-bit rows of float32 scales.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import ClassVar

import onnx_ir as ir

from sparse_onnx.blocks import MoEBlock
from sparse_onnx.blocks.dispatch import emit_combine, emit_dispatch, emit_pieces
from sparse_onnx.blocks.expert_group import emit_group, emit_heights, groups_of
from sparse_onnx.blocks.expert_weights import not_dynamic, obstacle
from sparse_onnx.blocks.lowering import Lowering, Problem
from sparse_onnx.core.errors import UsageError
from sparse_onnx.graph.build import Emitter
from sparse_onnx.sparsify.experts import expert_weights

PRODUCTS = ("nbits", "dynamic")

#: Experts whose activation is computed at once. Measured on ORT 1.32, 2 threads: with 64 experts, groups of 8 take 8 %
#: off one token (a cold expert costs two nodes instead of five) and nothing off larger batches, whose rows stay in
#: cache. Up to 8 experts the copies cost what the nodes save.
_GROUP = 8


@dataclasses.dataclass(frozen=True)
class FuseGating(Lowering):
    __doc__ = __doc__
    name: ClassVar[str] = "fuse_gating"
    form: ClassVar[str] = "grouped"
    skips_inputs: ClassVar[bool] = True
    summary: ClassVar[str] = (
        "gating fused into TopK + GatherND dispatch: each expert runs on its own tokens only"
    )

    contrib: bool = dataclasses.field(
        default=True, metadata={"help": "quantized weights may use operators of com.microsoft"}
    )

    product: str = dataclasses.field(
        default="nbits",
        metadata={"help": "of quantized weights: nbits or dynamic (8-bit rows, rounds activations)"},
    )

    def __post_init__(self) -> None:
        if self.product not in PRODUCTS:
            raise UsageError(
                f"pass '{self.name}': product={self.product} is not one of {', '.join(PRODUCTS)}"
            )

    @property
    def label(self) -> str:
        return self.form if self.product == "nbits" else f"{self.form}:product={self.product}"

    def problem(self, block: MoEBlock, opset: int) -> Problem | None:
        found = (obstacle(value, role) for role, value in block.weights.items())
        problem = next(filter(None, found), None)
        if problem is None and self.product == "dynamic":
            problem = not_dynamic(block) if self.contrib else ("the integer product is off", "contrib=true")
        return problem

    def rewrite(self, block: MoEBlock, emit: Emitter, opset: int) -> set[str]:
        node, experts, top_k = block.node, block.experts, block.top_k
        assert experts is not None and top_k is not None and block.hidden_out is not None
        dispatch = emit_dispatch(emit, block.expert_index, experts, top_k)
        pieces = emit_pieces(emit, dispatch, block.tokens)

        weights = expert_weights(block, emit.names, self.contrib, integer=self.product == "dynamic")
        results: list[ir.Value] = []
        groups = groups_of(experts, _GROUP if experts > _GROUP else 1)
        heights: Sequence[ir.Value | None] = [None] * experts
        if len(groups) < experts:
            heights = emit_heights(emit, dispatch, groups)
        for group, height in zip(groups, heights, strict=True):
            own = pieces[group.start : group.stop]
            results += emit_group(emit, weights, group, own, height, opset)
        dropped = pieces[experts] if dispatch.bins > experts else None
        combined = emit_combine(
            emit, dispatch, results, block.expert_weight, dropped, block.hidden_out, block.dtype
        )
        emit.replace(node, combined)
        weights.drop_unused()
        return weights.domains
