"""Experts of any body: each becomes a call of a function, their results a stack, and the sum a `Combine`.

    y[t] = sum over k of weight[t, k] * f_{index[t, k]}(x[t])
    Y    = Concat(Unsqueeze(f_e(x, weights of e), 0) for each e)        y = Combine(index, weight, Y)

The routing is the recogniser's to prove. Proved here, for the body of each expert: it reads rows by its entry only;
what it computes is read nowhere else; and each row of its results depends on that row of its entry alone, so that
running it on some rows gives what running it on all gives there (`rowwise`).
"""

from __future__ import annotations

import dataclasses
import heapq
import math
from collections.abc import Iterable, Sequence

import onnx_ir as ir

from sparse_onnx.blocks.combine import make_combine
from sparse_onnx.blocks.lowered import NAME_KEY
from sparse_onnx.blocks.spec import DOMAIN, DOMAIN_VERSION
from sparse_onnx.graph.build import Emitter
from sparse_onnx.matching.block import Workshop
from sparse_onnx.matching.bodies import Refused, Region, Shared, dependent, functions, region
from sparse_onnx.matching.naming import block_name
from sparse_onnx.matching.row_kinds import Dims
from sparse_onnx.matching.rowwise import Counterexample, Proof, Typed, prove
from sparse_onnx.matching.values import rank, tensor

_ROWS_HINT = "an expert must compute each token's result from that token alone"


@dataclasses.dataclass(frozen=True, eq=False)
class Body:
    """One expert: results `exits` (one, or those of a module with several) computed from the rows `entry`.

    `entry` is the tokens themselves, or the rows of them that were gathered for this expert; an exit has one part for
    each row of it, on the same axes.
    """

    entry: ir.Value
    exits: tuple[ir.Value, ...]


@dataclasses.dataclass(frozen=True, eq=False)
class FoundBodies:
    """A block whose routing was proved, with experts of any body.

    Attributes:
        spelling: how it was written.
        outputs: the values to replace, one an exit: ``[leading axes of tokens, other axes of that exit]``.
        tokens: ``[..., any]``.
        expert_index: ``[..., K]`` integers in [0, E]; E is a dropped slot. Its flattened leading axes are the tokens.
        expert_weight: ``[..., K]``.
        top_k: K.
        bodies: the experts in order.
        leading: axes of `tokens`, and of every entry and exit, that count tokens: 1 for ``[T, D]`` and images
            ``[B, C, H, W]``, 2 for ``[B, S, D]``.
    """

    spelling: str
    outputs: tuple[ir.Value, ...]
    tokens: ir.Value
    expert_index: ir.Value
    expert_weight: ir.Value
    top_k: int
    bodies: Sequence[Body]
    leading: int = 1


def outline(found: FoundBodies, shop: Workshop) -> bool:
    """Puts calls and `Combine` into the graph; a refusal where something is not proved, and the graph as it was.

    Returns:
        Whether the graph changed.
    """
    try:
        _outline(found, shop)
    except Refused as error:
        shop.refuse(str(error), error.node, error.hint)
        return False
    shop.rewritten += 1
    return True


def shared_entry(exits: Sequence[ir.Value], shop: Workshop) -> ir.Value | None:
    """The nearest value through which alone all exits depend on anything but constants; None where there is none.

    It is the entry of experts that all run on all tokens. Two exits or more, in one graph.
    """
    producers = [value.producer() for value in exits]
    if len(exits) < 2 or producers[0] is None:
        return None
    graph, whole = producers[0].graph, (1 << len(exits)) - 1
    masks: dict[ir.Value, int] = {}
    heap: list[tuple[int, int, ir.Node]] = []
    waiting: set[ir.Node] = set()

    def add(value: ir.Value, mask: int) -> None:
        masks[value] = masks.get(value, 0) | mask
        node = value.producer()
        if node is not None and node.graph is graph and node not in waiting:
            waiting.add(node)
            heapq.heappush(heap, (-shop.position(node), -len(waiting), node))

    for number, value in enumerate(exits):
        add(value, 1 << number)
    while len(masks) > 1 or next(iter(masks.values())) != whole:
        if not heap:
            return None
        node = heapq.heappop(heap)[2]
        mask = 0
        for value in node.outputs:
            mask |= masks.pop(value, 0)
        for source in node.inputs:
            if source is not None and tensor(source) is None:
                add(source, mask)
        if not masks or any(item.type == ir.AttributeType.GRAPH for item in node.attributes.values()):
            return None
    return next(iter(masks))


