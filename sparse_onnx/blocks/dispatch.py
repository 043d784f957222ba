"""Tokens sorted by the experts that they go to, and their results back in the order of the tokens.

Over the flattened slots `s = t K + k`:

    order   = TopK(index, smallest first)          a stable sort: slots of expert 0, then of expert 1, ...
    rows    = GatherND(x, order / K)               [T K, ...], one row a slot
    rows_e  = Split(rows, tokens an expert)        runtime sizes; 0 rows for a cold expert
    y[t]    = weight[t, :] @ GatherND(Concat(result_e for each e), order^-1)[t]

Slots that are dropped (index = E) are gathered into a piece of their own, that no expert runs on and that becomes
fresh zeros.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from sparse_onnx.blocks.routing import never_dropped
from sparse_onnx.blocks.weighted_sum import emit_kept_weight, emit_weighted_sum
from sparse_onnx.graph.build import Emitter


@dataclasses.dataclass(frozen=True)
class Dispatch:
    """Slots in the order of their experts.

    Attributes:
        expert_index: ``[T, K]``.
        experts, top_k: E and K.
        bins: E, and one more where slots may be dropped.
        sizes: ``[bins]`` slots of each expert.
        count: ``[1]``, T K.
        order: ``[T K]`` the slot at each place.
        token: ``[T K]`` the token at each place.
    """

    expert_index: ir.Value
    experts: int
    top_k: int
    bins: int
    sizes: ir.Value
    count: ir.Value
    order: ir.Value
    token: ir.Value


def emit_dispatch(emit: Emitter, expert_index: ir.Value, experts: int, top_k: int) -> Dispatch:
    """The order of the slots; `expert_index [T, K]` holds int64 in [0, experts]."""
    bins = experts if never_dropped(expert_index, experts) else experts + 1
    slots = emit.op("Reshape", expert_index, emit.ints(-1))
    count = emit.op("Shape", slots)
    order = emit.ops("TopK", (slots, count), 2, axis=0, largest=0, sorted=1)[1]
    ones = emit.op("Expand", emit.ints(1), count)
    zeros = emit.constant(np.zeros(bins, np.int64))
    sizes = emit.op("ScatterElements", zeros, slots, ones, axis=0, reduction="add")
    token = order if top_k == 1 else emit.op("Div", order, emit.ints(top_k))
    return Dispatch(expert_index, experts, top_k, bins, sizes, count, order, token)


def emit_pieces(emit: Emitter, dispatch: Dispatch, tokens: ir.Value) -> Sequence[ir.Value]:
    """`tokens [T, ...]` to the rows of each expert `[n_e, ...]`; dropped slots' behind them, if any."""
    rows = emit.op("GatherND", tokens, emit.op("Unsqueeze", dispatch.token, emit.ints(-1)))
    return emit.ops("Split", (rows, dispatch.sizes), dispatch.bins, axis=0)


def emit_combine(
    emit: Emitter,
    dispatch: Dispatch,
    results: Sequence[ir.Value],
    expert_weight: ir.Value,
    dropped: ir.Value | None,
    hidden_out: int | ir.Value,
    dtype: ir.DataType,
) -> ir.Value:
    """The experts' rows, weighted and summed: `[T, D_out]` of the type `dtype`.

    Args:
        emit: where the nodes go.
        dispatch: gave the rows.
        results: ``[rows of some experts, D_out]``, all experts in order.
        expert_weight: ``[T, K]`` of known type, in which the sum is taken.
        dropped: the piece of the dropped slots; None where there are none.
        hidden_out: D_out, or a vector ``[1]`` that holds it.
        dtype: of the results.
    """
    assert expert_weight.dtype is not None
    if dropped is not None:
        # Not the piece times zero: a dropped token may hold an infinity, and a dropped slot's weight may too.
        height = emit.op("Shape", dropped, start=0, end=1)
        shape = emit.op("Concat", height, _vector(emit, hidden_out), axis=0)
        results = [*results, emit.op("Expand", emit.scalar(0.0, dtype), shape)]
        expert_weight = emit_kept_weight(emit, dispatch.expert_index, expert_weight, dispatch.experts)
    sorted_out = joined(emit, results)

    inverse = emit.ops("TopK", (dispatch.order, dispatch.count), 2, axis=0, largest=0, sorted=1)[1]
    by_slot = emit.op("GatherND", sorted_out, emit.op("Unsqueeze", inverse, emit.ints(-1)))
    return emit_weighted_sum(emit, by_slot, expert_weight, dispatch.top_k, hidden_out, dtype)


def _vector(emit: Emitter, size: int | ir.Value) -> ir.Value:
    return emit.ints(size) if isinstance(size, int) else size


def joined(emit: Emitter, rows: Sequence[ir.Value]) -> ir.Value:
    """Rows behind each other."""
    return rows[0] if len(rows) == 1 else emit.op("Concat", *rows, axis=0)
