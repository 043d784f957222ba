"""A token's sum over the results of its slots, weighted: what every form that computes slots ends with."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from sparse_onnx.graph.build import Emitter


def emit_kept_weight(
    emit: Emitter, expert_index: ir.Value, expert_weight: ir.Value, experts: int
) -> ir.Value:
    """`[T, K]`: the weight of each slot; zero for one that is dropped (index = E), whatever its weight holds."""
    assert expert_weight.dtype is not None
    kind = np.int32 if expert_index.dtype == ir.DataType.INT32 else np.int64
    kept = emit.op("Less", expert_index, emit.constant(np.asarray(experts, kind)))
    weight = emit.op("Where", kept, expert_weight, emit.scalar(0.0, expert_weight.dtype))
    weight.dtype = expert_weight.dtype
    return weight


def emit_weighted_sum(
    emit: Emitter,
    by_slot: ir.Value,
    expert_weight: ir.Value,
    top_k: int,
    hidden_out: int | ir.Value,
    dtype: ir.DataType,
) -> ir.Value:
    """``y[t] = sum_k expert_weight[t, k] * by_slot[t K + k]``: `[T, D_out]` of the type `dtype`.

    Args:
        emit: where the nodes go.
        by_slot: ``[T K, D_out]`` of the type `dtype`, zeros where a slot is dropped.
        expert_weight: ``[T, K]`` of known type, in which the sum is taken; zero where a slot is dropped.
        top_k: K.
        hidden_out: D_out, or a vector ``[1]`` that holds it.
        dtype: of the results.
    """
    weight_dtype = expert_weight.dtype
    if weight_dtype != dtype:
        by_slot = emit.op("Cast", by_slot, to=weight_dtype)
    if top_k == 1:
        combined = emit.op("Mul", by_slot, expert_weight)
    else:
        if isinstance(hidden_out, int):
            shape = emit.ints(-1, top_k, hidden_out)
        else:
            shape = emit.op("Concat", emit.ints(-1, top_k), hidden_out, axis=0)
        by_token = emit.op("Reshape", by_slot, shape)
        row = emit.op("Unsqueeze", expert_weight, emit.ints(1))
        combined = emit.op("Squeeze", emit.op("MatMul", row, by_token), emit.ints(1))
    return emit.op("Cast", combined, to=dtype) if weight_dtype != dtype else combined