def _outline(found: FoundBodies, shop: Workshop) -> None:
    producers = [value.producer() for value in found.outputs]
    anchors = [node for node in producers if node is not None]
    assert len(anchors) == len(producers) and len({node.graph for node in anchors}) == 1
    anchor = min(anchors, key=shop.position)
    graph = anchor.graph
    assert isinstance(graph, ir.Graph | ir.Function)
    entry = _entry(found, anchor)
    entries = {body.entry for body in found.bodies}
    inside = dependent((value for body in found.bodies for value in body.exits), entries)
    regions = []
    for at, body in enumerate(found.bodies):
        entries.discard(body.entry)
        regions.append(region(body.entry, body.exits, inside, entries, at))
        entries.add(body.entry)
    _check_leaks(regions, anchors, shop)
    shared = functions(regions, shop.model.opset_imports)
    proofs = [_proof(each, entry, found.leading) for each in shared]
    _check_alike(found, shared, proofs, anchor)
    _check_order(found, regions, anchor, shop)

    name = shop.names.free(block_name([node for each in regions for node in each.nodes[:1]], anchor))
    emit = Emitter(graph, shop.names, name)
    rows = _rows(emit, found)
    of = {number: pair for pair in zip(shared, proofs, strict=True) for number in pair[0].weights}
    calls: list[Sequence[ir.Value]] = []
    for number in range(len(found.bodies)):
        each, proof = of[number]
        shop.model.functions.setdefault(each.function.identifier(), each.function)
        inputs = (rows, *each.weights[number])
        results = emit.ops(each.function.name, inputs, len(proof.outputs), domain=DOMAIN)
        for value, inferred in zip(results, proof.graph.outputs, strict=True):
            value.type = inferred.type
        calls.append(results)
    index = _routing(emit, found.expert_index, found.top_k)
    if index.dtype != ir.DataType.INT64:
        index = emit.op("Cast", index, to=int(ir.DataType.INT64))
        index.type = ir.TensorType(ir.DataType.INT64)
    weight = _routing(emit, found.expert_weight, found.top_k)
    combined = []
    for at in range(len(found.outputs)):
        label = name if at == 0 else shop.names.free(f"{name}.{at}")
        results = [each[at] for each in calls]
        combined.append(_combined(emit, found, results, proofs[0], at, index, weight, label))
    shop.model.graph.opset_imports.setdefault(DOMAIN, DOMAIN_VERSION)
    shop.put(anchor, emit)
    for old, new in zip(found.outputs, combined, strict=True):
        shop.replace(old, new)


def _entry(found: FoundBodies, anchor: ir.Node) -> Typed:
    """Type of the tokens, which that of every entry must agree with."""
    kind = Typed.of(found.tokens)
    if kind is None:
        hint = "save the model with its inferred shapes"
        raise Refused(f"the rank of the tokens '{found.tokens.name}' is not known", anchor, hint)
    dims = list(kind.dims)
    for number, body in enumerate(found.bodies):
        own = Typed.of(body.entry)
        if own is None or len(own.dims) != len(dims) or own.dtype != kind.dtype:
            reason = f"the rows of expert {number} do not have the rank and type of the tokens '{found.tokens.name}'"
            raise Refused(reason, anchor, "every expert must read tokens as they are")
        for at in range(found.leading, len(dims)):
            dims[at] = own.dims[at] if dims[at] is None else dims[at]
    return Typed(kind.dtype, tuple(dims))


def _check_leaks(regions: Sequence[Region], ends: Sequence[ir.Node], shop: Workshop) -> None:
    """An expert's values must end in the sum. What several experts compute alike, and shapes, others may read."""
    count: dict[ir.Node, int] = {}
    for each in regions:
        for node in each.nodes:
            count[node] = count.get(node, 0) + 1
    work = [node for node, times in count.items() if times == 1 and node.op_type not in ("Shape", "Size")]
    last = max(shop.position(node) for node in ends)
    hint = "only a block whose inner values nobody else reads can be replaced"
    seen = set(ends)
    while work:
        node = work.pop()
        if node in seen:
            continue
        seen.add(node)
        if node.graph is not ends[0].graph or shop.position(node) > last:
            raise Refused(f"a value of an expert is used elsewhere, at node '{node.name}'", node, hint)
        for output in node.outputs:
            if output.is_graph_output():
                raise Refused(f"a value of an expert, '{output.name}', leaves the graph", node, hint)
            work.extend(use.node for use in output.uses())


def _proof(shared: Shared, entry: Typed, lead: int) -> Proof:
    proof = prove(shared.function, entry, shared.types, lead=lead)
    if isinstance(proof, Proof):
        return proof
    number = min(shared.weights)
    raise Refused(
        f"expert {number} is not known to treat its tokens one by one: {_where(proof)}",
        _node_of(proof, shared),
        _ROWS_HINT,
    )


def _where(found: Counterexample) -> str:
    return f"operator {found.op_type}: {found.reason}" if found.op_type else found.reason


def _node_of(found: Counterexample, shared: Shared) -> ir.Node | None:
    """The node of the example's region: the function holds constants before them."""
    constants = len(list(shared.function)) - len(shared.example.nodes)
    at = found.index - constants if constants >= 0 else -1
    return shared.example.nodes[at] if 0 <= at < len(shared.example.nodes) else None


