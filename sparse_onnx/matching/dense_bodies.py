"""A proved sum over experts of any body: each is outlined as a function, and `Combine` sums up what they give."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import onnx_ir as ir

from sparse_onnx.graph.build import Emitter
from sparse_onnx.matching.block import Workshop
from sparse_onnx.matching.dense_rewrite import SPELLING, Rewrite
from sparse_onnx.matching.dims import Dims
from sparse_onnx.matching.leading import same_axis
from sparse_onnx.matching.outline import Body, FoundBodies, outline, shared_entry
from sparse_onnx.matching.values import producer, rank, size

_VIEWS = ("Reshape", "Flatten", "Squeeze", "Unsqueeze", "Identity")


def entry_of(exits: Sequence[ir.Value], leading: int, dims: Dims, shop: Workshop) -> ir.Value | None:
    """The value from which alone all experts compute their results, with their leading axes where it can be had."""
    entry = shared_entry(exits, shop)
    above = entry
    while above is not None and not all(same_axis(dims, above, at, exits[0], at) for at in range(leading)):
        node = producer(above, *_VIEWS)
        above = None if node is None else node.inputs[0]
    return entry if above is None else above


@dataclasses.dataclass(frozen=True, eq=False)
class RewriteBodies(Rewrite):
    """Everything that is proved of a block with experts of any body.

    Attributes:
        entry: what all experts read.
        exits: their results in order.
        leading: axes of entry and results that count tokens.
    """

    entry: ir.Value
    exits: Sequence[ir.Value]
    leading: int

    @property
    def tokens(self) -> ir.Value:
        return self.entry

    @property
    def named(self) -> list[ir.Node]:
        found = [value.producer() for value in (self.exits[0], self.exits[-1])]
        return [node for node in found if node is not None]

    def slots(self, emit: Emitter, ids: ir.Value, weight: ir.Value) -> tuple[ir.Value, ir.Value]:
        """Both ``[T, K]``."""
        return self._rows(emit, ids), self._rows(emit, weight)

    def _rows(self, emit: Emitter, value: ir.Value) -> ir.Value:
        top_k = self.route.top_k
        if rank(value) == 2 and size(value, 1) == top_k:
            return value
        rows = emit.op("Reshape", value, emit.ints(-1, top_k))
        rows.type, rows.shape = value.type, ir.Shape([None, top_k])
        return rows

    def put_in(self, output: ir.Value, tokens: ir.Value, ids: ir.Value, weight: ir.Value, top_k: int) -> bool:
        bodies = [Body(tokens, (exit,)) for exit in self.exits]
        found = FoundBodies(SPELLING, (output,), tokens, ids, weight, top_k, bodies, self.leading)
        return outline(found, self.shop)
