"""Experts run on rows sorted by expert, lifted to the neutral form: transformers' grouped experts, JetMoE, DeepSeek.

For ids ``[T, K]``, weights ``[T, K]`` and tokens ``x [T, D]``, over the flattened slots ``s = t K + k``:

    order    = argsort(ids)                        TopK of all slots
    rows     = x[order / K]                        [T K, D]
    start    = CumSum(histogram(ids))              or the counts themselves, as sizes of a Split
    out      = Concat(expert_e(rows[start[e] : start[e + 1]]) for each e)
    y[t]     = sum_k weight[t, k] * out[order^-1][t, k]

The experts may share the activation between two such products over all rows. Weights may be applied before or after the
rows return to the order of tokens; the way back is a gather by the inverse permutation, a scatter of rows, or an
addition to the rows of tokens.

Proved: the order is by ids that lie in [0, E); exactly these ids are counted, in E bins; segment e begins and ends
where expert e's slots do; both products use the same segments; the way back is the inverse of this order; chains of
arithmetic on ids and slots are evaluated on all ids, and for slots on thousands of indices and round each of their
constants. Counts are integers of 32 bits or more, or floating point that holds them; 16 bits round them from 2049 on.

Refused: a block of which any of this is not proved, expert values used elsewhere, no routing weight.
Enters If, Loop and Scan bodies. Functions were inlined before.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import ClassVar

import onnx_ir as ir

from sparse_onnx.blocks.lowered import FORM_KEY
from sparse_onnx.core.passes import Outcome, Pass
from sparse_onnx.matching.block import Found, Workshop, commit
from sparse_onnx.matching.dims import Dims
from sparse_onnx.matching.expert import Expert, read_expert
from sparse_onnx.matching.grouped import Exit, Mismatch, exits, sorted_weight
from sparse_onnx.matching.grouped_sum import Combining
from sparse_onnx.matching.integers import quotient
from sparse_onnx.matching.layout import gathered, rows_of
from sparse_onnx.matching.linear import Linear, Matrix, linear
from sparse_onnx.matching.order import Order, order_of
from sparse_onnx.matching.segments import Segments
from sparse_onnx.matching.values import attribute, pairs, producer, rank, size, tensor

_HINT = "only rows that are sorted by expert, run through it and put back where they were can be recognised"
#: Operators followed back from the rows that return to the tokens, to see whether experts computed them.
_DEPTH = 12
#: More experts than a block has.
_MANY = 1 << 14


@dataclasses.dataclass(frozen=True)
class RecogniseGrouped(Pass):
    __doc__ = __doc__
    name: ClassVar[str] = "recognise_grouped"
    summary: ClassVar[str] = "experts run on rows sorted by expert, lifted to the neutral form"

    def call(self, model: ir.Model) -> Outcome:
        shop, dims = Workshop(model, self.name), Dims()
        sorts = [node for graph in model.graphs() for node in graph if node.op_type == "TopK"]
        lost: list[ir.Node] = []
        told: set[ir.Node] = set()
        for node in sorts:
            if node.graph is None or FORM_KEY in node.metadata_props:
                continue  # replaced with an earlier block, or this tool's own lowering
            order = order_of(node, dims)
            if order is not None:
                lost += _recognise(order, shop, dims, told)
        for node in lost:
            if node.graph is not None and node not in told:
                shop.refuse("rows sorted by expert never return to the order of their tokens", node, _HINT)
        matched = shop.rewritten + len(shop.refusals)
        return Outcome(model, shop.rewritten > 0, matched, shop.rewritten, tuple(shop.refusals))


def _recognise(order: Order, shop: Workshop, dims: Dims, told: set[ir.Node]) -> list[ir.Node]:
    """Lifts the blocks of one order. Returns gathers of rows that go to products and not back.

    `told` takes the gathers in front of whatever is refused.
    """
    found, returned = exits(order, dims), False
    for way in found.back:
        rows, weight = sorted_weight(way.rows, order)
        joined = _joined(rows) if way.node.graph is not None else None
        returned = returned or joined is not None or way.node.graph is None
        if joined is None:
            continue
        try:
            block, shape = _read(order, way, rows, weight, joined, dims)
        except Mismatch as problem:
            shop.refuse(str(problem), problem.node or way.node, _HINT)
            told |= _gathers_before(joined)
            continue
        inferred = block.output.shape
        if inferred is None:  # behind an operator of ORT's own, say; here it is known
            block.output.shape = shape
        if not commit(block, shop):
            block.output.shape = inferred
            told |= _gathers_before(joined)
    return [] if returned else [node for node in found.gathers if _feeds_products(node.outputs[0])][:1]


def _gathers_before(joined: ir.Node) -> set[ir.Node]:
    """Gathers from which the pieces of a Concat were computed, as far as a block reaches back."""
    seen: set[ir.Node] = set()
    work, most = [joined], 64 * len(joined.inputs)
    while work and len(seen) < most:
        node = work.pop(0)
        for value in node.inputs:
            before = None if value is None or tensor(value) is not None else value.producer()
            if before is not None and before not in seen:
                seen.add(before)
                work.append(before)
    return {node for node in seen if node.op_type in ("Gather", "GatherND")}


def _read(
    order: Order, way: Exit, rows: ir.Value, weight: ir.Value | None, joined: ir.Node, dims: Dims
) -> tuple[Found, ir.Shape]:
    if not order.told:
        raise Mismatch(
            f"'{order.permutation.name}' need not be sorted: with sorted = 0, TopK gives its elements in any order",
            order.node,
        )
    experts = len(joined.inputs)
    ids = order.ids(experts)
    if ids is None:
        if order.keys.dtype is None:
            raise Mismatch(
                f"the type of what is sorted, '{order.keys.name}', is not known from the graph", order.node
            )
        if order.ids(_MANY) is not None:
            raise Mismatch(
                f"expert ids are not proved to be below {experts}, the number of experts", order.node
            )
        raise Mismatch("the slots are not proved to be sorted by expert, smallest id first", order.node)
    layers = _Layers(order, Segments(order, ids, experts), experts)
    try:
        read = layers.experts_at(rows, joined)
    except Mismatch:
        if not layers.segments.problem:
            _check_factors(rows, weight, joined)
        raise
    entry = rows_of(read[0].entry)
    source = gathered(entry)
    top_k = None if source is None else quotient(source[1], order.permutation)
    if source is None or top_k is None:
        raise Mismatch(
            f"what the experts read, '{entry.name}', is not proved to be tokens in sorted order", joined
        )
    other = next((item for item in read if rows_of(item.entry) is not entry), None)
    if other is not None:
        raise Mismatch(f"one expert reads '{entry.name}', another one '{other.entry.name}'", joined)
    dims.learn_rows(joined.outputs[0], ids)  # the experts' segments, one behind the other, are all slots
    tokens = source[0]
    if rank(tokens) != 2:
        raise Mismatch(f"the tokens '{tokens.name}' are not proved to be one row each", entry.producer())
    if size(ids, -1) not in (None, top_k) and rank(ids) != 1:
        raise Mismatch(
            f"a token has {size(ids, -1)} experts, but the rows are taken as if it had {top_k}",
            entry.producer(),
        )
    width = _outputs(read[0])
    if width is None:
        raise Mismatch("the outputs of the experts' last matrix are not known from the graph", joined)
    result = Combining(way, top_k, width, weight, tokens, dims).result()
    if not dims.as_many(ids, top_k, tokens, None):
        raise Mismatch(
            f"the ids '{ids.name}' are not proved to be {top_k} for each row of '{tokens.name}'", joined
        )
    weights = result.weight
    if not dims.as_many(weights, 1, ids, 1) and not dims.as_many(weights, top_k, tokens, None):
        raise Mismatch(
            f"the weights '{weights.name}' are not proved to be {top_k} for each row of tokens", joined
        )
    found = Found("grouped", result.output, tokens, ids, weights, top_k, read, like=rows_of(tokens))
    return found, ir.Shape(result.shape)


def _check_factors(rows: ir.Value, weight: ir.Value | None, joined: ir.Node) -> None:
    """Nothing but the weights of the slots may be multiplied with the experts' rows, one number a row."""
    node = producer(rows, "Mul")
    for other, factor in () if node is None else pairs(node):
        column = rank(factor) == 2 and size(factor, 1) == 1 and tensor(factor) is None
        if column and rows_of(other) is joined.outputs[0]:
            raise Mismatch(
                f"'{factor.name}' is not proved to be the routing weight of each slot, in sorted order"
                if weight is None
                else f"the experts' rows are multiplied with '{factor.name}' besides their routing weights",
                node,
            )