def _check_alike(
    found: FoundBodies, shared: Sequence[Shared], proofs: Sequence[Proof], anchor: ir.Node
) -> None:
    """All experts must give results of one type and shape, that of the value to replace."""
    hint = "the results of all experts must have the same shape and type"
    for at, output in enumerate(found.outputs):
        types = {proof.graph.outputs[at].dtype for proof in proofs}
        shapes = {_told(proof.outputs[at].dims[found.leading :]) for proof in proofs}
        if len(types) > 1 or len(shapes) > 1:
            raise Refused(
                f"the results of the experts differ in shape or type: {_listed(shapes, types)}", anchor, hint
            )
        dtype = types.pop()
        if dtype is None or output.dtype not in (None, dtype):
            reason = f"the type of the block's result '{output.name}' is not that of its experts"
            raise Refused(reason, anchor, "casts must stand outside of the block")
        dimensions = len(proofs[0].outputs[at].dims)
        if rank(output) not in (None, dimensions):
            reason = (
                f"the result '{output.name}' has {rank(output)} axes, those of its experts have {dimensions}"
            )
            raise Refused(reason, anchor, "the sum must have the shape of an expert's result")


def _told(dims: Dims) -> tuple[int | None, ...]:
    return tuple(size if isinstance(size, int) else None for size in dims)


def _listed(shapes: Iterable[object], types: Iterable[ir.DataType | None]) -> str:
    names = sorted({"unknown" if each is None else each.name for each in types})
    return f"{', '.join(sorted(map(str, shapes)))} of {', '.join(names)}"


def _check_order(found: FoundBodies, regions: Sequence[Region], anchor: ir.Node, shop: Workshop) -> None:
    """What the calls read must be there where the first sum stands."""
    read = [
        found.tokens,
        found.expert_index,
        found.expert_weight,
        *(v for each in regions for v in each.outside),
    ]
    for value in read:
        node = value.producer()
        # Another node at the anchor's own place was put in before it.
        behind = node is anchor or (node is not None and shop.position(node) > shop.position(anchor))
        if node is not None and node.graph is anchor.graph and behind:
            hint = "the order of the nodes must allow to compute all results together"
            raise Refused(f"'{value.name}' is computed only behind a result of the block", anchor, hint)


def _rows(emit: Emitter, found: FoundBodies) -> ir.Value:
    """Tokens with all rows on the first axis: ``[T, 1, ..., rest]`` of the same rank."""
    tokens = found.tokens
    if found.leading == 1:
        return tokens
    assert tokens.shape is not None
    front = emit.ints(-1, *[1] * (found.leading - 1))
    rest = list(tokens.shape)[found.leading :]
    if all(isinstance(size, int) for size in rest):
        sizes = [size for size in rest if isinstance(size, int)]
        target = emit.ints(-1, *[1] * (found.leading - 1), *sizes)
    else:
        target = emit.op("Concat", front, emit.op("Shape", tokens, start=found.leading), axis=0)
    rows = emit.op("Reshape", tokens, target)
    rows.type, rows.shape = tokens.type, ir.Shape([None, *[1] * (found.leading - 1), *rest])
    return rows


def _routing(emit: Emitter, value: ir.Value, top_k: int) -> ir.Value:
    """``[..., K]`` as ``[T, K]``."""
    if rank(value) == 2:
        return value
    flat = emit.op("Reshape", value, emit.ints(-1, top_k))
    flat.type, flat.shape = value.type, ir.Shape([None, top_k])
    return flat


def _combined(
    emit: Emitter,
    found: FoundBodies,
    results: Sequence[ir.Value],
    proof: Proof,
    at: int,
    index: ir.Value,
    weight: ir.Value,
    name: str,
) -> ir.Value:
    """The stack of the experts' results, combined, in the shape of the value to replace."""
    told = _told(proof.outputs[at].dims[found.leading :])
    static = [size for size in told if size is not None]
    width = math.prod(static) if len(static) == len(told) else None
    plain = found.leading == 1 and len(told) == 1
    parts = []
    for value in results:
        flat = value if plain else emit.op("Flatten", value, axis=1)
        parts.append(emit.op("Unsqueeze", flat, emit.ints(0)))
    stack = emit.op("Concat", *parts, axis=0)
    stack.type, stack.shape = results[0].type, ir.Shape([len(results), None, width])
    node = make_combine(index, weight, stack, name=name, spelling=found.spelling)
    node.outputs[0].name = emit.names.free(f"{name}/output")
    node.metadata_props[NAME_KEY] = name
    emit.nodes.append(node)
    if plain:
        return node.outputs[0]
    if found.leading == 1 and len(static) == len(told) and 0 not in static:
        shape = emit.ints(-1, *static)
    else:
        front = emit.op("Shape", found.tokens, start=0, end=found.leading)
        if len(static) == len(told):
            rest = emit.ints(*static)
        else:
            rest = emit.op("Shape", results[0], start=found.leading)
        shape = emit.op("Concat", front, rest, axis=0)
    return emit.op("Reshape", node.outputs[0], shape, allowzero=1)
