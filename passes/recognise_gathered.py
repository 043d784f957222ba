"""Experts whose matrices are gathered for each slot: transformers' batched experts, gpt-fast.

For ids ``[T, K]``, weights ``[T, K]`` and tokens ``x [T, D]``, over the slots ``s = t K + k``:

    h[s] = act(W1[ids[s]] x[s // K] + b1[ids[s]])        gated or not, W1 packed or one matrix each for gate and up
    y[t] = sum_k weight[t, k] * (W2[ids[t, k]] h[t K + k] + b2[ids[t, k]])

Gathers are Gather or GatherND, products MatMul (either side) or Einsum, the slots one axis or two; a token reaches its
slots by Expand, Tile, a gather of rows or broadcasting; the sum is Mul and ReduceSum, MatMul or Einsum. With K = 1
there may be no sum.

Proved: all matrices and biases are gathered by the same ids; slot s reads token s // K and adds to token s // K;
there is one weight a slot, and as many slots as tokens times K. Ids that may be negative count from the end, as Gather
has it.

Refused: a block of which any of this is not proved, weights that are not constant, expert values used elsewhere.
Enters If, Loop and Scan bodies. Functions were inlined before.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from sparse_onnx.blocks.lowered import FORM_KEY
from sparse_onnx.core.passes import Outcome, Pass
from sparse_onnx.graph.build import Emitter
from sparse_onnx.matching.block import Found, Workshop, commit
from sparse_onnx.matching.combine import Combined, combined, settled
from sparse_onnx.matching.dims import Dims
from sparse_onnx.matching.expert import Expert, read_expert
from sparse_onnx.matching.fan import token_rows
from sparse_onnx.matching.order import bounded
from sparse_onnx.matching.slots import Projection, SlotReader, rows_behind
from sparse_onnx.matching.values import size, tensor

_HINT = "only experts whose matrices are gathered by one and the same index, a row a slot, can be recognised"
_PRODUCTS = ("MatMul", "FusedMatMul", "Einsum")
#: Nodes followed back from a product that could not be read, to the other products of its block.
_DEPTH = 200


@dataclasses.dataclass(frozen=True)
class RecogniseGathered(Pass):
    __doc__ = __doc__
    name: ClassVar[str] = "recognise_gathered"
    summary: ClassVar[str] = "experts whose matrices are gathered for each slot, lifted to the neutral form"

    def call(self, model: ir.Model) -> Outcome:
        shop = Workshop(model, self.name)
        for graph in list(model.graphs()):
            _recognise(graph, shop)
        matched = shop.rewritten + len(shop.refusals)
        return Outcome(model, shop.rewritten > 0, matched, shop.rewritten, tuple(shop.refusals))


def _recognise(graph: ir.Graph | ir.Function, shop: Workshop) -> None:
    """Products from the last to the first: the first one of a block that comes up is its last layer."""
    reader, dims = SlotReader(), Dims()
    products = [
        node
        for node in graph
        if node.op_type in _PRODUCTS
        and FORM_KEY not in node.metadata_props
        and reader.product(node.outputs[0])
    ]
    claimed: set[ir.Node] = set()
    for node in reversed(products):
        if node in claimed or node.graph is None:
            continue
        last = reader.read(node.outputs[0])
        assert last is not None
        end = combined(node.outputs[0], last.outputs, reader)
        expert = read_expert(node.outputs[0] if isinstance(end, str) else end.exit, reader, rows_behind)
        if isinstance(expert, str):
            behind = _products_behind(last, reader)
            claimed.update(item.layer.node for item in behind)
            if _constant([last, *behind]) and behind:
                shop.refuse(
                    f"the experts at '{node.name}' are not two layers and an activation of each element: {expert}",
                    node,
                    _HINT,
                )
            continue
        layers = [reader.found[layer.node] for layer in expert.layers.values()]
        claimed.update(item.layer.node for item in layers)
        if isinstance(end, str):
            shop.refuse(f"the experts' outputs are not summed over the slots of a token: {end}", node, _HINT)
            continue
        block = _block(expert, layers, end, dims)
        if isinstance(block, str):
            shop.refuse(block, node, _HINT)
        else:
            commit(block, shop)


def _constant(layers: Sequence[Projection]) -> bool:
    return all(tensor(item.layer.weight.source) is not None for item in layers)


def _products_behind(last: Projection, reader: SlotReader) -> list[Projection]:
    """The nearest products, gathered by the same index, that the input of a product is computed from."""
    found, seen, work = [], set[ir.Node](), [last.layer.x]
    while work and len(seen) < _DEPTH:
        node = work.pop().producer()
        if node is None or node in seen:
            continue
        seen.add(node)
        product = reader.product(node.outputs[0])
        if product is None:
            work.extend(value for value in node.inputs if value is not None)
        elif product.indices == last.indices[:1]:
            found.append(product)
    return found


def _block(expert: Expert, layers: Sequence[Projection], end: Combined, dims: Dims) -> Found | str:
    """The block, or what is not proved of it."""
    index = layers[0].indices[0]
    for item in layers:
        for what, other in zip(("matrix", "bias"), item.indices, strict=False):
            if other is not index:
                return (
                    f"the {what} of '{item.layer.node.name}' is gathered by index '{other.name}' and the matrix of "
                    f"'{layers[0].layer.node.name}' by '{index.name}': not proved to be of the same expert"
                )
        for stored in (item.layer.weight, item.layer.bias):
            if stored is not None and tensor(stored.source) is None:
                return f"the weights '{stored.source.name}' are not constant: a graph input or computed"
    first, last = layers[:-1], layers[-1]
    if last.fan != 1:
        return f"'{last.layer.node.name}' reads one hidden row for several slots"
    if any(item.fan != first[0].fan for item in first):
        return f"'{first[0].layer.node.name}' and '{first[1].layer.node.name}' read tokens in different ways"
    spread = token_rows(first[0], index, dims)
    if spread is None:
        return f"slot s of '{first[0].layer.node.name}' is not proved to read token s // K, for one number K"
    tokens, top_k = spread
    if end.top_k is None and top_k != 1:
        return f"the slots of a token are not summed: {end.problem}"
    if end.top_k not in (None, top_k):
        return f"a token is repeated {top_k} times, and {end.top_k} slots are summed"
    if not dims.as_many(tokens, None, index, top_k):
        return f"'{index.name}' is not proved to hold {top_k} experts for each row of '{tokens.name}'"
    if not dims.as_many(end.weight, top_k, index, top_k):
        return f"'{end.weight.name}' is not proved to hold one weight for each index of '{index.name}'"
    experts = size(last.layer.weight.source, 0)
    if experts is None or any(size(item.layer.weight.source, 0) != experts for item in layers):
        return "the matrices are not of equally many experts"
    return Found(
        spelling="gathered",
        output=settled(end.output, last.outputs, tokens.dtype),
        tokens=tokens,
        expert_index=index if bounded(index, experts) else functools.partial(_from_the_front, index, experts),
        expert_weight=end.weight,
        top_k=top_k,
        experts=[expert],
    )


def _from_the_front(index: ir.Value, experts: int, emit: Emitter) -> ir.Value:
    """Gather counts a negative index from the end; the neutral form has none. Too large ones failed before too."""
    count = emit.constant(np.asarray(experts, (index.dtype or ir.DataType.INT64).numpy()))
    result = emit.op("Mod", index, count)
    result.shape, result.type = index.shape, index.type
    return result
