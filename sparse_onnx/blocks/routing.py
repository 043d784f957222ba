"""What the graph proves about a block's routing."""

from __future__ import annotations

import onnx_ir as ir

#: Operators that pass every value on, in the same order.
_TRANSPARENT = frozenset({"Cast", "CastLike", "Identity", "Reshape", "Squeeze", "Unsqueeze", "Flatten"})
#: Integer types that hold every expert index there is.
_WIDE = frozenset({ir.DataType.INT32, ir.DataType.INT64})


def source(value: ir.Value | None) -> ir.Value | None:
    """The value behind casts and reshapes."""
    while value is not None:
        node = value.producer()
        if node is None or node.domain != "" or node.op_type not in _TRANSPARENT:
            return value
        value = node.inputs[0]
    return None


def top_k(expert_index: ir.Value) -> ir.Node | None:
    """The TopK over the last axis whose indices these are; None for another kind of router."""
    chosen = source(expert_index)
    node = None if chosen is None else chosen.producer()
    if node is None or node.domain != "" or node.op_type != "TopK" or chosen is not node.outputs[1]:
        return None
    return node if is_last_axis(node) else None


def is_last_axis(node: ir.Node) -> bool:
    """Whether the node's `axis` (default -1) is its first input's last."""
    axis = node.attributes["axis"].as_int() if "axis" in node.attributes else -1
    shape = node.inputs[0].shape if node.inputs and node.inputs[0] is not None else None
    return axis == -1 or (shape is not None and axis == len(shape) - 1)


def router_scores(expert_index: ir.Value) -> ir.Value | None:
    """`[..., E]` scores of which a TopK takes the largest to give `expert_index`; None for another kind of router."""
    node = top_k(expert_index)
    if node is None or ("largest" in node.attributes and not node.attributes["largest"].as_int()):
        return None
    return node.inputs[0]


def never_dropped(expert_index: ir.Value, experts: int) -> bool:
    """Whether every index is proved to lie in `[0, experts)`: TopK's over an axis of at most that size."""
    node = top_k(expert_index)
    scores = None if node is None else node.inputs[0]
    if scores is None or scores.shape is None or len(scores.shape) == 0:
        return False
    size = scores.shape[-1]
    return isinstance(size, int) and size <= experts and _only_wide_casts(expert_index)


def _only_wide_casts(value: ir.Value | None) -> bool:
    while value is not None:
        node = value.producer()
        if node is None or node.op_type not in _TRANSPARENT:
            return True
        if node.op_type == "CastLike":
            return False
        if node.op_type == "Cast" and node.attributes["to"].as_int() not in _WIDE:
            return False
        value = node.inputs[0]
    return True
