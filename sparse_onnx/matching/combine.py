"""The weighted sum over a token's slots, read forwards from the experts' outputs, one row a slot."""

from __future__ import annotations

import dataclasses
import math

import onnx_ir as ir

from sparse_onnx.matching.einsum import two_operands
from sparse_onnx.matching.layout import flat
from sparse_onnx.matching.linear import MICROSOFT
from sparse_onnx.matching.slots import SlotReader, aligned_axes, turns_matrices
from sparse_onnx.matching.values import attribute, axes, is_float, rank, scalar, size

RESHAPES = ("Reshape", "Squeeze", "Unsqueeze", "Flatten", "Identity")


@dataclasses.dataclass(frozen=True)
class Combined:
    """``out[t] = sum_k weight[t K + k] * exit[t K + k]``.

    Attributes:
        exit: rows of the experts, bias included, before any weight.
        weight: one element a slot, in the order of the slots.
        top_k: K; None where nothing is summed.
        output: the result.
        problem: what is odd about the operator that follows where nothing is summed.
    """

    exit: ir.Value
    weight: ir.Value
    top_k: int | None
    output: ir.Value
    problem: str = ""


def next_use(value: ir.Value) -> ir.Node | None:
    """The only node that reads the elements of the value (Shape does not); None where there are others."""
    users = [use.node for use in value.uses() if use.node.op_type != "Shape"]
    return users[0] if len(users) == 1 and not value.is_graph_output() else None


def combined(product: ir.Value, width: int, reader: SlotReader) -> Combined | str:
    """The sum that ends the block, or why there is none.

    Args:
        product: ``[slots, width]`` in any shape with its rows in the order of the slots.
        width: of a row.
        reader: tells whether an Add is a bias.
    """
    at, exit, weight, weighted = product, product, None, product
    problem = "nothing follows"
    while (node := next_use(at)) is not None:
        result = node.outputs[0]
        if node.domain == "" and (node.op_type in (*RESHAPES, "Cast") or _moves_nothing(node, at)):
            if node.op_type == "Cast" and not is_float(attribute(node, "to")):
                return f"they are cast to {ir.DataType(attribute(node, 'to')).name} at '{node.name}'"
        elif node.op_type == "Add" and weight is None and reader.read(result) is not None:
            exit = result
        elif node.op_type == "Mul" and node.domain == "":
            other = node.inputs[1] if node.inputs[0] is at else node.inputs[0]
            if other is at or other is None or (reason := _scales(at, other, width)):
                return (
                    reason if other is not at and other is not None else f"they are squared at '{node.name}'"
                )
            if weight is not None:
                return f"they are multiplied by a second weight at '{node.name}'"
            weight, weighted = flat(other), result
        elif node.op_type == "ReduceSum" and node.domain == "":
            top_k = _sum_of_slots(node, at, width)
            if top_k is not None:
                if weight is None:
                    return f"they are summed without a weight at '{node.name}'"
                return Combined(exit, weight, top_k, result)
            problem = f"'{node.name}' sums over another axis than the slots of a token"
            break
        elif node.op_type in ("MatMul", "FusedMatMul") and weight is None:
            return _by_matmul(node, at, exit, width, turned=False)
        elif node.op_type == "Transpose" and weight is None and turns_matrices(node, at):
            user = next_use(result)
            if user is not None and user.op_type in ("MatMul", "FusedMatMul"):
                return _by_matmul(user, result, exit, width, turned=True)
            problem = f"Transpose '{node.name}' follows"
            break
        elif node.op_type == "Einsum" and node.domain == "":
            found = _by_einsum(at, result, width)
            if isinstance(found, str):
                return found
            if weight is not None:
                return f"they are multiplied by a second weight at '{node.name}'"
            weight, weighted = found[0], result
            if found[1] is not None:
                return Combined(exit, weight, found[1], result)
        else:
            problem = f"{node.op_type} '{node.name}' follows"
            break
        at = result
    else:
        problem = "they are read elsewhere too" if len(at.uses()) > 1 else "they leave the graph"
    if weight is None:
        return f"no routing weight is applied: {problem}"
    return Combined(exit, weight, None, weighted, problem)


def _moves_nothing(node: ir.Node, at: ir.Value) -> bool:
    return node.op_type == "Transpose" and flat(node.outputs[0]) is flat(at)


