"""Experts behind conditional branches: a branch that no token is sent to costs one node.

Dispatch and combine are those of fuse_gating. Between them, by `style`:

    group    rows_g  = Split(rows, tokens a group)                     groups of `group` neighbouring experts
             out_g   = If(tokens of g > 0) {experts of g on Split(rows_g, tokens an expert)} {0 rows}
    expert   out_e   = If(tokens of e > 0) {expert_e(rows_e)} {0 rows}
    loop     out     = Loop over the experts with tokens: rows_e = Slice(rows, from, to); a tree of If chooses e

The results are concatenated; branches that are skipped give 0 rows of known width, not copies of what came before.

Weights are initializers of the block's graph, right around the branches, where ORT prepacks them. In the loop's tree
they would lie several graphs out and not be prepacked: 1.2 to 1.9 times slower, MatMulNBits 30 times. So they lie in
the branches there, and ORT holds them twice, as stored and packed. A loop runs as often as there are experts with
tokens, however many experts there are; its rows are handed on as a sequence, which few providers know.

Time against grouped (ORT 1.32, one thread, float32, 8 experts a token, much alike at 1, 8 and 64 tokens):

    experts of 1024 x 768        groups of 8      one If an expert      loop
    64                           0.96             1.03 to 1.09          1.01 to 1.04
    128                          0.92             0.95                  0.99 to 1.10

Of tiny experts nodes are what counts: one token through 12 layers of 128 takes 0.68 by groups of 8, 1.03 by the loop.
A session of 36 such layers is created in 0.6 of the time by groups of 8, in 3 times of it by the loop.

Exact for every routing, as fuse_gating is. Quantized weights stay quantized; where they must be dequantized, only
those of experts with tokens are.

Refused: what fuse_gating refuses; blocks in the body of an If, Loop or Scan whose weights lie outside of it, but for
the loop style, which is refused for bfloat16; thresholds on experts of integers (mode native).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from sparse_onnx.blocks import MoEBlock
from sparse_onnx.blocks.dispatch import Dispatch, emit_combine, emit_dispatch, joined
from sparse_onnx.blocks.expert_group import emit_group, emit_heights, emit_rows, groups_of, split
from sparse_onnx.blocks.expert_thresholds import GATED_ROLE, marked
from sparse_onnx.blocks.expert_tree import emit_loop
from sparse_onnx.blocks.expert_weights import ExpertWeights, obstacle
from sparse_onnx.blocks.lowering import Lowering, Problem
from sparse_onnx.blocks.quantized import Quantized
from sparse_onnx.core.errors import UsageError
from sparse_onnx.graph.branches import Branch, emit_if, inside
from sparse_onnx.graph.build import Emitter
from sparse_onnx.sparsify.experts import expert_weights

STYLES = ("group", "expert", "loop")


@dataclasses.dataclass(frozen=True)
class BranchExperts(Lowering):
    __doc__ = __doc__
    name: ClassVar[str] = "branch_experts"
    form: ClassVar[str] = "branched"
    skips_inputs: ClassVar[bool] = True
    summary: ClassVar[str] = "experts behind If: those without tokens are skipped, a group at a time"

    style: str = dataclasses.field(
        default="group", metadata={"help": "what a branch holds: group, expert or loop"}
    )
    group: int = dataclasses.field(default=8, metadata={"help": "experts of one branch, for style=group"})
    contrib: bool = dataclasses.field(
        default=True, metadata={"help": "quantized weights may use operators of com.microsoft"}
    )

    def __post_init__(self) -> None:
        if self.style not in STYLES:
            raise UsageError(f"pass '{self.name}': style={self.style} is not one of {', '.join(STYLES)}")
        if self.group < 1:
            raise UsageError(f"pass '{self.name}': group={self.group} is no number of experts")

    def problem(self, block: MoEBlock, opset: int) -> Problem | None:
        found = (obstacle(value, role) for role, value in block.weights.items())
        problem = next(filter(None, found), None)
        if problem is not None:
            return problem
        if self.style == "loop" and marked(block.node):
            return "thresholds are not written into loops over experts", "take style=group or style=expert"
        if _thresholded_integers(block):
            return (
                "ORT does not load thresholded layers of integers in a branch without the native kernels",
                "take --form grouped or gathered, or experts in float",
            )
        if self.style == "loop":
            unheard = block.dtype == ir.DataType.BFLOAT16
            return (
                ("ONNX has no sequences of bfloat16", "take style=group or style=expert") if unheard else None
            )
        outside = next(
            (role for role, value in block.weights.items() if _holder(value) is not block.node.graph), None
        )
        if outside is None:
            return None
        return (
            f"it stands in the body of an If, Loop or Scan, and {outside} outside of it: ORT does not prepack "
            "weights that lie two graphs out",
            "take another form, or style=loop, which holds weights in its branches",
        )

    def rewrite(self, block: MoEBlock, emit: Emitter, opset: int) -> set[str]:
        experts, top_k = block.experts, block.top_k
        assert experts is not None and top_k is not None and block.hidden_out is not None
        weights = expert_weights(block, emit.names, self.contrib)
        dispatch = emit_dispatch(emit, block.expert_index, experts, top_k)
        rows = emit_rows(emit, dispatch, block.tokens)
        if self.style == "loop":
            results, dropped = _looped(emit, weights, dispatch, rows, opset)
        else:
            size = 1 if self.style == "expert" else self.group
            results, dropped = _branched(emit, weights, dispatch, rows, groups_of(experts, size), opset)
        combined = emit_combine(
            emit, dispatch, results, block.expert_weight, dropped, block.hidden_out, block.dtype
        )
        emit.replace(block.node, combined)
        weights.drop_unused()
        return weights.domains


def _thresholded_integers(block: MoEBlock) -> bool:
    """Whether thresholds act on integers. ORT 1.32 looks for what a function's DequantizeLinear reads in the branch
    alone (`TransposeDQWeightsForMatMulNBits`), and does not load the model where the function's body has to run."""
    marks = marked(block.node)
    roles = block.spec.roles if GATED_ROLE in marks else [role for role in block.spec.roles if role in marks]
    native = any(each.mode == "native" for each in marks.values())
    return native and any(Quantized.of(block.weights[role]) is not None for role in roles)


