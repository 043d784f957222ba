"""A proved sum over experts put into the graph as a block, and taken out again where that fails."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import onnx_ir as ir

from sparse_onnx.blocks import is_zero
from sparse_onnx.graph.build import Emitter
from sparse_onnx.matching.block import Found, Workshop, commit
from sparse_onnx.matching.dense import DenseSum
from sparse_onnx.matching.dense_routing import Routing, emit_weight, ones_like
from sparse_onnx.matching.dims import Dims
from sparse_onnx.matching.expert import Expert
from sparse_onnx.matching.naming import block_name
from sparse_onnx.matching.values import attribute, producer, rank, size, sole_use
from sparse_onnx.matching.weighted import Weighted

SPELLING = "dense-mask"
_RESHAPES = ("Reshape", "Squeeze", "Unsqueeze", "Flatten", "Identity", "Cast")


def zero_problem(expert: Expert) -> str:
    """Why the expert does not give 0 for 0, so that weighting its tokens is not masking them; empty where it does.

    Every activation of the neutral operators is 0 at 0, and what a gate of 0 is multiplied with is finite.
    """
    for role, layer in expert.layers.items():
        if layer.bias is not None and not is_zero(layer.bias.source):
            return (
                f"tokens are weighted before the experts, which have a bias at '{role}': an expert that a token did "
                "not choose still adds to it"
            )
    return ""


def place(
    dims: Dims, found: DenseSum, candidates: Sequence[ir.Value], dtype: ir.DataType | None
) -> tuple[ir.Value, ir.Value | None]:
    """The value that the block replaces, and one with the same leading axes (None: it is of rank 2, or none is known).

    That is the sum, or what a cast or reshapes alone make of it.
    """
    output = behind_cast(found, dtype)
    for _ in range(3):
        if dims.rank(output) == 2:
            return output, None
        like = _like(dims, output, candidates)
        user = sole_use(output)
        if like is not None or found.others or user is None or user.op_type not in _RESHAPES[:3]:
            return output, like
        if user.inputs[0] is not output or not dims.same_last(output, user.outputs[0]):
            return output, None
        output = user.outputs[0]
    return output, None


def behind_cast(found: DenseSum, dtype: ir.DataType | None) -> ir.Value:
    """The sum, or what a cast back to the experts' type alone makes of it."""
    user = sole_use(found.output)
    if found.others or user is None or user.op_type != "Cast" or found.output.dtype == dtype:
        return found.output
    return user.outputs[0] if attribute(user, "to") == dtype else found.output


def _like(dims: Dims, output: ir.Value, candidates: Sequence[ir.Value]) -> ir.Value | None:
    for candidate in candidates:
        value: ir.Value | None = candidate
        while value is not None:
            if rank(value) is not None and dims.same_rows(output, value):
                return value
            node = producer(value, *_RESHAPES)
            value = None if node is None else node.inputs[0]
    return None


