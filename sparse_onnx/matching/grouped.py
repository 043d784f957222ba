"""Where experts on sorted rows begin and end: what a permutation is used for, and how rows return to their tokens."""

from __future__ import annotations

import dataclasses

import onnx_ir as ir

from sparse_onnx.matching.dims import Dims
from sparse_onnx.matching.integers import quotient
from sparse_onnx.matching.layout import flat, gathered, rows_of
from sparse_onnx.matching.order import Order, constant_fill, inverse_of, one_each, order_of
from sparse_onnx.matching.values import attribute, axis, pairs, producer, rank, size

LAYOUT = frozenset(("Reshape", "Squeeze", "Unsqueeze", "Flatten", "Identity"))
#: What indices pass through on their way to a gather or scatter.
_ARITHMETIC = LAYOUT | {
    *("Abs", "Add", "And", "BitShift", "Cast", "Ceil", "Clip", "Div", "Equal", "Expand", "Floor", "Greater"),
    *("GreaterOrEqual", "Less", "LessOrEqual", "Mod", "Mul", "Neg", "Not", "Or", "Sign", "Sub", "Where"),
}
_MOST = 500
_REAL = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.FLOAT, ir.DataType.DOUBLE)


class Mismatch(Exception):
    """What keeps a graph that looks like sorted experts from being proved to be one."""

    def __init__(self, reason: str, node: ir.Node | None) -> None:
        super().__init__(reason)
        self.node = node


@dataclasses.dataclass(frozen=True)
class Exit:
    """Rows on their way back from the sorted order.

    Attributes:
        node: the gather or scatter.
        rows: ``[S, D]`` sorted.
        result: the rows of slots in their order ``[S, D]``, or of tokens ``[T, D]`` where `top_k` is not None.
        top_k: slots that are added to each row of the result, as the scatter's index says.
        problem: what keeps this from being a way back.
    """

    node: ir.Node
    rows: ir.Value
    result: ir.Value
    top_k: int | None = None
    problem: str = ""


@dataclasses.dataclass
class Exits:
    """What the permutation of an order is used for: ways back, and gathers of rows in sorted order."""

    back: list[Exit] = dataclasses.field(default_factory=list)
    gathers: list[ir.Node] = dataclasses.field(default_factory=list)


def exits(order: Order, dims: Dims) -> Exits:
    found = Exits()
    work, seen = [order.permutation], set[int]()
    done: set[ir.Node] = set()
    while work and len(seen) < _MOST:
        value = work.pop(0)
        if id(value) in seen:
            continue
        seen.add(id(value))
        for use in value.uses():
            node = use.node
            if node.graph is not order.node.graph or node.domain != "" or node in done:
                continue
            if node.op_type in _ARITHMETIC:
                work.append(node.outputs[0])
                continue
            done.add(node)
            if node.op_type in ("Gather", "GatherND") and use.idx == 1:
                _gather(node, order, found, dims)
            elif node.op_type in ("ScatterND", "ScatterElements") and use.idx == 1:
                if inverse_of(node.outputs[0], dims) is order.permutation:
                    work.append(node.outputs[0])
                else:
                    way = _scatter(node, order)
                    found.back.extend([way] if way is not None else [])
            elif node.op_type == "TopK" and use.idx == 0 and order_of(node, dims) is not None:
                work.append(node.outputs[1])
    return found


def _gather(node: ir.Node, order: Order, found: Exits, dims: Dims) -> None:
    read = gathered(node.outputs[0])
    if read is None:
        return
    if inverse_of(read[1], dims) is order.permutation:
        found.back.append(Exit(node, read[0], node.outputs[0]))
    elif (rank(read[0]) or 0) > 1:
        found.gathers.append(node)


def _scatter(node: ir.Node, order: Order) -> Exit | None:
    data, indices, rows = node.inputs[:3]
    if data is None or indices is None or rows is None:
        return None
    if node.op_type == "ScatterElements":
        spread = producer(indices, "Expand", "Tile")
        column = None if spread is None else spread.inputs[0]
        if axis(node, 0) != 0 or column is None or rank(column) != 2 or size(column, 1) != 1:
            return None
        indices = column  # as wide as the rows, since a scatter's indices and updates have one shape
    elif size(indices, -1) != 1:
        return None
    top_k = quotient(indices, order.permutation)
    reduction = attribute(node, "reduction", "none")
    if top_k is None or (reduction == "none" and top_k != 1) or reduction not in ("none", "add"):
        return None
    problem = ""
    if reduction == "add" and not constant_fill(data, 0):
        problem = f"rows are added to '{data.name}', which is not proved to be all zeros"
    return Exit(node, rows, node.outputs[0], top_k, problem)


def sorted_weight(rows: ir.Value, order: Order) -> tuple[ir.Value, ir.Value | None]:
    """(rows without their weights, the weights ``[T, K]`` in any shape): looks through casts and one product."""
    weight: ir.Value | None = None
    while True:
        rows = rows_of(rows)
        node = producer(rows, "Mul", "Cast", "Expand")
        if node is None or node.inputs[0] is None:
            return rows, weight
        if node.op_type == "Cast" and not keeps_real(node):
            return rows, weight
        if node.op_type == "Expand" and (
            size(node.inputs[0], -1) != size(rows, -1) or rank(node.inputs[0]) != rank(rows)
        ):
            return rows, weight
        if node.op_type != "Mul":  # torch's index_put expands rows to the shape that they have
            rows = node.inputs[0]
            continue
        for other, factor in pairs(node):
            # With more axes than two, each row might be multiplied with the weights of all.
            if rank(factor) != 2 or rank(other) not in (2, None):
                continue
            picked = _in_sorted_order(factor, order)
            if picked is not None and weight is None:
                rows, weight = other, picked
                break
        else:
            return rows, weight


def _in_sorted_order(value: ir.Value, order: Order) -> ir.Value | None:
    """The values of slots that were gathered by the permutation, one for each row."""
    if size(value, -1) != 1:
        return None
    read = gathered(behind_casts(value))
    if read is None or flat(read[1]) is not order.permutation or not one_each(read[0]):
        return None
    return behind_casts(read[0])


def keeps_real(cast: ir.Node) -> bool:
    """Whether a Cast goes from one type of real numbers to another, and so only rounds."""
    source = cast.inputs[0]
    return (
        source is not None
        and source.dtype in _REAL
        and attribute(cast, "to") in [int(item) for item in _REAL]
    )


def behind_casts(value: ir.Value) -> ir.Value:
    value = flat(value)
    while (node := producer(value, "Cast")) is not None and node.inputs[0] is not None and keeps_real(node):
        value = flat(node.inputs[0])
    return value
