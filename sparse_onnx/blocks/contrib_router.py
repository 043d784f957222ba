"""Any router's choice as the logits that `com.microsoft::MoE` and `QMoE` route by.

Both operators take a softmax over logits `[T, E]` and run a token's k best experts. The logits of given weights are

    share[t, e]  = sum of weight[t, k] over the slots k with index[t, k] = e, divided by total[t], their sum over e
    logits[t, e] = log share[t, e]                                  -inf for an expert that the token is not sent to

whose softmax is the share again; `total * operator` is the block. The kernels never run an expert whose share is 0, so
-inf is as good as absent, and a token without any weight, whose shares are 0 / 0, is sent nowhere: its row is zeros.

Since a share x lies in [0, 1], rounding its logarithm costs at most x |log x| <= 1/e times the type's rounding of it:
float16 logits give shares that are off by 1e-4 of the token's sum, float32 ones by 2e-8, whatever the weights are.

QMoE's own way, its input `router_weights` (from ORT 1.27 on), was measured beside this one, which costs 4 to 5 us a
block and token: it saves 2.5 us of these, of some 700 us, and drops weights below 1e-8 instead of shares below 1e-8.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from sparse_onnx.blocks.moe import MoEBlock
from sparse_onnx.blocks.routing import never_dropped
from sparse_onnx.graph.build import Emitter

_FLOAT = ir.DataType.FLOAT


def emit_logits(emit: Emitter, block: MoEBlock) -> tuple[ir.Value, ir.Value]:
    """Logits ``[T, E]`` of the tokens' type, and the sum of each token's weights ``[T, 1]`` in float32.

    Weights must not be negative. Indices of a token may repeat; dropped slots (index = E) have no part in either.
    """
    experts, index, weight = block.experts, block.expert_index, block.expert_weight
    assert experts is not None
    if weight.dtype != _FLOAT:
        weight = emit.op("Cast", weight, to=_FLOAT)
    axis = emit.ints(1)  # a negative one leaves ORT before 1.32 with [0, E] for no tokens
    if never_dropped(index, experts):
        total = weight if block.top_k == 1 else emit.op("ReduceSum", weight, axis, keepdims=1)
        none = emit.op("Expand", emit.constant(np.zeros((1, experts), np.float32)), emit.op("Shape", total))
        part = emit.op("Div", weight, total)
        share = emit.op("ScatterElements", none, index, part, axis=1, reduction="add")
    else:
        height = emit.op("Shape", weight, start=0, end=1)
        shape = emit.op("Concat", height, emit.ints(experts + 1), axis=0)
        none = emit.op("Expand", emit.scalar(0.0, _FLOAT), shape)
        spread = emit.op("ScatterElements", none, index, weight, axis=1, reduction="add")
        kept = emit.op("Slice", spread, emit.ints(0), emit.ints(experts), axis)
        total = emit.op("ReduceSum", kept, axis, keepdims=1)
        share = emit.op("Div", kept, total)
    logits = emit.op("Log", share)
    return logits if block.dtype == _FLOAT else emit.op("Cast", logits, to=block.dtype), total


def emit_scaled(emit: Emitter, rows: ir.Value, total: ir.Value, dtype: ir.DataType) -> ir.Value:
    """``rows [T, D] * total [T, 1]``, rounded once where rows are not float32."""
    if dtype == _FLOAT:
        return emit.op("Mul", rows, total)
    return emit.op("Cast", emit.op("Mul", emit.op("Cast", rows, to=_FLOAT), total), to=dtype)