class _Layers:
    """Reads projections: one product an expert on its segment, joined again."""

    def __init__(self, order: Order, segments: Segments, experts: int) -> None:
        self.order, self.segments, self.experts = order, segments, experts
        self._known: dict[int, tuple[Linear, ...] | None] = {}

    def experts_at(self, rows: ir.Value, joined: ir.Node) -> Sequence[Expert]:
        """All experts, from rows ``[S, D_out]`` in sorted order that they computed."""
        parts = [part for part in joined.inputs if part is not None]
        last = linear(parts[0])
        shared = last is not None and self.segments.of(rows_of(last.x)) is not None
        if shared and last is not None:
            source = gathered(rows_of(self.segments.of(rows_of(last.x))[0]))  # type: ignore[index]
            if source is not None and quotient(source[1], self.order.permutation) is not None:
                raise Mismatch(
                    "each expert is one matrix and no second follows: a routed projection, which stays as it is",
                    joined,
                )
        found: list[Expert] = []
        for expert, part in enumerate(parts):
            if shared:
                read = read_expert(rows, functools.partial(self.reader, expert=expert))
            else:
                read = read_expert(part)
            if isinstance(read, str):
                raise Mismatch(f"expert {expert}: {self.segments.problem or read}", joined)
            if not shared:
                read = self._whole(read, expert, joined)
            found.append(read)
        if not shared and rows_of(rows) is not joined.outputs[0]:
            raise Mismatch("something stands between the experts and their weights", joined)
        return found

    def _whole(self, read: Expert, expert: int, joined: ir.Node) -> Expert:
        """An expert that runs on its segment from end to end, with the rows that the segment is of."""
        segment = self.segments.of(rows_of(read.entry))
        if segment is None:
            problem = (
                self.segments.problem or f"it does not read a segment of the sorted rows: '{read.entry.name}'"
            )
            raise Mismatch(f"expert {expert}: {problem}", joined)
        if segment[1] != expert:
            raise Mismatch(f"the matrix in place {expert} runs on the rows of expert {segment[1]}", joined)
        return dataclasses.replace(read, entry=segment[0])

    def reader(self, value: ir.Value, expert: int) -> Linear | None:
        if id(value) not in self._known:
            self._known[id(value)] = self._projection(value)
        layers = self._known[id(value)]
        return None if layers is None else layers[expert]

    def _projection(self, value: ir.Value) -> tuple[Linear, ...] | None:
        node = producer(value, "Add", "Concat")
        if node is None:
            return None
        if node.op_type == "Add":
            for product, added in pairs(node):
                layers, bias = self._projection(product), self._bias(added)
                if layers is not None and bias is not None and all(layer.bias is None for layer in layers):
                    return tuple(
                        dataclasses.replace(layer, bias=dataclasses.replace(bias, index=expert))
                        for expert, layer in enumerate(layers)
                    )
            return None
        return self._products(node)

    def _products(self, node: ir.Node) -> tuple[Linear, ...] | None:
        if attribute(node, "axis", 0) != 0:
            return None
        layers: list[Linear] = []
        shared: ir.Value | None = None
        for expert, part in enumerate(node.inputs):
            layer = linear(part)
            segment = None if layer is None else self.segments.of(rows_of(layer.x))
            if layer is None or segment is None:
                return None
            rows, number = segment
            if number != expert or (shared is not None and rows is not shared):
                raise Mismatch(
                    f"place {expert} of a projection runs on the rows of expert {number}"
                    + ("" if number != expert else ", taken from other rows than the others"),
                    node,
                )
            shared = rows
            layers.append(dataclasses.replace(layer, x=rows))
        if len(layers) != self.experts:
            raise Mismatch(f"one projection has {len(layers)} experts, the last {self.experts}", node)
        return tuple(layers)

    def _bias(self, value: ir.Value) -> Matrix | None:
        """``[E, out]`` picked by the sorted ids."""
        read = gathered(value)
        if read is None or tensor(read[0]) is None or rank(read[0]) != 2 or size(read[0], 0) != self.experts:
            return None
        if not self.order.same_ids(read[1], self.segments.ids, self.experts, only_sorted=True):
            raise Mismatch(
                f"bias '{read[0].name}' is picked by other ids than the sorted ones", value.producer()
            )
        return Matrix(read[0])


