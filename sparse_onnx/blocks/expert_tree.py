"""A loop over the experts that have tokens; a tree of If finds the one whose turn it is. Weights lie in its leaves."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from sparse_onnx.blocks.dispatch import Dispatch
from sparse_onnx.blocks.expert_group import emit_group
from sparse_onnx.blocks.expert_weights import ExpertWeights
from sparse_onnx.graph.branches import Branch, body, emit_if, inside
from sparse_onnx.graph.build import Emitter
from sparse_onnx.graph.external import renamed

#: Operators whose constants ORT prepacks or which read whole matrices.
_READS_WEIGHTS = frozenset({"Gemm", "MatMulNBits", "DequantizeLinear"})


def emit_loop(
    emit: Emitter, weights: ExpertWeights, dispatch: Dispatch, rows: ir.Value, opset: int
) -> ir.Value:
    """Rows of all slots that are not dropped, in the order of their experts, to ``[slots kept, D_out]``.

    Args:
        emit: where the nodes go.
        weights: of the block.
        dispatch: gave the rows.
        rows: ``[T K, D]``.
        opset: of the graph's default domain.
    """
    block, added, width = weights.block, emit.names.added, weights.block.hidden_out
    assert width is not None
    sizes = dispatch.sizes
    if dispatch.bins > dispatch.experts:
        sizes = emit.op("Slice", sizes, emit.ints(0), emit.ints(dispatch.experts), emit.ints(0))
    hit = emit.op("Transpose", emit.op("NonZero", sizes), perm=[1, 0])
    ends = emit.op("CumSum", sizes, emit.constant(np.asarray(0, np.int64)))
    starts = emit.op("Sub", ends, sizes)

    step = inside(emit, "step")
    turn, goes_on, before = _inputs(step, block.dtype)
    expert = step.op("Gather", hit, turn, axis=0)
    start, end = step.op("Gather", starts, expert, axis=0), step.op("Gather", ends, expert, axis=0)
    own = step.op("Slice", rows, start, end, step.ints(0))
    result = _chosen(step, weights, range(dispatch.experts), expert, own, opset)
    after = step.op("SequenceInsert", before, result)
    after.type = before.type
    again = step.op("Identity", goes_on)
    again.type, again.shape = goes_on.type, goes_on.shape
    loop = body(Branch(step, [again, after]), "body", [turn, goes_on, before])

    # A sequence of nothing cannot be joined.
    nothing = emit.constant(np.zeros((0, width), block.dtype.numpy()))
    empty = emit.op("SequenceConstruct", nothing)
    on = emit.constant(np.asarray(True))
    results = emit.op("Loop", emit.op("Size", hit), on, empty, body=loop)
    results.type = before.type
    emit.names.take_back(added)
    return emit.op("ConcatFromSequence", results, axis=0)


def _inputs(emit: Emitter, dtype: ir.DataType) -> Sequence[ir.Value]:
    """What a Loop tells its body: the turn, whether to go on, and the results so far."""
    types: dict[str, ir.TypeProtocol] = {
        "turn": ir.TensorType(ir.DataType.INT64),
        "goes_on": ir.TensorType(ir.DataType.BOOL),
        "before": ir.SequenceType(ir.TensorType(dtype)),
    }
    scalar = ir.Shape([])
    return [
        ir.Value(
            name=emit.names.free(f"{emit.prefix}/{name}"),
            type=type_,
            shape=None if name == "before" else scalar,
        )
        for name, type_ in types.items()
    ]


def _chosen(
    emit: Emitter, weights: ExpertWeights, experts: range, number: ir.Value, rows: ir.Value, opset: int
) -> ir.Value:
    """What the expert of that number, one of `experts`, makes of the rows."""
    if len(experts) == 1:
        return emit_group(emit, weights, experts, [rows], None, opset)[0]
    middle = experts.start + len(experts) // 2
    branches = []
    for half in (range(experts.start, middle), range(middle, experts.stop)):
        branch = inside(emit, f"{half.start}-{half.stop - 1}")
        result = _chosen(branch, weights, half, number, rows, opset)
        own = _taken_in(branch) if len(half) == 1 else []
        branches.append(Branch(branch, [result], own))
    lower = emit.op("Less", number, emit.ints(middle))
    told = [(weights.block.dtype, (None, weights.block.hidden_out))]
    return emit_if(emit, lower, branches[0], branches[1], told)[0]


def _taken_in(emit: Emitter) -> list[ir.Value]:
    """Copies of the weights that these nodes read, in place of those."""
    copies: dict[ir.Value, ir.Value] = {}
    for node in emit.nodes:
        for at, value in enumerate(node.inputs if node.op_type in _READS_WEIGHTS else ()):
            if value is None or value.const_value is None or not value.is_initializer():
                continue
            if value not in copies:
                name = emit.names.free(value.name or "weight")
                stored = renamed(value.const_value, name)
                copies[value] = ir.Value(name=name, shape=value.shape, type=value.type, const_value=stored)
            node.replace_input_with(at, copies[value])
    return list(copies.values())