def _holder(value: ir.Value) -> object:
    """The graph that an expert's part of the weight is put in."""
    node = value.producer()
    return value.graph if node is None else node.graph


def _branched(
    emit: Emitter,
    weights: ExpertWeights,
    dispatch: Dispatch,
    rows: ir.Value,
    groups: Sequence[range],
    opset: int,
) -> tuple[list[ir.Value], ir.Value | None]:
    """Rows of each group, and the piece of the dropped slots if there may be any."""
    block = weights.block
    heights: Sequence[ir.Value | None] = [None] * len(groups)
    sizes = dispatch.sizes
    if len(groups) < dispatch.experts:
        heights = emit_heights(emit, dispatch, groups)
        sizes = _sums(emit, dispatch, groups)
    bins = len(groups) + dispatch.bins - dispatch.experts
    pieces = split(emit, rows, sizes, bins)
    hits = split(emit, emit.op("Greater", sizes, emit.ints(0)), None, bins)
    nothing = emit.constant(np.zeros((0, block.hidden_out or 0), block.dtype.numpy()))
    results: list[ir.Value] = []
    for group, piece, hit, height in zip(groups, pieces, hits, heights, strict=False):
        then = inside(emit, f"{group.start}-{group.stop - 1}")
        own = [piece] if len(group) == 1 else then.ops("Split", (piece, height), len(group), axis=0)
        result = joined(then, emit_group(then, weights, group, own, height, opset))
        other = Branch(inside(emit, "none"), [nothing])
        told = [(block.dtype, (None, block.hidden_out))]
        results += emit_if(emit, hit, Branch(then, [result]), other, told)
    return results, pieces[-1] if dispatch.bins > dispatch.experts else None


def _sums(emit: Emitter, dispatch: Dispatch, groups: Sequence[range]) -> ir.Value:
    """`[groups]` rows of each group, and behind them those that are dropped, if any."""
    kept, dropped = dispatch.sizes, None
    if dispatch.bins > dispatch.experts:
        kept, dropped = emit.ops("Split", (kept, emit.ints(dispatch.experts, 1)), 2, axis=0)
    missing = len(groups) * len(groups[0]) - dispatch.experts
    if missing:
        kept = emit.op("Concat", kept, emit.ints(*[0] * missing), axis=0)
    table = emit.op("Reshape", kept, emit.ints(len(groups), len(groups[0])))
    sums = emit.op("ReduceSum", table, emit.ints(1), keepdims=0)
    return sums if dropped is None else emit.op("Concat", sums, dropped, axis=0)


def _looped(
    emit: Emitter, weights: ExpertWeights, dispatch: Dispatch, rows: ir.Value, opset: int
) -> tuple[list[ir.Value], ir.Value | None]:
    """Rows of all experts, and something as long as the piece of the dropped slots if there may be any."""
    results = [emit_loop(emit, weights, dispatch, rows, opset)]
    if dispatch.bins == dispatch.experts:
        return results, None
    kept = emit.op("Shape", results[0], start=0, end=1)
    return results, emit.op("Slice", dispatch.order, kept, dispatch.count, emit.ints(0))
