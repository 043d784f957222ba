"""Experts of any body run on their own rows only.

For a stack of calls `Y_e = Expert_e(x)` that `sparse_onnx::Combine(index, weight, Y)` sums up:

    rows_e = x[tokens sent to e]                   TopK + GatherND + Split, as in fuse_gating
    y[t]   = sum over k of weight[t, k] * Expert_e(rows_e)[place of slot (t, k)],  e = index[t, k]

`x` may be tokens `[T, D]` or images `[B, C, H, W]`: a row is one part of its first axis. The bodies are written out,
each behind its rows. Several `Combine` of one routing (a module with several outputs) share dispatch and experts.

Operators of which ORT is not known to run on 0 rows (Einsum crashes, GroupNormalization fails) stand in an If that a
cold expert skips. A Reshape with -1 behind the rows fails there too; it gets its sizes as numbers where they are known.
Of a block that is wanted in the form branched, every expert stands in such an If.

Each body is proved again to treat its rows one by one, with the sizes that the graph tells. Refused: one that is not; a
stack of anything but calls on the same rows; results of the experts that others read too; sizes that are not known
where one of the above needs them; numbers of experts that the graph does not tell; opsets below 18; the form branched
for blocks in the body of an If, Loop or Scan whose weights lie outside of it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import ClassVar

import onnx_ir as ir

from sparse_onnx.blocks import CombineBlock, combine_blocks
from sparse_onnx.blocks.dispatch import Dispatch, emit_combine, emit_dispatch, emit_pieces
from sparse_onnx.blocks.lowered import FORM_KEY, NAME_KEY, LoweredBlock, record_lowered
from sparse_onnx.blocks.lowering import strike, wanted
from sparse_onnx.core.passes import Outcome, Pass
from sparse_onnx.core.report import Refusal
from sparse_onnx.graph.build import Emitter, Namespace
from sparse_onnx.matching.block import remove_dead
from sparse_onnx.matching.bodies import typed
from sparse_onnx.matching.body_rows import emit_body, guarded, has_known_sizes, runs_on_no_rows
from sparse_onnx.matching.rowwise import Proof, prove

_GROUPED, _BRANCHED = "grouped", "branched"
_SIZES_HINT = "save the model with its inferred shapes"


@dataclasses.dataclass(frozen=True)
class RouteExperts(Pass):
    __doc__ = __doc__
    name: ClassVar[str] = "route_experts"
    summary: ClassVar[str] = "experts of any body (convolutions, norms, ...) run on their own rows only"

    def call(self, model: ir.Model) -> Outcome:
        names = Namespace(model)
        groups: dict[tuple[int, ...], list[ir.Node]] = {}
        for found in combine_blocks(model):
            key = (id(found.node.graph), id(found.expert_index), *map(id, found.nodes or [found.node]))
            groups.setdefault(key, []).append(found.node)
        refusals, lowered, matched = [], [], 0
        for nodes in groups.values():
            group = [block for node in nodes if (block := CombineBlock.of(node)) is not None]
            forms = next(filter(None, map(_forms, nodes)), [])
            matched += len(group) if forms else 0
            for form in forms:
                try:
                    plan = _plan(group, model, form)
                except _Refused as error:
                    for block in group:
                        reason = f"block '{block.name}': {error}"
                        refusal = Refusal(reason, block.node.name or "", error.hint, self.name)
                        refusals += [refusal] if refusal not in refusals else []
                        strike(block.node, form)
                    continue
                lowered += [LoweredBlock.of(block, form=form) for block in group]
                _rewrite(plan, names)
                for each in plan.functions:
                    for domain, version in each.opset_imports.items():
                        model.opset_imports.setdefault(domain, version)
                break
        record_lowered(model, lowered)
        return Outcome(model, bool(lowered), matched, len(lowered), tuple(refusals))


def _forms(node: ir.Node) -> list[str]:
    """The forms to try, best first; none for a block that is only wanted in other forms."""
    forms = [form.name for form in wanted(node)]
    return [form for form in forms if form in (_GROUPED, _BRANCHED)] if forms else [_GROUPED]


class _Refused(Exception):
    def __init__(self, reason: str, hint: str) -> None:
        super().__init__(reason)
        self.hint = hint


@dataclasses.dataclass(frozen=True)
class _Plan:
    """Blocks with the same experts and routing; body and proof of each expert."""

    form: str
    blocks: Sequence[CombineBlock]
    tokens: ir.Value
    experts: int
    top_k: int
    functions: Sequence[ir.Function]
    proofs: Sequence[Proof]

    def dims(self, block: CombineBlock) -> list[int | None]:
        """Axes of one row of the block's results."""
        at = block.calls[0].index() or 0
        return [size if isinstance(size, int) else None for size in self.proofs[0].outputs[at].dims[1:]]