@dataclasses.dataclass(frozen=True, eq=False)
class Rewrite:
    """Everything that is proved of a block.

    Attributes:
        output: the value that it replaces.
        like: has the same leading axes.
        terms: one an expert, or one whose gate is of all experts.
    """

    shop: Workshop
    found: DenseSum
    output: ir.Value
    like: ir.Value | None
    route: Routing
    terms: Sequence[Weighted]
    experts: Sequence[Expert]

    def weighted(self) -> bool:
        """The block, plus what else the sum holds."""
        emit = self._emitter()
        ids, weight = self.slots(emit, self.route.ids, emit_weight(emit, self.terms, self.route))
        self.shop.put(self._anchor, emit)
        after = self._emitter()
        if not self.found.others:
            return self._committed(emit, after, self.output, self.tokens, ids, weight)
        rest = self.found.others[0]
        for other in self.found.others[1:]:
            rest = after.op("Add", rest, other)
        final = after.op("Add", self.output, rest)
        self._detour(after, self.output, final)
        return self._committed(emit, after, self.output, self.tokens, ids, weight, detour=final)

    def scaled(self) -> bool:
        """A block of K rows a token, each weighted, for one expert each; then the sum of a token's rows."""
        entry, top_k = self.experts[0].entry, self.route.top_k
        width, dtype = size(entry, -1) or 0, entry.dtype or ir.DataType.FLOAT
        emit = self._emitter()
        weight = emit.op("Reshape", emit_weight(emit, self.terms, self.route), emit.ints(-1, top_k, 1))
        tokens = emit.op("Reshape", entry, emit.ints(-1, 1, width))
        rows = emit.op("Reshape", emit.op("Mul", tokens, weight), emit.ints(-1, width))
        ids = emit.op("Reshape", self.route.ids, emit.ints(-1, 1))
        rows.type, rows.shape = ir.TensorType(dtype), ir.Shape([None, width])
        ids.type, ids.shape = self.route.ids.type, ir.Shape([None, 1])
        ones = ones_like(emit, ids, dtype)
        self.shop.put(self._anchor, emit)
        after = self._emitter()
        outputs = size(self.output, -1) or width
        result = after.op("Identity", self.output)
        result.type, result.shape = self.output.type, ir.Shape([None, outputs])
        summed = after.op("Reshape", result, after.ints(-1, top_k, outputs))
        final = after.op("ReduceSum", summed, after.ints(1), keepdims=0)
        if rank(self.output) != 2:
            leading = after.op("Shape", self.like, start=0, end=-1)
            shape = after.op("Concat", leading, after.ints(outputs), axis=0)
            final = after.op("Reshape", final, shape, allowzero=1)
        for other in self.found.others:
            final = after.op("Add", final, other)
        self._detour(after, self.output, final)
        return self._committed(emit, after, result, rows, ids, ones, detour=final, top_k=1)

    @property
    def tokens(self) -> ir.Value:
        """The rows that all experts read."""
        return self.experts[0].entry

    @property
    def named(self) -> list[ir.Node]:
        """Nodes of experts, after which the block is named."""
        picked = (self.experts[0], self.experts[-1]) if len(self.experts) > 1 else self.experts[:1]
        return [layer.node for expert in picked for layer in expert.layers.values()]

    def slots(self, emit: Emitter, ids: ir.Value, weight: ir.Value) -> tuple[ir.Value, ir.Value]:
        """Index and weight as the block reads them."""
        return ids, weight

    def put_in(self, output: ir.Value, tokens: ir.Value, ids: ir.Value, weight: ir.Value, top_k: int) -> bool:
        """The block in place of `output`; a refusal, and the graph as it was, where that cannot be."""
        unshaped = output.shape is None
        if unshaped:
            # Operators of other domains hide shapes from inference, not from the proof.
            output.shape = ir.Shape([None] * (2 if self.like is None else rank_of(self.like)))
        block = Found(SPELLING, output, tokens, ids, weight, top_k, self.experts, self.like)
        if commit(block, self.shop):
            return True
        if unshaped:
            output.shape = None
        return False

    @property
    def _anchor(self) -> ir.Node:
        anchor = self.output.producer()
        assert anchor is not None
        return anchor

    def _emitter(self) -> Emitter:
        graph = self._anchor.graph
        assert isinstance(graph, ir.Graph)
        return Emitter(graph, self.shop.names, f"{block_name(self.named, self._anchor)}/routing")

    def _detour(self, after: Emitter, old: ir.Value, final: ir.Value) -> None:
        """Everybody who read `old` reads `final`, which is computed from it."""
        self.shop.put(self._anchor, after, after=True)
        own = {id(node) for node in after.nodes}
        final.type, final.shape = old.type, old.shape
        _swap(old, final, own)

    def _committed(
        self,
        before: Emitter,
        after: Emitter,
        output: ir.Value,
        tokens: ir.Value,
        ids: ir.Value,
        weight: ir.Value,
        detour: ir.Value | None = None,
        top_k: int | None = None,
    ) -> bool:
        if self.put_in(output, tokens, ids, weight, self.route.top_k if top_k is None else top_k):
            return True
        if detour is not None:
            _swap(detour, self.output, {id(node) for node in after.nodes})
        after.withdraw()
        before.withdraw()
        return False


def rank_of(value: ir.Value) -> int:
    found = rank(value)
    assert found is not None
    return found


def _swap(old: ir.Value, new: ir.Value, own: set[int]) -> None:
    """The readers of `old`, but for nodes of `own`, read `new`, which gets its name if it leaves the graph."""
    for node, index in list(old.uses()):
        if id(node) not in own:
            node.replace_input_with(index, new)
    graph = old.graph
    if not old.is_graph_output() or graph is None:
        return
    for at, value in enumerate(graph.outputs):
        if value is old:
            graph.outputs[at] = new
    old.name, new.name = new.name, old.name
