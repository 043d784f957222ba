"""A proven loop over experts taken out of the graph, and the neutral node put in."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from sparse_onnx.graph.build import Emitter
from sparse_onnx.matching.accumulate import Total
from sparse_onnx.matching.block import Found, Workshop, commit, remove_dead
from sparse_onnx.matching.choice import Index
from sparse_onnx.matching.expert_loop import Experts, proved
from sparse_onnx.matching.hit_weights import Unproven
from sparse_onnx.matching.hits import HitReader
from sparse_onnx.matching.outline import Body, FoundBodies, outline
from sparse_onnx.matching.values import rank, size

SPELLING = "per-expert-loop"
_ROUTING = (
    "a loop over experts is lifted where rows, weights and results belong to the same slots of one routing"
)


def lift(total: Total, reader: HitReader, shop: Workshop) -> bool:
    """Puts the neutral node in place of a sum that is one; else a refusal."""
    try:
        experts = proved(total, reader)
    except Unproven as reason:
        shop.refuse(str(reason), total.value.producer(), reason.hint or _ROUTING)
        return False
    return _commit(experts, shop)


def _commit(experts: Experts, shop: Workshop) -> bool:
    """Puts the block in; nothing is left behind where that is refused."""
    anchor = experts.output.producer()
    assert anchor is not None and anchor.graph is not None and experts.index.top_k is not None
    graph = anchor.graph
    assert isinstance(graph, ir.Graph)
    emit = Emitter(graph, shop.names, anchor.name or "experts")
    index = _guarded(emit, experts.index, len(experts.bodies))
    weight = _weights(emit, experts, index)
    shop.put(anchor, emit)
    added = _set_apart(experts, shop)
    if _replaced(experts, index, weight, shop):
        return True
    if added is not None:
        _undo(experts.output, added)
    emit.withdraw()
    return False


def _replaced(experts: Experts, index: ir.Value, weight: ir.Value, shop: Workshop) -> bool:
    """A neutral node for experts of two layers that compute the same; calls of outlined functions for others."""
    top_k = experts.index.top_k
    assert top_k is not None
    known = [body for body in experts.bodies if not isinstance(body, str)]
    if len(known) == len(experts.bodies) and len({body.kind for body in known}) == 1:
        like = None if rank(experts.tokens) == rank(experts.output) else experts.base
        return commit(
            Found(SPELLING, experts.output, experts.tokens, index, weight, top_k, known, like), shop
        )
    node = experts.output.producer()
    width = size(experts.tokens, -1)
    if node is None or rank(experts.output) != 2 or (rank(experts.tokens) != 2 and width is None):
        shop.refuse(
            f"experts that are not of two layers are added up in '{experts.output.name}', which is no list of rows",
            node,
            "flatten the tokens into one axis before the loop",
        )
        return False
    tokens = _rows(experts.tokens, width or 0, node, shop)
    bodies = [Body(entry, (exit,)) for entry, exit in zip(experts.entries, experts.exits, strict=True)]
    if outline(FoundBodies(SPELLING, (experts.output,), tokens, index, weight, top_k, bodies), shop):
        return True
    if tokens is not experts.tokens and (made := tokens.producer()) is not None:
        remove_dead(made)
    return False


def _rows(tokens: ir.Value, width: int, anchor: ir.Node, shop: Workshop) -> ir.Value:
    """Tokens as ``[T, D]``."""
    if rank(tokens) == 2:
        return tokens
    assert isinstance(anchor.graph, ir.Graph)
    emit = Emitter(anchor.graph, shop.names, anchor.name or "experts")
    rows = _shaped(emit, tokens, width)
    shop.put(anchor, emit)
    return rows


def _shaped(emit: Emitter, value: ir.Value, width: int) -> ir.Value:
    """``[rows, width]``."""
    if rank(value) == 2 and size(value, -1) == width:
        return value
    rows = emit.op("Reshape", value, emit.ints(-1, width))
    rows.type, rows.shape = value.type, ir.Shape([None, width])
    return rows


def _guarded(emit: Emitter, index: Index, experts: int) -> ir.Value:
    """Indices with E for what is none of the experts."""
    value = index.value
    if index.experts is not None and index.experts <= experts:
        return value
    if value.dtype != ir.DataType.INT64:
        value = emit.op("Cast", value, to=int(ir.DataType.INT64))
    below = emit.op("Less", value, emit.constant(np.asarray(experts, np.int64)))
    above = emit.op("GreaterOrEqual", value, emit.constant(np.asarray(0, np.int64)))
    dropped = emit.constant(np.asarray(experts, np.int64))
    result = emit.op("Where", emit.op("And", above, below), value, dropped)
    result.type, result.shape = ir.TensorType(ir.DataType.INT64), index.value.shape
    return result


def _weights(emit: Emitter, experts: Experts, index: ir.Value) -> ir.Value:
    """``[..., K]``: routing weights as one value."""
    found, top_k = experts.weight, experts.index.top_k
    assert top_k is not None
    if found is None:
        dtype = experts.output.dtype or ir.DataType.FLOAT
        shape = emit.op("Shape", _shaped(emit, index, top_k))
        result = emit.op("Expand", emit.scalar(1.0, dtype), shape)
        result.dtype, result.shape = dtype, ir.Shape([None, top_k])
        return result
    if not found.dense:
        return _shaped(emit, found.value, top_k)
    assert experts.index.experts is not None
    rows = _shaped(emit, found.value, experts.index.experts)
    result = emit.op("GatherElements", rows, _shaped(emit, index, top_k), axis=1)
    result.type, result.shape = found.value.type, ir.Shape([None, top_k])
    return result


def _set_apart(experts: Experts, shop: Workshop) -> ir.Value | None:
    """Adds the addends once more behind the sum, for the block that takes its place has none of them."""
    if not experts.addends:
        return None
    node = experts.output.producer()
    assert node is not None and isinstance(node.graph, ir.Graph | ir.Function)
    emit = Emitter(node.graph, shop.names, node.name or "experts")  # type: ignore[arg-type]
    value = experts.output
    for addend in experts.addends:
        value = emit.op("Add", value, addend)
        value.shape, value.type = experts.output.shape, experts.output.type
    _swap(experts.output, value, keep=emit.nodes[0])
    node.graph.insert_after(node, emit.nodes)
    return value


def _swap(old: ir.Value, new: ir.Value, keep: ir.Node | None) -> None:
    """Readers of `old`, but for `keep`, read `new`, which takes its name."""
    graph = old.producer().graph  # type: ignore[union-attr]
    for use in list(old.uses()):
        if use.node is not keep:
            use.node.replace_input_with(use.idx, new)
    if graph is not None:
        for at, output in enumerate(graph.outputs):
            if output is old:
                graph.outputs[at] = new
    old_name, new_name = old.name, new.name
    old.name = new.name = None
    old.name, new.name = new_name, old_name


def _undo(output: ir.Value, added: ir.Value) -> None:
    _swap(added, output, keep=None)
    node = added.producer()
    assert node is not None
    remove_dead(node)