def _plan(group: Sequence[CombineBlock], model: ir.Model, form: str) -> _Plan:
    opset = model.opset_imports.get("", 0)
    if opset < 18:
        raise _Refused(
            f"opset {opset} has no Split and ScatterElements of the needed kind", "export at opset 18"
        )
    first = group[0]
    nodes = first.nodes
    tokens = first.tokens
    if not first.calls or tokens is None:
        raise _Refused(
            "its experts are not calls on the same rows",
            "stack one call of a function of the domain sparse_onnx for each expert",
        )
    if not first.top_k or not first.experts:
        raise _Refused("the number of experts of a token is not known from the graph", _SIZES_HINT)
    entry = typed(tokens)
    if entry is None:
        raise _Refused(f"type or rank of its rows '{tokens.name}' are not known from the graph", _SIZES_HINT)
    functions, proofs, known = [], [], {}
    for number, node in enumerate(nodes):
        function = model.functions.get(node.op_identifier())
        others = tuple(None if value is None else typed(value) for value in node.inputs[1:])
        if function is None or len(function.inputs) != len(node.inputs) or None in node.inputs:
            raise _Refused(f"expert {number} calls a function that is not there", "export the model again")
        for domain, version in function.opset_imports.items():
            if model.opset_imports.get(domain, version) != version:
                raise _Refused(
                    f"the body of expert {number} is of version {version} of '{domain}', the model of another",
                    "bodies must be written in the operators of the model",
                )
        if (function, others) not in known:
            known[function, others] = prove(function, entry, others)
        proof = known[function, others]
        if not isinstance(proof, Proof):
            what = f"operator {proof.op_type}: {proof.reason}" if proof.op_type else proof.reason
            raise _Refused(
                f"expert {number} is not known to treat its rows one by one: {what}",
                "an expert must compute each row of its result from that row alone",
            )
        if not has_known_sizes(proof) and (form == _BRANCHED or not runs_on_no_rows(proof)):
            why = "is to be skipped" if form == _BRANCHED else "cannot run on 0 rows"
            raise _Refused(
                f"expert {number} {why}, and the sizes of its results are not known from the graph",
                _SIZES_HINT,
            )
        functions.append(function)
        proofs.append(proof)
    if form == _BRANCHED and any(
        _lies_outside(value, first.node) for node in nodes for value in node.inputs[1:]
    ):
        raise _Refused(
            "it stands in the body of an If, Loop or Scan, and its weights outside of it: ORT does not prepack weights "
            "that lie two graphs out",
            "take the form grouped",
        )
    plan = _Plan(form, group, tokens, first.experts, first.top_k, functions, proofs)
    for block in group:
        _check(block, plan)
    return plan


def _lies_outside(value: ir.Value | None, node: ir.Node) -> bool:
    if value is None:
        return False
    holder = value.producer()
    return (value if holder is None else holder).graph is not node.graph


def _check(block: CombineBlock, plan: _Plan) -> None:
    if block.expert_weight.dtype is None:
        raise _Refused("the type of expert_weight is not known from the graph", _SIZES_HINT)
    at = block.calls[0].index() or 0
    if any((value.index() or 0) != at for value in block.calls):
        raise _Refused("it stacks different outputs of its experts", "stack the same output of all experts")
    for number, proof in enumerate(plan.proofs):
        own = [size if isinstance(size, int) else None for size in proof.outputs[at].dims[1:]]
        if own != plan.dims(block) or proof.graph.outputs[at].dtype != block.dtype:
            raise _Refused(f"results of expert {number} have another shape or type", "all must have the same")
    stacks = {node for each in plan.blocks for node in _stacking(each)}
    for value in block.calls:
        other = next(
            (use.node for use in value.uses() if use.node not in stacks and not _is_shape(use.node)), None
        )
        if other is not None or value.is_graph_output():
            where = "leaves the graph" if other is None else f"is used elsewhere, by '{other.name}'"
            raise _Refused(f"the result of an expert for all rows {where}", "nobody else may read it")


