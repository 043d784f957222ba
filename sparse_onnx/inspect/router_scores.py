"""What a router chooses, and by which scores: behind casts, reshapes, masks, groups and a selection bias."""

from __future__ import annotations

import dataclasses

import numpy as np
import onnx_ir as ir

from sparse_onnx.blocks.routing import is_last_axis
from sparse_onnx.matching.values import (
    attribute,
    axes,
    constant,
    ints,
    is_last,
    pairs,
    producer,
    rank,
    scalar,
    size,
)

_RESHAPES = ("Identity", "Reshape", "Squeeze", "Unsqueeze", "Flatten")
_REPEATS = ("Expand", "Tile")


@dataclasses.dataclass(frozen=True)
class Scores:
    """What experts are chosen by.

    Attributes:
        values: the scores of all experts, without bias and mask.
        kind: `softmax` or `sigmoid`; empty for the logits themselves.
        chosen_by: the same with their bias.
        logits: what `values` is computed from; `values` where there is no kind.
        biased: a constant is added for the choice.
        grouped: only experts of the best groups can be chosen.
    """

    values: ir.Value
    chosen_by: ir.Value
    kind: str
    logits: ir.Value
    biased: bool
    grouped: bool


@dataclasses.dataclass(frozen=True)
class Choice:
    """A TopK or ArgMax over experts.

    Attributes:
        index: the chosen experts.
        values: a TopK's largest scores.
        scores: what it reads.
        how: `topk` or `top1`.
    """

    index: ir.Value
    values: ir.Value | None
    scores: ir.Value
    how: str


def behind(value: ir.Value | None) -> ir.Value | None:
    """The value behind reshapes, and behind casts from a float to a float or from an integer to an integer."""
    while value is not None:
        node = producer(value)
        if node is None or not node.inputs:
            return value
        source = node.inputs[0]
        if node.op_type == "Cast":
            if source is None or not _alike(source.dtype, value.dtype or ir.DataType(attribute(node, "to"))):
                return value
        elif node.op_type not in _RESHAPES:
            return value
        value = source
    return None


def _alike(a: ir.DataType | None, b: ir.DataType) -> bool:
    return a is None or (a.is_floating_point() == b.is_floating_point() and ir.DataType.BOOL not in (a, b))


def computed(value: ir.Value | None, *op_types: str) -> ir.Node | None:
    """The node behind the value, if it is one of these operators."""
    return producer(behind(value), *op_types)


def same(a: ir.Value | None, b: ir.Value | None) -> bool:
    a = behind(a)
    return a is not None and a is behind(b)


def is_constant(value: ir.Value | None) -> bool:
    """A stored value, or one that is computed from a stored one by reshapes and casts."""
    value = behind(value)
    return value is not None and (value.const_value is not None or producer(value, "Constant") is not None)


def fill(value: ir.Value | None) -> float | None:
    """The one number that the value holds everywhere; None where it holds others, or where that is not plain."""
    value = behind(value)
    node = producer(value, "ConstantOfShape", "Cast", *_REPEATS)
    if node is None:
        array = constant(value)
        if array is None or array.size == 0 or array.dtype.kind not in "fiub":
            return None
        return float(array.flat[0]) if bool(np.all(array == array.flat[0])) else None
    if node.op_type != "ConstantOfShape":
        return fill(node.inputs[0])
    stored = attribute(node, "value")
    return 0.0 if stored is None else float(stored.numpy().reshape(-1)[0])


def read_choice(index: ir.Value | None) -> Choice | None:
    """The TopK or ArgMax over the last axis that gives the index."""
    value = behind(index)
    node = producer(value, "TopK", "ArgMax", "Sub")
    if node is None or value is None or node.inputs[0] is None:
        return None
    if node.op_type == "Sub":
        return _counted_from_the_end(node, value)
    if node.op_type == "ArgMax":
        return Choice(value, None, node.inputs[0], "top1") if is_last(node, 0) else None
    if value is not node.outputs[1] or not is_last_axis(node) or not attribute(node, "largest", 1):
        return None
    return Choice(value, node.outputs[0], node.inputs[0], "topk")


def _counted_from_the_end(node: ir.Node, index: ir.Value) -> Choice | None:
    """``E - 1 - TopK(scores in reverse)``, which takes the last of equal scores."""
    chosen = read_choice(node.inputs[1])
    cut = None if chosen is None else computed(chosen.scores, "Slice")
    if chosen is None or cut is None or scalar(node.inputs[0]) is None or len(cut.inputs) != 5:
        return None
    if ints(cut.inputs[3]) != [-1] or ints(cut.inputs[4]) != [-1] or cut.inputs[0] is None:
        return None
    return Choice(index, chosen.values, cut.inputs[0], chosen.how)


