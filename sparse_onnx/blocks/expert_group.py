"""Neighbouring experts on their own rows, with one activation between their matrices for all of them."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from sparse_onnx.blocks.dispatch import Dispatch, joined
from sparse_onnx.blocks.expert import emit_hidden
from sparse_onnx.blocks.expert_weights import ExpertWeights
from sparse_onnx.graph.build import Emitter


def groups_of(experts: int, size: int) -> list[range]:
    """The experts in groups of `size`, the last one smaller where they do not fill it."""
    return [range(at, min(at + size, experts)) for at in range(0, experts, size)]


def emit_rows(emit: Emitter, dispatch: Dispatch, tokens: ir.Value) -> ir.Value:
    """`tokens [T, D]` to ``[T K, D]``, one row a slot, in the order of the experts."""
    return emit.op("GatherND", tokens, emit.op("Unsqueeze", dispatch.token, emit.ints(-1)))


def split(emit: Emitter, value: ir.Value, sizes: ir.Value | None, parts: int) -> Sequence[ir.Value]:
    """Parts of the first axis, of these sizes ``[parts]`` or of one element each."""
    if parts == 1:
        return [value]
    if sizes is None:
        return emit.ops("Split", (value,), parts, axis=0, num_outputs=parts)
    return emit.ops("Split", (value, sizes), parts, axis=0)


def emit_heights(emit: Emitter, dispatch: Dispatch, groups: Sequence[range]) -> Sequence[ir.Value]:
    """Rows of each expert, group by group: ``[experts of the group]``."""
    lengths = [len(group) for group in groups]
    if dispatch.bins > sum(lengths):
        lengths.append(dispatch.bins - sum(lengths))
    if len(lengths) == 1:
        return [dispatch.sizes]
    return emit.ops("Split", (dispatch.sizes, emit.ints(*lengths)), len(lengths), axis=0)[: len(groups)]


def emit_group(
    emit: Emitter,
    weights: ExpertWeights,
    group: range,
    pieces: Sequence[ir.Value],
    heights: ir.Value | None,
    opset: int,
) -> list[ir.Value]:
    """What some experts make of their rows: ``[n_e, D_out]`` each.

    Args:
        emit: where the nodes go.
        weights: of the block.
        group: the experts.
        pieces: ``[n_e, D]``, one an expert.
        heights: ``[experts]``, the numbers n_e; not needed for a single expert.
        opset: of the graph's default domain.
    """
    block = weights.block
    whole = [weights.whole(emit, expert, rows, opset) for expert, rows in zip(group, pieces, strict=True)]
    if None not in whole:
        return [value for value in whole if value is not None]
    projected = [
        joined(
            emit,
            [weights.linear(emit, role, expert, rows) for expert, rows in zip(group, pieces, strict=True)],
        )
        for role in weights.first_roles
    ]
    hidden = emit_hidden(emit, block.spec, projected, block.dtype, opset)
    own: Sequence[ir.Value] = [hidden]
    if len(group) > 1:
        own = emit.ops("Split", (hidden, heights), len(group), axis=0)
    return [
        weights.linear(emit, weights.last_role, expert, rows) for expert, rows in zip(group, own, strict=True)
    ]