def _stacking(block: CombineBlock) -> set[ir.Node]:
    """Nodes between the calls and the `Combine`."""
    found = {block.node}
    work = [block.stack]
    while work:
        node = work.pop().producer()
        if node is None or node in found or node in block.nodes:
            continue
        found.add(node)
        work += [value for value in node.inputs if value is not None]
    return found


def _is_shape(node: ir.Node) -> bool:
    return node.domain == "" and node.op_type == "Shape"


def _rewrite(plan: _Plan, names: Namespace) -> None:
    first = plan.blocks[0]
    graph = first.node.graph
    assert isinstance(graph, ir.Graph)
    emit = _emitter(first, names, plan.form)
    dispatch = emit_dispatch(emit, first.expert_index, plan.experts, plan.top_k)
    pieces = emit_pieces(emit, dispatch, plan.tokens)
    calls = first.nodes
    results: list[Sequence[ir.Value]] = []
    hits: Sequence[ir.Value] | None = None
    for number, (node, proof) in enumerate(zip(calls, plan.proofs, strict=True)):
        weights = [value for value in node.inputs[1:] if value is not None]
        piece = pieces[number]
        if plan.form == _GROUPED and runs_on_no_rows(proof):
            results.append(emit_body(emit, proof, [piece, *weights]))
            continue
        if hits is None:
            hits = _hits(emit, dispatch)
        results.append(guarded(emit, hits[number], proof, [piece, *weights]))
    dropped = pieces[plan.experts] if dispatch.bins > plan.experts else None
    for block in plan.blocks:
        emit = emit if block is first else _emitter(block, names, plan.form)
        at = block.calls[0].index() or 0
        _combine(emit, block, plan, dispatch, [each[at] for each in results], dropped)


def _emitter(block: CombineBlock, names: Namespace, form: str) -> Emitter:
    graph = block.node.graph
    assert isinstance(graph, ir.Graph)
    return Emitter(graph, names, block.name, {NAME_KEY: block.name, FORM_KEY: form})


def _hits(emit: Emitter, dispatch: Dispatch) -> Sequence[ir.Value]:
    """`[1]` for each expert: whether it has rows."""
    hit = emit.op("Greater", dispatch.sizes, emit.ints(0))
    return (
        [hit]
        if dispatch.bins == 1
        else emit.ops("Split", (hit,), dispatch.bins, axis=0, num_outputs=dispatch.bins)
    )


def _combine(
    emit: Emitter,
    block: CombineBlock,
    plan: _Plan,
    dispatch: Dispatch,
    results: Sequence[ir.Value],
    dropped: ir.Value | None,
) -> None:
    dims = plan.dims(block)
    static = [size for size in dims if size is not None]
    flat = results if len(dims) == 1 else [emit.op("Flatten", value, axis=1) for value in results]
    known = len(static) == len(dims)
    width = math.prod(static) if known else emit.op("Shape", flat[0], start=1, end=2)
    shapes = [use.node for value in block.calls for use in value.uses() if _is_shape(use.node)]
    combined = emit_combine(emit, dispatch, flat, block.expert_weight, dropped, width, block.dtype)
    sizes = None
    if shapes:
        front = emit.op("Shape", plan.tokens, start=0, end=1)
        sizes = emit.op("Concat", front, emit.op("Shape", results[0], start=1), axis=0)
    stack = block.stack.producer()
    emit.replace(block.node, combined)
    for node in shapes:
        assert sizes is not None
        _replace_shape(node, sizes, emit)
    if shapes:
        emit.graph.sort()  # such a shape may have stood anywhere behind the calls
    if stack is not None:
        remove_dead(stack)


def _replace_shape(node: ir.Node, sizes: ir.Value, emit: Emitter) -> None:
    """The shape of a result for all rows, which nobody computes any more."""
    start, end = (node.attributes.get(name) for name in ("start", "end"))
    attributes = {name: item.as_int() for name, item in (("start", start), ("end", end)) if item is not None}
    inner = Emitter(emit.graph, emit.names, emit.prefix, emit.metadata)
    first = attributes.get("start", 0)
    last = attributes.get("end", 2**62)
    result = inner.op("Slice", sizes, inner.ints(first), inner.ints(last), inner.ints(0))
    inner.replace(node, result)
