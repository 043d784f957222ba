"""From a proven match to the neutral node: weights stacked, shapes checked, what it replaces taken out of the graph."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence

import onnx_ir as ir

from sparse_onnx.blocks import ExpertSpec, WeightLayout, attach_functions, make_node
from sparse_onnx.blocks.moe import SPELLING_KEY
from sparse_onnx.core.errors import ModelError
from sparse_onnx.core.passes import Outcome
from sparse_onnx.core.report import Refusal
from sparse_onnx.graph.build import Emitter, Namespace
from sparse_onnx.matching.expert import Expert
from sparse_onnx.matching.layout import rows_of
from sparse_onnx.matching.naming import block_name
from sparse_onnx.matching.stacking import Obstacle, stacked
from sparse_onnx.matching.values import rank, size


@dataclasses.dataclass(frozen=True, eq=False)
class Found:
    """A block that was proved to compute ``sum_k weight[t, k] * expert_{index[t, k]}(token t)``.

    Attributes:
        spelling: how it was written.
        output: ``[..., D_out]``: the value to replace, rows in token order.
        tokens: ``[..., D]``.
        expert_index: ``[..., K]`` integers in [0, E]; E is a dropped slot. Its flattened leading axes are the tokens.
            A function emits nodes that compute it.
        expert_weight: ``[..., K]``.
        top_k: K.
        experts: one of each expert in order, or a single one whose matrices are packed ``[E, ...]``.
        like: ``[..., any]`` with the leading axes that the output has, where the output's rank is not 2; None: its own
            entry has them.
    """

    spelling: str
    output: ir.Value
    tokens: ir.Value
    expert_index: ir.Value | Callable[[Emitter], ir.Value]
    expert_weight: ir.Value
    top_k: int
    experts: Sequence[Expert]
    like: ir.Value | None = None


class Workshop:
    """What a recogniser needs of a model while it rewrites it: free names and the order of nodes."""

    def __init__(self, model: ir.Model, by: str) -> None:
        self.model, self.by = model, by
        self.names = Namespace(model)
        self.refusals: list[Refusal] = []
        self.rewritten = 0
        self._order: dict[ir.Node, int] = {}
        for graph in model.graphs():
            self._order.update({node: at for at, node in enumerate(graph)})

    def refuse(self, reason: str, node: ir.Node | None, hint: str) -> None:
        self.refusals.append(Refusal(reason, (node.name or "") if node is not None else "", hint, self.by))

    def outcome(self, matched: int) -> Outcome:
        """What the recogniser did; the model gets the definitions of the operators that it put in."""
        attach_functions(self.model)
        return Outcome(self.model, self.rewritten > 0, matched, self.rewritten, tuple(self.refusals))

    def position(self, node: ir.Node) -> int:
        """Place of a node in its graph; of one that was put in, that of the node whose place it took."""
        return self._order.get(node, -1)

    def leak(self, starts: Iterable[ir.Node], end: ir.Node) -> ir.Node | None:
        """A node outside that reads what `starts` compute on the way to `end`, or the one whose output leaves the
        graph; None where everything that they compute ends in `end` or nowhere.

        Nodes of subgraphs count as their owner in the graph of `end`.
        """
        last = self.position(end)
        seen: set[ir.Node] = set()
        work = list(starts)
        while work:
            node = work.pop()
            if node is end or node in seen:
                continue
            seen.add(node)
            if node.graph is not end.graph or self.position(node) > last:
                return node
            for output in node.outputs:
                if output.is_graph_output():
                    return node
                work.extend(use.node for use in output.uses())
        return None

    def put(self, anchor: ir.Node, emit: Emitter, after: bool = False) -> None:
        """Puts the emitted nodes before (after) `anchor`, in its place of the order."""
        assert anchor.graph is not None
        at = self.position(anchor)
        self._order.update(dict.fromkeys(emit.nodes, at))
        insert = anchor.graph.insert_after if after else anchor.graph.insert_before
        insert(anchor, emit.nodes)

    def replace(self, old: ir.Value, new: ir.Value) -> None:
        """`new` in place of `old` under its name, and everything that only `old` needed removed."""
        node = old.producer()
        assert node is not None
        new.type = old.type if new.type is None else new.type
        if old.shape is not None:
            new.shape = old.shape
        name = old.name
        ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)
        old.name, new.name = None, name
        remove_dead(node)


def remove_dead(node: ir.Node) -> None:
    """Removes the node and then whatever only it needed."""
    work = [node]
    while work:
        node = work.pop()
        if node.graph is None or any(value.uses() or value.is_graph_output() for value in node.outputs):
            continue
        inputs = [value for value in node.inputs if value is not None]
        if any(
            attribute.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS)
            for attribute in node.attributes.values()
        ):
            continue  # what its bodies read is left to the passes that sweep up
        assert isinstance(node.graph, ir.Graph | ir.Function)
        node.graph.remove(node, safe=True)
        work.extend(producer for value in inputs if (producer := value.producer()) is not None)


def commit(found: Found, shop: Workshop) -> bool:
    """Puts the neutral node of a proven block into the graph; a refusal where its sizes, types or uses forbid it.

    Returns:
        Whether the graph changed.
    """
    anchor = found.output.producer()
    assert anchor is not None and isinstance(anchor.graph, ir.Graph | ir.Function)
    starts = [layer.node for expert in found.experts for layer in expert.layers.values()]
    leaked = shop.leak(starts, anchor)
    if leaked is not None:
        shop.refuse(
            f"a value of an expert is used elsewhere, by or at node '{leaked.name}'",
            leaked,
            "only a block whose inner values nobody else reads can be replaced",
        )
        return False
    problem = _uneven(found)
    if problem:
        shop.refuse(problem, anchor, "every expert must compute the same function, on other weights")
        return False
    name = shop.names.free(block_name([layer.node for layer in _outermost(found)], anchor))
    emit = Emitter(anchor.graph, shop.names, name, {SPELLING_KEY: found.spelling})
    try:
        result = _emitted(found, emit, name, shop)
    except (Obstacle, ModelError) as error:
        emit.withdraw()
        shop.refuse(
            str(error), anchor, getattr(error, "hint", "") or "the weights do not fit together as experts"
        )
        return False
    shop.put(anchor, emit)
    shop.replace(found.output, result)
    shop.rewritten += 1
    return True


def _emitted(found: Found, emit: Emitter, name: str, shop: Workshop) -> ir.Value:
    """The block's result in the shape of the value that it replaces.

    Raises:
        Obstacle: sizes or types that are unknown or do not fit.
        ModelError: weights whose shapes contradict each other.
    """
    first = found.experts[0].kind
    weights, layout = stacked(found.experts, name, emit.graph, shop.names)
    spec = ExpertSpec(first.activation, first.gate_layout, layout, first.limit, first.alpha, first.beta)
    tokens = _as_rows(emit, found.tokens, size(found.tokens, -1) or _inputs(weights, spec))
    chosen = found.expert_index
    index = _as_rows(emit, chosen if isinstance(chosen, ir.Value) else chosen(emit), found.top_k)
    weight = _as_rows(emit, found.expert_weight, found.top_k)
    if index.dtype != ir.DataType.INT64:
        index = emit.op("Cast", index, to=int(ir.DataType.INT64))
    node = make_node(spec, tokens, index, weight, weights, name=name)
    result = node.outputs[0]
    if found.output.dtype is not None and result.dtype is not None and found.output.dtype != result.dtype:
        raise Obstacle(
            f"the block's result is {found.output.dtype.name} and its tokens are {result.dtype.name}: "
            "casts must stand outside of the block"
        )
    node.metadata_props.update(emit.metadata)
    result.name = shop.names.free(f"{name}/output")
    emit.nodes.append(node)
    if rank(found.output) == 2:
        return result
    return emit.op("Reshape", result, _shape_like(emit, found, weights, spec), allowzero=1)


def _outermost(found: Found) -> list:
    picked = (found.experts[0], found.experts[-1]) if len(found.experts) > 1 else (found.experts[0],)
    return [layer for expert in picked for layer in expert.layers.values()]


def _uneven(found: Found) -> str:
    first = found.experts[0]
    for number, expert in enumerate(found.experts):
        if expert.kind != first.kind:
            return (
                f"expert {number} computes {expert.kind.activation.label}, {expert.kind.gate_layout.name.lower()}, "
                f"expert 0 {first.kind.activation.label}, {first.kind.gate_layout.name.lower()}"
            )
    return ""


def _inputs(weights: dict[str, ir.Value], spec: ExpertSpec) -> int | None:
    return size(weights[spec.roles[0]], 2 if spec.weight_layout == WeightLayout.OUT_IN else 1)


def _as_rows(emit: Emitter, value: ir.Value, width: int | None) -> ir.Value:
    """``[..., width]`` as ``[rows, width]``; the value behind its reshapes where that is of rank 2 already."""
    below = rows_of(value)
    for known in (value, below):
        if rank(known) == 2 and (width is None or size(known, 1) == width):
            return known
    if width is None:
        raise Obstacle(f"the width of '{value.name}' is not known from the graph")
    rows = emit.op("Reshape", value, emit.ints(-1, width))
    rows.type, rows.shape = value.type, ir.Shape([None, width])
    return rows


def _shape_like(emit: Emitter, found: Found, weights: dict[str, ir.Value], spec: ExpertSpec) -> ir.Value:
    like = found.tokens if found.like is None else found.like
    dimensions = rank(found.output)
    if dimensions is None or rank(like) != dimensions:
        raise Obstacle(f"the shape of the block's result '{found.output.name}' cannot be rebuilt")
    width = size(weights[f"{spec.roles[-1]}_bias"], 1)
    if size(like, -1) == width:
        return emit.op("Shape", like)
    leading = emit.op("Shape", like, start=0, end=dimensions - 1)
    return emit.op("Concat", leading, emit.ints(width or 0), axis=0)