def read_scores(value: ir.Value | None) -> Scores | None:
    """The scores that a TopK or ArgMax over experts reads; None for a mask that is not plain."""
    value = behind(value)
    if value is None:
        return None
    width, grouped = size(value, -1), False
    bare = _without_group_mask(value)
    if bare is not None:
        value, grouped = bare
    elif computed(value, "Where") is not None:
        return None
    kind, logits, biased = *kind_of(value), False
    chosen_by = value
    if not kind:
        unbiased = _without_bias(value)
        if unbiased is not None:
            kind, logits = kind_of(unbiased)
            value, biased = unbiased, True
    if size(value, -1) not in (None, width):
        return None  # of a part of the experts at a time
    return Scores(value, chosen_by, kind, logits, biased, grouped)


def kind_of(value: ir.Value) -> tuple[str, ir.Value]:
    """(`softmax` or `sigmoid`, the logits), or (empty, the value)."""
    value = behind(value) or value
    node = producer(value, "Softmax", "Sigmoid")
    source = None if node is None else behind(node.inputs[0])
    if node is not None and source is not None and (node.op_type == "Sigmoid" or is_last_axis(node)):
        return node.op_type.lower(), source
    written_out = _sigmoid_written_out(value)
    return ("", value) if written_out is None else ("sigmoid", written_out)


def _sigmoid_written_out(value: ir.Value) -> ir.Value | None:
    """x of ``1 / (1 + exp(-x))``."""
    node = producer(value, "Reciprocal", "Div")
    if node is None or (node.op_type == "Div" and scalar(node.inputs[0]) != 1):
        return None
    total = computed(node.inputs[-1], "Add")
    for term, other in pairs(total) if total is not None else ():
        power = computed(term, "Exp")
        negated = None if power is None else computed(power.inputs[0], "Neg")
        if negated is not None and scalar(other) == 1:
            return behind(negated.inputs[0])
    return None


def _without_bias(value: ir.Value) -> ir.Value | None:
    add = producer(value, "Add")
    for term, other in pairs(add) if add is not None else ():
        if is_constant(other) and not is_constant(term):
            return behind(term)
    return None


def _without_group_mask(value: ir.Value) -> tuple[ir.Value, bool] | None:
    """Scores of which those outside the best groups are covered, and whether any group is outside.

    None where that is not what the graph does.
    """
    node = producer(value, "Where", "Mul")
    if node is None:
        return None
    if node.op_type == "Where":
        mask, kept, low = node.inputs
        keeps = fill(kept) is None
        if not keeps:
            kept, low = low, kept
        ground = fill(low)
        if ground is None or ground > 0:
            return None
        tried = [(kept, mask, keeps)]
    else:
        tried = [(kept, mask, True) for kept, mask in pairs(node)]
    for kept, mask, keeps in tried:
        scores = behind(kept)
        best = _groups_marked(mask, keeps)
        if scores is not None and best is not None and _are_of_groups(best.inputs[0], scores):
            count = size(best.inputs[0], -1)
            return scores, count is None or scalar(best.inputs[1]) != count
    return None


def _groups_marked(mask: ir.Value | None, wanted: bool) -> ir.Node | None:
    """The TopK for whose choice the mask is `wanted`, and elsewhere the opposite."""
    value = behind(mask)
    while (node := producer(value, "Cast", "Not", "Greater", *_REPEATS)) is not None:
        if node.op_type == "Greater" and scalar(node.inputs[1]) != 0:
            return None
        wanted = wanted != (node.op_type == "Not")
        value = behind(node.inputs[0])
    scatter = producer(value, "ScatterElements")
    if scatter is None:
        return None
    ground, chosen = fill(scatter.inputs[0]), fill(scatter.inputs[2])
    if ground is None or chosen is None or bool(chosen) != wanted or bool(ground) == wanted:
        return None
    best = computed(scatter.inputs[1], "TopK")
    return best if best is not None and attribute(best, "largest", 1) else None


def _are_of_groups(value: ir.Value | None, scores: ir.Value) -> bool:
    """Whether the value holds the sum of the two best, or the best, of each group of scores."""
    node = computed(value, "ReduceMax", "ReduceSum", "TopK")
    if node is not None and node.op_type == "ReduceSum":
        node = computed(node.inputs[0], "TopK")
    return node is not None and same(node.inputs[0], scores)


def over_last_axis(node: ir.Node) -> bool:
    """Whether a reduction is over the last axis alone."""
    found, dimensions = axes(node), rank(node.inputs[0])
    return found == [-1] or (dimensions is not None and found == [dimensions - 1])
