"""Every expert computes every token in one batched product, and the weights choose: for targets that can do no more.

    Z[e] = W[e] Xᵀ                              [E, N, D] x [D, T]; for [E, D, N] weights X W[e], [T, D] x [E, D, N]
    w[t, e] = sum over k of weight[t, k] where index[t, k] = e
    y[t] = sum over e of w[t, e] * fc2[e] act(Z[e])[t]       where some index[t, k] = e, else 0

Standard operators without runtime sizes (CoreML, NNAPI; checked on QNN HTP, where the whole graph is taken): the work
and the reads of all E experts for each token, E / K times what is needed. Weights are multiplied as they lie, without a
turned copy in the file. Measured on ORT 1.32, 8 experts of [2816, 1024]: W Xᵀ takes 0.9, 0.5 and 0.6 times as long as
X W of a turned copy for 1, 8 and 64 tokens.

`index=int32` is for targets without kernels for int64.

Exact for every routing: ties, duplicate indices (their weights are added first), no tokens at all, and dropped slots
(index = E is no expert's). Results of experts that a token did not choose are put away whole, since they may hold
infinities. Weights may be computed; quantized ones stay behind their DequantizeLinear, of which all of it is needed.
Enters If, Loop and Scan bodies.

Refused: numbers of experts that the graph does not tell; opsets below 18. `Combine` (experts of any body) is dense in
its neutral form already, and is left: a runtime inlines the functions that it consists of.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from sparse_onnx.blocks import MoEBlock, WeightLayout, is_zero
from sparse_onnx.blocks.expert import emit_hidden
from sparse_onnx.blocks.index_type import IndexedLowering, emit_index
from sparse_onnx.graph.build import Emitter


@dataclasses.dataclass(frozen=True)
class DenseExperts(IndexedLowering):
    __doc__ = __doc__
    name: ClassVar[str] = "dense_experts"
    form: ClassVar[str] = "dense"
    summary: ClassVar[str] = (
        "all experts on all tokens, then chosen by weight: for targets that can do nothing else"
    )

    def rewrite(self, block: MoEBlock, emit: Emitter, opset: int) -> set[str]:
        columns = block.spec.weight_layout == WeightLayout.OUT_IN
        chosen, weight = _weights(block, emit, columns, self.index)
        tokens = emit.op("Transpose", block.tokens, perm=[1, 0]) if columns else block.tokens
        projected = [_linear(block, emit, role, tokens, columns) for role in block.spec.roles[:-1]]
        hidden = emit_hidden(emit, block.spec, projected, block.dtype, opset, axis=1 if columns else 2)
        results = _linear(block, emit, block.spec.roles[-1], hidden, columns)

        results = emit.op("Where", chosen, results, emit.scalar(0.0, block.dtype))
        if block.expert_weight.dtype != block.dtype:
            results = emit.op("Cast", results, to=block.expert_weight.dtype)
        combined = emit.op("Mul", results, weight)
        if columns:
            # Not a sum without its axis and then [D, T] turned: of that OpenVINO 2026.4 makes [D, 1] for one token.
            total = emit.op("ReduceSum", combined, emit.ints(0), keepdims=1)
            combined = emit.op("Squeeze", emit.op("Transpose", total, perm=[0, 2, 1]), emit.ints(0))
        else:
            combined = emit.op("ReduceSum", combined, emit.ints(0), keepdims=0)
        if block.expert_weight.dtype != block.dtype:
            combined = emit.op("Cast", combined, to=block.dtype)
        emit.replace(block.node, combined)
        return set()


def _linear(block: MoEBlock, emit: Emitter, role: str, x: ir.Value, columns: bool) -> ir.Value:
    """`x [..., in, T]` (columns) or `[..., T, in]` to `[E, out, T]` or `[E, T, out]`, by all experts."""
    weight, bias = block.weights[role], block.weights[f"{role}_bias"]
    result = emit.op("MatMul", weight, x) if columns else emit.op("MatMul", x, weight)
    if is_zero(bias):
        return result
    return emit.op("Add", result, emit.op("Unsqueeze", bias, emit.ints(2 if columns else 1)))


def _weights(block: MoEBlock, emit: Emitter, columns: bool, kind: str) -> tuple[ir.Value, ir.Value]:
    """Whether each token chose each expert, and with which weight: both `[E, 1, T]` (columns) or `[E, T, 1]`."""
    dtype = block.expert_weight.dtype
    assert block.experts is not None and dtype is not None
    own = emit.constant(np.arange(block.experts, dtype=kind).reshape(-1, 1, 1))
    index = emit_index(emit, block.expert_index, kind)
    mine = emit.op("Equal", emit.op("Unsqueeze", index, emit.ints(0)), own)  # [E, T, K]
    weight = emit.op("Where", mine, block.expert_weight, emit.scalar(0.0, dtype))
    axis = emit.ints(2)
    hits = emit.op("ReduceMax", emit.op("Cast", mine, to=ir.DataType.FLOAT), axis, keepdims=0)
    chosen = emit.op("Greater", hits, emit.scalar(0.0, ir.DataType.FLOAT))
    total = emit.op("ReduceSum", weight, axis, keepdims=0)
    place = emit.ints(1 if columns else 2)
    return emit.op("Unsqueeze", chosen, place), emit.op("Unsqueeze", total, place)
