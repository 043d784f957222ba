"""Places where ONNX Runtime gives wrong answers although the model is right.

ScatterND(reduction="add") with indices that repeat: ORT's CPU provider adds on several threads, unlocked,
and loses updates (microsoft/onnxruntime#18048). The ONNX standard allows repeated indices there, and torch's
`index_add` exports to it. So it is a hazard wherever the indices are not provably distinct.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx_ir as ir

from sparse_onnx.inspect.router import source

#: Constant indices above this many elements are not read to be compared.
_LARGEST_CONSTANT = 1 << 20


def hazards(model: ir.Model) -> list[str]:
    """A line for each hazard: the node, and what happens."""
    risky = [
        f"{name}{where}"
        for where, node in _nodes(model)
        for name in [node.name or node.outputs[0].name or "ScatterND"]
        if _adds(node) and not _rows_distinct(node.inputs[1])
    ]
    if not risky:
        return []
    shown = ", ".join(risky[:3]) + (f" and {len(risky) - 3} more" if len(risky) > 3 else "")
    return [
        f"ScatterND(reduction=add) whose indices may repeat: {shown}. ONNX Runtime's CPU provider loses "
        "updates there when it runs on several threads (onnxruntime#18048)"
    ]


def _nodes(model: ir.Model) -> Iterator[tuple[str, ir.Node]]:
    for node in model.graph.all_nodes():
        yield "", node
    for function in model.functions.values():
        for node in function.all_nodes():
            yield f" in function {function.domain}::{function.name}", node


def _adds(node: ir.Node) -> bool:
    reduction = node.attributes.get("reduction")
    return (
        node.domain == ""
        and node.op_type == "ScatterND"
        and reduction is not None
        and _text(reduction) == "add"
    )


def _text(attribute: ir.Attr) -> str:
    return "" if attribute.is_ref() else attribute.as_string()


def _rows_distinct(indices: ir.Value | None) -> bool:
    """Whether the index tuples along the last axis of `indices` are provably all different."""
    if indices is None:
        return False
    constant = ir.convenience.get_const_tensor(indices)
    if constant is not None:
        if constant.size > _LARGEST_CONSTANT or not constant.shape:
            return False
        rows = constant.numpy().reshape(-1, constant.numpy().shape[-1])
        return len(np.unique(rows, axis=0)) == len(rows)
    transposed = _produced_by(indices, "Transpose")
    if transposed is not None:
        return _produced_by(transposed.inputs[0], "NonZero") is not None
    return _values_distinct(source(indices))


def _values_distinct(vector: ir.Value | None) -> bool:
    """Whether a vector of indices is provably without repeats."""
    node = None if vector is None else vector.producer()
    if node is None or node.domain != "":
        return False
    if node.op_type == "Range":
        return True
    if node.op_type == "TopK":  # positions along the sorted axis: of a vector, all different
        scores = node.inputs[0]
        is_vector = scores is not None and scores.shape is not None and len(scores.shape) == 1
        return vector is node.outputs[1] and is_vector
    if _is_first_row(vector, node):
        places = _produced_by(node.inputs[0], "NonZero")
        return places is not None and _one_true_a_row(places.inputs[0])
    return False


def _is_first_row(row: ir.Value | None, node: ir.Node) -> bool:
    """Whether the node takes row 0 of its first input: of NonZero's places in a `[T, K]` mask, the tokens."""
    if "axis" in node.attributes and node.attributes["axis"].as_int() != 0:
        return False
    if node.op_type == "Split":
        return row is node.outputs[0]
    if node.op_type == "Gather" and node.inputs[1] is not None:
        which = ir.convenience.get_const_tensor(node.inputs[1])
        return which is not None and which.size == 1 and int(which.numpy().reshape(())) == 0
    return False


def _one_true_a_row(mask: ir.Value | None) -> bool:
    """`Equal(TopK's indices, one expert)`: TopK never chooses a position twice, so a token appears once."""
    equal = _produced_by(mask, "Equal")
    if equal is None:
        return False
    for chosen, expert in (tuple(equal.inputs), tuple(reversed(equal.inputs))):
        choice = _produced_by(chosen, "TopK")
        constant = None if expert is None else ir.convenience.get_const_tensor(expert)
        if choice is not None and constant is not None and constant.size == 1:
            return _unchanged(chosen) is choice.outputs[1] and _has_two_axes(choice.outputs[1])
    return False


def _has_two_axes(value: ir.Value) -> bool:
    return value.shape is not None and len(value.shape) == 2


def _produced_by(value: ir.Value | None, op_type: str) -> ir.Node | None:
    """The operator behind casts. Reshapes would change which places are in one row."""
    value = _unchanged(value)
    node = None if value is None else value.producer()
    return node if node is not None and node.domain == "" and node.op_type == op_type else None


def _unchanged(value: ir.Value | None) -> ir.Value | None:
    while value is not None:
        node = value.producer()
        if node is None or node.domain != "" or node.op_type not in ("Cast", "Identity"):
            return value
        value = node.inputs[0]
    return None