def _row_axis(value: ir.Value, width: int) -> int | None:
    """The axis along which the rows lie: the last, or one with only ones behind it."""
    for index in range((rank(value) or 0) - 1, -1, -1):
        length = size(value, index)
        if length == width:
            return index
        if length != 1:
            return None
    return None


def _scales(at: ir.Value, other: ir.Value, width: int) -> str:
    """Why a factor is not one number for each slot; empty where it is."""
    where = f"'{other.name}'"
    if scalar(other) is not None:
        return f"they are multiplied by the constant {where} too"
    along = _row_axis(at, width)
    if along is None or other.shape is None or at.shape is None:
        return f"the shape of the weight {where} is not known from the graph"
    if len(other.shape) != len(at.shape) or any(length != 1 for length in other.shape[along:]):
        return f"{where} is not one weight a slot"
    if not aligned_axes(list(at.shape[:along]), list(other.shape[:along])):
        return f"{where} is not one weight a slot: its axes are not those of the slots"
    return ""


def _sum_of_slots(node: ir.Node, value: ir.Value, width: int) -> int | None:
    """K where the sum takes K rows in succession."""
    along, dimensions = axes(node), rank(value)
    if along is None or len(along) != 1 or dimensions is None:
        return None
    at = along[0] % dimensions
    rest = [size(value, index) for index in range(at + 1, dimensions)]
    if None in rest or math.prod(length or 0 for length in rest) != width:
        return None
    return size(value, at)


def _by_matmul(node: ir.Node, at: ir.Value, exit: ir.Value, width: int, turned: bool) -> Combined | str:
    """``weight [.., 1, K] x rows [.., K, D]``, or ``rows [.., K, D]`` turned, times ``weight [.., K, 1]``.

    `turned`: the operand `at` is ``[.., D, K]`` already.
    """
    a, b = node.inputs[0], node.inputs[1]
    plain = f"'{node.name}' is no weighted sum over the slots of a token"
    flags = [bool(attribute(node, name, 0)) for name in ("transA", "transB", "transBatchA", "transBatchB")]
    if a is None or b is None or node.domain not in ("", MICROSOFT) or any(flags[2:]):
        return plain
    if attribute(node, "alpha", 1.0) != 1.0 or a is b:
        return plain
    ahead = b is at
    other, other_turned, flipped = (a, flags[0], flags[1]) if ahead else (b, flags[1], flags[0])
    # As an operand on the right the rows are [K, D] as they lie; on the left they must be turned to [D, K].
    if (turned != flipped) == ahead or rank(at) != rank(other) or (rank(at) or 0) < 3:
        return plain
    one, many = (-1, -2) if ahead == other_turned else (-2, -1)
    top_k = size(at, -1 if turned else -2)
    if (
        size(at, -2 if turned else -1) != width
        or top_k is None
        or size(other, one) != 1
        or size(other, many) != top_k
    ):
        return plain
    assert at.shape is not None and other.shape is not None
    if not aligned_axes(list(at.shape[:-2]), list(other.shape[:-2])):
        return plain
    return Combined(exit, flat(other), top_k, node.outputs[0])


def _by_einsum(at: ir.Value, result: ir.Value, width: int) -> tuple[ir.Value, int | None] | str:
    """The weights, and K where the slots are summed at once; None where the rows are only scaled."""
    for term, rows, other_term, other, kept in two_operands(result):
        if rows is not at or other is at or not term or size(at, -1) != width:
            continue
        if at.shape is None or other.shape is None or other_term != term[:-1]:
            continue
        if not aligned_axes(list(at.shape[:-1]), list(other.shape)):
            continue
        if kept == term:
            return flat(other), None
        top_k = size(at, -2)
        if len(term) > 2 and kept == term[:-2] + term[-1] and top_k is not None and size(other, -1) == top_k:
            return flat(other), top_k
    node = result.producer()
    return f"'{node.name if node else ''}' is no weighted sum over the slots of a token"


def settled(value: ir.Value, width: int, dtype: ir.DataType | None) -> ir.Value:
    """The block's result behind casts back to the tokens' type, and behind reshapes where that makes it ``[T, D]``."""
    best = at = value
    while (node := next_use(at)) is not None and node.domain == "" and node.op_type in (*RESHAPES, "Cast"):
        at = node.outputs[0]
        if at.dtype not in (dtype, best.dtype):
            break
        flatter = rank(best) != 2 and rank(at) == 2 and size(at, -1) == width
        if (best.dtype != dtype and at.dtype == dtype) or (flatter and at.dtype == best.dtype):
            best = at
    return best