def _outputs(expert: Expert) -> int | None:
    """D_out, as the last matrix is stored."""
    last = list(expert.layers.values())[-1]
    return size(last.weight.source, -2 if last.out_in else -1)


def _joined(rows: ir.Value) -> ir.Node | None:
    """The Concat of two or more experts' rows that these come from; with more between only where it is no block."""
    work, seen = [rows], 0
    while work and seen < _DEPTH:
        node = work.pop(0).producer()
        seen += 1
        if node is None:
            continue
        if node.op_type == "Concat" and len(node.inputs) > 1 and attribute(node, "axis", 0) == 0:
            if all(_has_product(part) for part in node.inputs):
                return node
            continue
        work.extend(item for item in node.inputs if item is not None and tensor(item) is None)
    return None


def _has_product(part: ir.Value | None) -> bool:
    """Whether a matrix product is among the last operators behind a value."""
    work, seen = [part], 0
    while work and seen < _DEPTH:
        node = producer(work.pop(0))
        seen += 1
        if node is not None and node.op_type in ("MatMul", "Gemm", "Einsum"):
            return True
        if node is not None:
            work.extend(item for item in node.inputs if item is not None and tensor(item) is None)
    return linear(part) is not None


def _feeds_products(rows: ir.Value) -> bool:
    """Whether at least two products read pieces of the rows."""
    pieces: list[ir.Value] = []
    for use in rows.uses():
        if use.node.op_type in ("Gather", "GatherND", "Slice", "Split") and use.idx == 0:
            pieces.extend(use.node.outputs)
    products = [use.node for piece in pieces[:8] for use in piece.uses() if use.idx == 0]
    return sum(linear(node.outputs[0]) is not None for node in products) > 1
