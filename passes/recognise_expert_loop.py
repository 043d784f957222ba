"""Loops over experts that exporters unrolled, lifted to the neutral form.

Mistral's reference, transformers 4, optimum, DeepSeek's reference and Switch's list write, for each expert e,

    rows = where(index == e)                         NonZero of a mask, or a piece of the slots sorted by expert
    out[rows] += weight[rows, slot] * expert_e(x[rows])

which becomes one `sparse_onnx::MoE` (or `GatedMoE`) node over x, index and weight. A loop over a token's slots, that
is over columns of the index, may stand around or inside that one. Masks may be compared, one-hot or reduced over the
slots; rows gathered and put back by any of Gather, GatherND, ScatterND, ScatterElements; weights taken by token and
slot, from a column of a weight for each expert, or multiplied on after a loop over one expert a token.

Proved from the graph: each mask is that of one expert over the same indices; rows, weights and results all belong to
the slots of that mask; every expert of the router occurs once (once a slot), and reads the same tokens; accumulators
have a row for each token, and nobody else reads them. What a sum began with, or got besides (a shared expert), stays
an addition. Indices of a router that is not proved to choose among these experts are guarded: what is none of them is
dropped.

Enters If, Loop and Scan bodies. Refused, with the reason: everything else that scatters what several experts' masks
chose.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import onnx_ir as ir

from sparse_onnx.blocks.lowered import FORM_KEY
from sparse_onnx.core.passes import Outcome, Pass
from sparse_onnx.matching.accumulate import Total, totals
from sparse_onnx.matching.block import Workshop
from sparse_onnx.matching.choice import Choices
from sparse_onnx.matching.dims import Dims
from sparse_onnx.matching.expert_loop import looks_like
from sparse_onnx.matching.expert_loop_block import lift
from sparse_onnx.matching.hits import HitReader


@dataclasses.dataclass(frozen=True)
class RecogniseExpertLoop(Pass):
    __doc__ = __doc__
    name: ClassVar[str] = "recognise_expert_loop"
    summary: ClassVar[str] = "one branch per expert, NonZero to scatter, lifted to the neutral form"

    def call(self, model: ir.Model) -> Outcome:
        shop = Workshop(model, self.name)
        matched = 0
        for graph in list(model.graphs()):
            if not any(node.op_type in ("ScatterND", "ScatterElements") for node in graph):
                continue
            reader = HitReader(Choices(), Dims(graph))
            found = [total for total in totals(graph, reader) if looks_like(total) and not _ours(total)]
            matched += len(found)
            before = len(shop.refusals)
            # Last first: a later block may read what the node of an earlier one takes the place of.
            for total in reversed(found):
                lift(total, reader, shop)
            shop.refusals[before:] = reversed(shop.refusals[before:])
        return shop.outcome(matched)


def _ours(total: Total) -> bool:
    """Whether this tool's own lowering made the sum."""
    node = total.value.producer()
    return node is not None and FORM_KEY in node.metadata_props
