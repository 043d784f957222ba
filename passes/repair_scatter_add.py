"""ScatterND with a reduction, where its indices may repeat, becomes ScatterElements, which ORT computes right.

    y = ScatterND(data, indices, updates, reduction)
      = ScatterElements(data, indices along axis 0 for each element of the updates, updates, axis=0, reduction)

ONNX allows repeated indices there, and torch's `index_add` exports to it, but ORT's CPU provider spreads the updates
over its threads unlocked, and loses some (microsoft/onnxruntime#18048): sums are wrong, in some runs, at sizes at which
it uses several threads. So are its products, maxima and minima. Its ScatterElements gives no element to two threads. It
is slower: a few percent of the experts whose rows it adds.

Tuples of several indices become one, that of the place among all rows of the leading axes; those that count from the
end are made to count from the front first. float16 and bfloat16, for which ORT's CPU provider has neither operator, are
reduced in float32.

Left as it is: ScatterND without a reduction, and one whose indices are provably distinct (NonZero's places, Range, a
vector's TopK, a token's rows in one expert, constants), which is only given a type that ORT has. Exact: where ORT does
not lose updates, sums differ at most by the order in which they are added. Enters If, Loop and Scan bodies. Refused:
indices whose last size is not known, and nodes in functions that were not inlined.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import onnx_ir as ir

from sparse_onnx.core.passes import Outcome, Pass
from sparse_onnx.core.report import Refusal
from sparse_onnx.graph.build import Emitter, Namespace
from sparse_onnx.matching.unique import indices_unique
from sparse_onnx.matching.values import attribute, rank, size

_NARROW = frozenset({ir.DataType.FLOAT16, ir.DataType.BFLOAT16})


@dataclasses.dataclass(frozen=True)
class RepairScatterAdd(Pass):
    __doc__ = __doc__
    name: ClassVar[str] = "repair_scatter_add"
    summary: ClassVar[str] = "sums over indices that repeat, in a form that ORT computes right"

    def call(self, model: ir.Model) -> Outcome:
        risky = [
            node for graph in model.graphs() for node in graph if loses_updates(node) or _lacks_kernel(node)
        ]
        in_functions = [
            node
            for function in model.functions.values()
            for node in function.all_nodes()
            if loses_updates(node)
        ]
        refusals = [_refusal(node, "it is in a function that was not inlined") for node in in_functions]
        names = Namespace(model) if risky else None
        rewritten = 0
        for node in risky:
            assert names is not None
            reason = _unknown(node)
            if reason:
                refusals.append(_refusal(node, reason))
            else:
                _rewrite(node, names)
                rewritten += 1
        return Outcome(model, rewritten > 0, len(risky) + len(in_functions), rewritten, tuple(refusals))


def loses_updates(node: ir.Node) -> bool:
    """Whether the node is a ScatterND with a reduction whose indices are not provably distinct."""
    if node.domain or node.op_type != "ScatterND" or attribute(node, "reduction", "none") == "none":
        return False
    data = node.inputs[0]
    if data is not None and data.shape is not None and 0 in data.shape:
        return False
    return not indices_unique(node.inputs[1])


def _lacks_kernel(node: ir.Node) -> bool:
    """Whether ORT's CPU provider cannot run the node for its type, whatever its indices are."""
    if node.domain or node.op_type != "ScatterND" or attribute(node, "reduction", "none") == "none":
        return False
    return node.inputs[0] is not None and node.inputs[0].dtype in _NARROW


def _unknown(node: ir.Node) -> str:
    if None in node.inputs[:3]:
        return "it lacks an input"
    if not loses_updates(node):
        return ""
    return "" if size(node.inputs[1], -1) else "the last size of its indices is not known"


def _rewrite(node: ir.Node, names: Namespace) -> None:
    data, indices, updates = node.inputs[:3]
    assert data is not None and indices is not None and updates is not None
    assert isinstance(node.graph, ir.Graph)
    emit = Emitter(node.graph, names, node.name or "ScatterND", node.metadata_props)
    reduction, data_type = attribute(node, "reduction"), data.dtype
    dimensions, depth = rank(node.inputs[0]), size(indices, -1)
    narrow, distinct = data_type in _NARROW, not loses_updates(node)
    if narrow:
        data, updates = (emit.op("Cast", value, to=ir.DataType.FLOAT) for value in (data, updates))
    if distinct:
        output = emit.op("ScatterND", data, indices, updates, reduction=reduction)
    elif depth == 1 and rank(indices) == 2 and dimensions is not None:
        if dimensions != 2:
            indices = emit.op("Reshape", indices, emit.ints(-1, *[1] * (dimensions - 1)))
        places = emit.op("Expand", indices, emit.op("Shape", updates))
        output = emit.op("ScatterElements", data, places, updates, axis=0, reduction=reduction)
    else:
        assert depth is not None
        output = _as_rows(emit, data, indices, updates, depth, reduction)
    if narrow:
        output = emit.op("Cast", output, to=data_type)
    emit.replace(node, output)


def _as_rows(
    emit: Emitter, data: ir.Value, indices: ir.Value, updates: ir.Value, depth: int, reduction: str
) -> ir.Value:
    """The data as a matrix: a row for each place that the indices can name, its columns what lies there."""
    shape = emit.op("Shape", data)
    leading = emit.op("Shape", data, end=depth)
    rows = emit.op("ReduceProd", leading, keepdims=1)
    columns = emit.op(
        "ReduceProd", emit.op("Concat", emit.ints(1), emit.op("Shape", data, start=depth), axis=0)
    )
    matrix = emit.op("Reshape", data, emit.op("Concat", rows, columns, axis=0), allowzero=1)
    places = emit.op("Reshape", indices, emit.ints(-1, depth))
    if depth > 1:
        backwards = emit.op("Less", places, emit.ints(0))
        places = emit.op("Add", places, emit.op("Where", backwards, leading, emit.ints(0)))
        steps = [emit.ints(1)]  # how many rows one step along each leading axis is, from the last axis on
        for axis in range(depth - 1, 0, -1):
            steps.insert(0, emit.op("Mul", steps[0], emit.op("Shape", data, start=axis, end=axis + 1)))
        step = emit.op("Concat", *steps, axis=0)
        places = emit.op("ReduceSum", emit.op("Mul", places, step), emit.ints(1), keepdims=1)
    count = emit.op("Shape", places, end=1)
    places = emit.op("Expand", places, emit.op("Concat", count, columns, axis=0))
    values = emit.op("Reshape", updates, emit.op("Shape", places), allowzero=1)
    summed = emit.op("ScatterElements", matrix, places, values, axis=0, reduction=reduction)
    return emit.op("Reshape", summed, shape, allowzero=1)


def _refusal(node: ir.Node, reason: str) -> Refusal:
    return Refusal(
        f"ScatterND(reduction={attribute(node, 'reduction')}), whose indices may repeat, stays wrong on ORT: {reason}",
        node.name or node.outputs[0].name or "ScatterND",
        "export the model with static sizes, or run it on one thread",
        RepairScatterAdd.name,
    )
