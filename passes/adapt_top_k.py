"""Fewer experts for tokens that are sure of them: slots of little weight are dropped. Lossy; runs only when asked for.

With p[k] = w[k] / sum over j of w[j], over the slots of one token that are not dropped already, slot k is dropped where

    p[k] < threshold      or      (sum of p[j] over the slots j before k) >= top_p

Slots are ordered by weight, ties by place; the order that they are stored in means nothing. A token keeps its first
slot whatever its weight. A dropped slot gets the index E, which adds nothing; forms that run experts on their own
tokens do not compute it. With `renormalise` the others are scaled so that the token's weights sum to what they did.

Decided in float32 where weights are of half precision. A token of which all weights are zero, or some NaN, keeps its
slots. Blocks with one routing get one adapted routing. Enters If, Loop and Scan bodies. What was adapted is marked in
the node's metadata, and is not adapted again.

Refused: weights that the graph does not prove to be at least zero; tokens of one expert; blocks that were adapted
otherwise before; `Combine` blocks with the same experts and different weights, which must be dispatched together;
numbers of experts or types that the graph does not tell; and everything, where threshold is 0 and top_p is 1.

Measured on the zoo's byte-moe (K = 2), held-out bits per byte and slots a token: threshold 0.05 +0.03 %, 1.77; 0.1
+0.13 %, 1.58; 0.2 +0.43 %, 1.37; 0.3 +0.76 %, 1.23 (+0.57 % if not renormalised). With K = 2 a top_p of 1 - t drops
what a threshold of t does. Half of the slots dropped takes 0.52 times as long for one token (64 experts, K = 8, CPU).

Cumulative probability is the criterion of "Harder Tasks Need More Experts" (arXiv 2403.07652), whose models are
trained with it and do not renormalise.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import ClassVar, Literal

import numpy as np
import onnx_ir as ir

from sparse_onnx.blocks import CombineBlock, MoEBlock, neutral_blocks
from sparse_onnx.blocks.lowered import NAME_KEY
from sparse_onnx.blocks.routing import never_dropped
from sparse_onnx.core.errors import UsageError
from sparse_onnx.core.passes import Outcome, Pass
from sparse_onnx.core.report import Refusal
from sparse_onnx.graph.build import Emitter, Namespace
from sparse_onnx.matching.signs import non_negative

#: Metadata of a neutral node: the options that its routing was adapted with.
ADAPTED_KEY = "sparse_onnx.adapted"

_Block = MoEBlock | CombineBlock


@dataclasses.dataclass(frozen=True)
class AdaptTopK(Pass):
    __doc__ = __doc__
    name: ClassVar[str] = "adapt_top_k"
    summary: ClassVar[str] = (
        "slots of little routing weight are dropped: fewer experts for tokens that are sure of them"
    )
    kind: ClassVar[Literal["exact", "lossy"]] = "lossy"

    threshold: float = dataclasses.field(
        default=0.0, metadata={"help": "drop slots with less than this share of a token's weight; 0 to 1"}
    )
    top_p: float = dataclasses.field(
        default=1.0,
        metadata={"help": "drop slots behind those that hold this share already; above 0, up to 1"},
    )
    renormalise: bool = dataclasses.field(
        default=True, metadata={"help": "scale the weights that stay, so that their sum is what it was"}
    )

    def __post_init__(self) -> None:
        if not 0 <= self.threshold <= 1:
            raise UsageError(f"pass '{self.name}': threshold={self.threshold} is not a share from 0 to 1")
        if not 0 < self.top_p <= 1:
            raise UsageError(f"pass '{self.name}': top_p={self.top_p} is not a share above 0, up to 1")

    def call(self, model: ir.Model) -> Outcome:
        if self.threshold == 0 and self.top_p == 1:
            hint = "set threshold, top_p or both"
            return Outcome(model, False, refusals=(Refusal("nothing asked for", "", hint, self.name),))
        found = [
            block
            for block in neutral_blocks(model)
            if self._mark != block.node.metadata_props.get(ADAPTED_KEY)
        ]
        apart, refusals = _apart(found), []
        groups: dict[tuple[int, ...], list[_Block]] = {}
        for block in found:
            problem = _problem(block, apart)
            if problem is not None:
                refusals.append(_refusal(block, problem, self.name))
                continue
            assert block.experts is not None
            key = id(block.node.graph), id(block.expert_index), id(block.expert_weight), block.experts
            groups.setdefault(key, []).append(block)

        names = Namespace(model)
        for group in groups.values():
            self._adapt(group, names)
        rewritten = sum(map(len, groups.values()))
        return Outcome(model, rewritten > 0, len(found), rewritten, tuple(refusals))

    @property
    def _mark(self) -> str:
        return f"threshold={self.threshold},top_p={self.top_p},renormalise={self.renormalise}"

    def _adapt(self, group: Sequence[_Block], names: Namespace) -> None:
        first = group[0]
        assert (
            isinstance(first.node.graph, ir.Graph) and first.experts is not None and first.top_k is not None
        )
        emit = Emitter(first.node.graph, names, first.name, {NAME_KEY: first.name})
        index, weight = self._routing(
            emit, first.expert_index, first.expert_weight, first.experts, first.top_k
        )
        first.node.graph.insert_before(first.node, emit.nodes)
        for block in group:
            block.node.replace_input_with(_place(block, block.expert_index), index)
            block.node.replace_input_with(_place(block, block.expert_weight), weight)
            block.node.metadata_props[ADAPTED_KEY] = self._mark

    def _routing(
        self, emit: Emitter, index: ir.Value, weight: ir.Value, experts: int, top_k: int
    ) -> tuple[ir.Value, ir.Value]:
        """Index and weight `[T, K]` with slots dropped."""
        assert weight.dtype is not None
        dtype = ir.DataType.FLOAT if weight.dtype.bitwidth < 32 else weight.dtype
        zero, axis = emit.scalar(0.0, dtype), emit.ints(-1)
        none = emit.constant(np.asarray(experts, np.int64))
        mass = weight if dtype == weight.dtype else emit.op("Cast", weight, to=dtype)
        if not never_dropped(index, experts):
            mass = emit.op("Where", emit.op("Less", index, none), mass, zero)
        total = emit.op("ReduceSum", mass, axis, keepdims=1)

        goes: list[ir.Value] = []
        if self.threshold > 0:
            goes.append(emit.op("Less", mass, emit.op("Mul", total, emit.scalar(self.threshold, dtype))))
        if self.top_p < 1:
            enough = emit.op("Mul", total, emit.scalar(self.top_p, dtype))
            goes.append(emit.op("GreaterOrEqual", _mass_before(emit, mass, zero, top_k), enough))
        small = goes[0] if len(goes) == 1 else emit.op("Or", *goes)
        best = emit.op("ArgMax", mass, axis=-1, keepdims=1)
        other = emit.op("Not", emit.op("Equal", emit.constant(np.arange(top_k)), best))
        dropped = emit.op("And", emit.op("And", small, other), emit.op("Greater", total, zero))

        new_index = emit.op("Where", dropped, none, index)
        new_index.shape, new_index.type = index.shape, index.type
        if not self.renormalise:
            return new_index, weight
        left = emit.op("Where", dropped, zero, mass)
        rest = emit.op("ReduceSum", left, axis, keepdims=1)
        # By one where nothing is lost: then a sum of zero or infinity is not divided by itself.
        factor = emit.op(
            "Where", emit.op("Less", rest, total), emit.op("Div", total, rest), emit.scalar(1.0, dtype)
        )
        new_weight = emit.op("Mul", left, factor)
        if dtype != weight.dtype:
            new_weight = emit.op("Cast", new_weight, to=weight.dtype)
        new_weight.shape, new_weight.type = weight.shape, weight.type
        return new_index, new_weight


def _mass_before(emit: Emitter, mass: ir.Value, zero: ir.Value, top_k: int) -> ir.Value:
    """`[T, K]`: the weight of all slots of the token that are larger, or as large and stored before."""
    own, others = emit.op("Unsqueeze", mass, emit.ints(2)), emit.op("Unsqueeze", mass, emit.ints(1))
    earlier = emit.constant(np.tri(top_k, k=-1, dtype=np.bool_))  # [k, j]: j < k
    tie = emit.op("And", emit.op("Equal", others, own), earlier)
    before = emit.op("Or", emit.op("Greater", others, own), tie)
    return emit.op("ReduceSum", emit.op("Where", before, others, zero), emit.ints(2), keepdims=0)


def _place(block: _Block, value: ir.Value) -> int:
    return next(at for at, item in enumerate(block.node.inputs) if item is value)


def _apart(blocks: Sequence[_Block]) -> set[ir.Node]:
    """`Combine` nodes that weigh the results of the same experts, chosen alike, differently."""
    together: dict[tuple[int, ...], list[_Block]] = {}
    for block in blocks:
        if isinstance(block, CombineBlock):
            experts = [id(node) for node in block.nodes] or [id(block.stack)]
            key = (id(block.expert_index), *experts)
            together.setdefault(key, []).append(block)
    uneven = (group for group in together.values() if len({id(block.expert_weight) for block in group}) > 1)
    return {block.node for group in uneven for block in group}


def _problem(block: _Block, apart: set[ir.Node]) -> tuple[str, str] | None:
    before = block.node.metadata_props.get(ADAPTED_KEY)
    if before is not None:
        return (
            f"its routing was adapted before, with {before}",
            "give all options at once, to a model without",
        )
    if not block.experts or not block.top_k or block.expert_weight.dtype is None:
        what = "the number of experts, of experts of a token, or the type of the weights"
        return f"{what} is not known from the graph", "save the model with its inferred shapes and types"
    if block.top_k == 1:
        return "tokens have one expert: there is nothing to drop", "adapt routers of several experts a token"
    if block.node in apart:
        return (
            "another block weighs the same experts differently, and would drop other slots",
            "blocks that share experts must share their routing",
        )
    if not non_negative(block.expert_weight):
        return (
            "its weights are not known to be at least zero, and a share of a sum says nothing then",
            "weights must come from softmax, sigmoid or another operator that gives no negative numbers",
        )
    return None


def _refusal(block: _Block, problem: tuple[str, str], by: str) -> Refusal:
    reason, hint = problem
    return Refusal(f"block '{block.name}': {reason}", block.node.name or "", hint, by)
