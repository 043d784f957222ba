"""The router of a block, named where the graph plainly shows one of the usual kinds.

| name | expert_index | expert_weight |
| --- | --- | --- |
| `softmax_topk` | TopK(softmax(logits)) | the chosen probabilities |
| `softmax_topk_renormalised` | the same | divided by their sum |
| `topk_softmax` | TopK(logits) | softmax of the chosen logits |
| `sigmoid_topk`, `sigmoid_bias_topk` | TopK(sigmoid(logits) [+ bias]) | the chosen sigmoids, without bias |
| `sigmoid_topk_renormalised`, `sigmoid_bias_topk_renormalised` | the same | divided by their sum |

A constant factor on the weights and a small constant in the denominator do not change the name. Everything
else - group-limited, sparsemixer, hashed, computed elsewhere - is None: a router without a name, not an
error.
"""

from __future__ import annotations

import onnx_ir as ir

from sparse_onnx.blocks.routing import is_last_axis, source, top_k


def router_name(expert_index: ir.Value, expert_weight: ir.Value) -> str | None:
    """The name of the router behind the two values, None where it is not plainly one of the known kinds."""
    choice = top_k(expert_index)
    if choice is None:
        return None
    scores = source(choice.inputs[0])
    weight, renormalised = _without_scaling(source(expert_weight))
    kind = _scores_kind(scores)
    if kind is None:
        chosen = _producer(weight, "Softmax")
        if chosen is not None and not renormalised and source(chosen.inputs[0]) is choice.outputs[0]:
            return "topk_softmax"
        return None
    if weight is choice.outputs[0]:
        if kind == "sigmoid_bias":
            return None  # the bias would be part of the weights: no router of this name does that
    elif not _gathers(weight, _unbiased(scores, kind), choice):
        return None
    return f"{kind}_topk{'_renormalised' if renormalised else ''}"


def _producer(value: ir.Value | None, op_type: str) -> ir.Node | None:
    value = source(value)
    node = None if value is None else value.producer()
    return node if node is not None and node.domain == "" and node.op_type == op_type else None


def _scores_kind(scores: ir.Value | None) -> str | None:
    softmax = _producer(scores, "Softmax")
    if softmax is not None:
        return "softmax" if is_last_axis(softmax) else None
    if _producer(scores, "Sigmoid") is not None:
        return "sigmoid"
    if _biased_sigmoid(scores) is not None:
        return "sigmoid_bias"
    return None


def _biased_sigmoid(scores: ir.Value | None) -> ir.Value | None:
    """x of `x + constant` where x is a sigmoid."""
    add = _producer(scores, "Add")
    if add is None:
        return None
    for value, other in (tuple(add.inputs), tuple(reversed(add.inputs))):
        if _producer(value, "Sigmoid") is not None and _is_constant(other):
            return source(value)
    return None


def _unbiased(scores: ir.Value | None, kind: str) -> ir.Value | None:
    return _biased_sigmoid(scores) if kind == "sigmoid_bias" else scores


def _gathers(weight: ir.Value | None, scores: ir.Value | None, choice: ir.Node) -> bool:
    """Whether `weight` is the scores of the chosen experts."""
    gather = _producer(weight, "GatherElements")
    return (
        gather is not None
        and is_last_axis_of_gather(gather)
        and source(gather.inputs[0]) is scores
        and source(gather.inputs[1]) is choice.outputs[1]
    )


def is_last_axis_of_gather(node: ir.Node) -> bool:
    axis = node.attributes["axis"].as_int() if "axis" in node.attributes else 0
    shape = node.inputs[0].shape if node.inputs[0] is not None else None
    return axis == -1 or axis == (1 if shape is None else len(shape) - 1)


def _without_scaling(weight: ir.Value | None) -> tuple[ir.Value | None, bool]:
    """The weights before constant factors and a division by their own sum, and whether there was one."""
    renormalised = False
    while weight is not None:
        node = weight.producer()
        if node is None or node.domain != "":
            break
        if node.op_type == "Mul" and _is_constant(node.inputs[1]):
            weight = source(node.inputs[0])
        elif node.op_type == "Mul" and _is_constant(node.inputs[0]):
            weight = source(node.inputs[1])
        elif (
            node.op_type == "Div" and not renormalised and _is_sum_of(node.inputs[1], source(node.inputs[0]))
        ):
            weight, renormalised = source(node.inputs[0]), True
        else:
            break
    return weight, renormalised


def _is_sum_of(value: ir.Value | None, terms: ir.Value | None) -> bool:
    """`ReduceSum(terms)`, possibly plus a constant or clipped from below."""
    value = source(value)
    node = None if value is None else value.producer()
    if node is not None and node.domain == "" and node.op_type in ("Add", "Clip", "Max"):
        value = next(
            (source(item) for item in node.inputs if item is not None and not _is_constant(item)), None
        )
        node = None if value is None else value.producer()
    return node is not None and node.op_type == "ReduceSum" and source(node.inputs[0]) is terms


def _is_constant(value: ir.Value | None) -> bool:
    value = source(value)
    if value is None:
        return False
    node = value.producer()
    return value.const_value is not None or (node is not None and node.op_type == "Constant")
