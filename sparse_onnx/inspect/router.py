"""The router of a block, named where the graph plainly shows one of the usual kinds.

| name | expert_index | expert_weight |
| --- | --- | --- |
| `softmax_topk`, `sigmoid_topk` | TopK of softmax(logits) or sigmoid(logits) | the chosen scores |
| `softmax_top1`, `sigmoid_top1` | ArgMax of the same | the largest score |
| `topk_softmax` | TopK of the logits | softmax of the chosen logits |
| `sparsemixer` | two ArgMax, the second without the first's choice | a softmax each, over what is near the best |
| `hash` | a stored table at the ids that are an input of the model | any |

`softmax` and `sigmoid` may be followed by `_bias` (a constant is added for the choice, not in the weights) and `_group`
(only experts of the best groups can be chosen). The whole may be followed by `_renormalised` (weights are divided by
their sum) and by `_capacity` (slots that find their expert full are dropped).

A factor on the weights, one for all or one an expert, and a small constant in the denominator do not change the name.
Everything else, computed elsewhere or masked otherwise, is None: a router without a name, not an error.
"""

from __future__ import annotations

import itertools

import onnx_ir as ir

from sparse_onnx.blocks.routing import is_last_axis
from sparse_onnx.inspect.router_scores import (
    Choice,
    Scores,
    behind,
    computed,
    fill,
    is_constant,
    kind_of,
    over_last_axis,
    read_choice,
    read_scores,
    same,
)
from sparse_onnx.matching.layout import gathered
from sparse_onnx.matching.values import attribute, is_last, pairs, producer, rank, scalar, tensor

#: Nodes behind a condition among which a running count is looked for.
_FAR = 40


def router_name(expert_index: ir.Value, expert_weight: ir.Value) -> str | None:
    """The name of the router behind the two values, None where it is not plainly one of the known kinds."""
    index, full = _without_drops(expert_index)
    weight, full_too = _without_drops(expert_weight)
    if index is None or weight is None:
        return None
    name = _name(index, weight)
    return f"{name}_capacity" if name and (full or full_too) else name


def _name(index: ir.Value, weight: ir.Value) -> str | None:
    if _from_table(index):
        return "hash"
    pieces = computed(index, "Concat")
    if pieces is not None:
        return "sparsemixer" if _is_sparse_mixer(pieces, weight) else None
    choice = read_choice(index)
    if choice is None:
        return None
    bare, renormalised = _without_scaling(weight, choice)
    scores = read_scores(choice.scores)
    if scores is None:
        return None
    again = _of_written_gates(scores, choice, bare)
    if again is not None:
        return again
    kind, biased = _weight_kind(bare, scores, choice)
    if kind == "topk_softmax":
        return None if biased or scores.grouped or renormalised else kind
    if not kind:
        return None
    tags = ("_bias" if biased else "", "_group" if scores.grouped else "", f"_{choice.how}")
    return kind + "".join(tags) + ("_renormalised" if renormalised else "")


def _without_drops(value: ir.Value | None) -> tuple[ir.Value | None, bool]:
    """The index or weight where slots are kept, and whether they are dropped behind a place in a queue.

    (None, False) where slots are dropped by a condition that is not plain.
    """
    value, full = behind(value), False
    while value is not None:
        node = producer(value, "Where", "Mul")
        if node is None:
            break
        if node.op_type == "Where":
            found = _kept(node)
        else:
            found = next(((a, b) for a, b in pairs(node) if _is_mask(b)), None)
            if found is None:
                break
        if found is None:
            return None, False
        value, mask = behind(found[0]), found[1]
        if _counts_places(mask):
            full = True
        elif not _compares(mask):
            return None, False
    return value, full


def _kept(where: ir.Node) -> tuple[ir.Value, ir.Value] | None:
    mask, kept, other = where.inputs
    if mask is None or kept is None or fill(other) is None:
        return None
    return kept, mask


def _is_mask(value: ir.Value) -> bool:
    cast = producer(value, "Cast")
    return cast is not None and cast.inputs[0] is not None and cast.inputs[0].dtype == ir.DataType.BOOL


def _compares(mask: ir.Value) -> bool:
    """A plain comparison with constants: of weights above 0, or of an index that is one of the experts."""
    node = computed(mask, "Greater", "GreaterOrEqual", "Less", "LessOrEqual", "And")
    if node is None:
        return False
    if node.op_type == "And":
        return all(item is not None and _compares(item) for item in node.inputs)
    return any(is_constant(item) for item in node.inputs)


def _counts_places(mask: ir.Value) -> bool:
    """Whether a running count decides."""
    waiting, seen = [mask], set[ir.Node]()
    while waiting and len(seen) < _FAR:
        node = waiting.pop(0).producer()
        if node is None or node in seen:
            continue
        if node.op_type == "CumSum":
            return True
        seen.add(node)
        if node.op_type not in ("MatMul", "Gemm", "TopK", "ArgMax", "Softmax"):
            waiting += [item for item in node.inputs if item is not None]
    return False


def _from_table(index: ir.Value) -> bool:
    """Whether the index is what a stored table holds at ids that the model is given."""
    found = gathered(behind(index) or index)
    if found is None:
        return False
    table, ids = tensor(behind(found[0])), behind(found[1])
    return (
        table is not None and not table.dtype.is_floating_point() and ids is not None and ids.is_graph_input()
    )


def _weight_kind(weight: ir.Value | None, scores: Scores, choice: Choice) -> tuple[str, bool]:
    """(`softmax`, `sigmoid` or `topk_softmax`, whether the choice alone is biased); an empty kind where not plain."""
    if weight is None:
        return "", False
    if weight is choice.values or (choice.how == "top1" and _is_largest(weight, choice.scores)):
        return ("", False) if scores.biased else (scores.kind, False)
    of, inner = kind_of(weight)
    gather = _gather(weight, choice)
    data = None if gather is None else behind(gather.inputs[0])
    if data is not None and data is scores.values:
        return scores.kind, scores.biased
    if scores.kind:
        return "", False
    if inner is choice.values and of:
        return ("topk_softmax" if of == "softmax" else of), False
    for logits, biased in ((scores.chosen_by, False), (scores.logits, scores.biased)):
        if of and _is_gathered(inner, logits, choice):
            return ("topk_softmax" if of == "softmax" else of), biased
        kind, behind_kind = kind_of(data) if data is not None else ("", None)
        if kind and behind_kind is logits:
            return kind, biased
        if kind == "softmax" and not biased and _is_chosen_logits(behind_kind, choice):
            return "topk_softmax", False
    return "", False


def _is_largest(weight: ir.Value, scores: ir.Value) -> bool:
    """The largest score, or the largest of a function of the scores that keeps their order."""
    node = producer(weight, "ReduceMax")
    return node is not None and over_last_axis(node) and same(node.inputs[0], scores)


def _is_chosen_logits(value: ir.Value | None, choice: Choice) -> bool:
    """The chosen scores put where they were, all others far below."""
    scatter = producer(value, "ScatterElements")
    if scatter is None or not is_last(scatter, 0) or not same(scatter.inputs[1], choice.index):
        return False
    low, kept = fill(scatter.inputs[0]), behind(scatter.inputs[2])
    return low is not None and low <= -1e4 and kept is choice.values


def _gather(value: ir.Value | None, choice: Choice) -> ir.Node | None:
    node = computed(value, "GatherElements")
    if node is None or not same(node.inputs[1], choice.index):
        return None
    among_rows = rank(node.inputs[0]) is None and attribute(node, "axis", 0) == 1  # of [T, E]
    return node if among_rows or is_last(node, 0) else None


def _is_gathered(value: ir.Value, data: ir.Value, choice: Choice) -> bool:
    gather = _gather(value, choice)
    return gather is not None and same(gather.inputs[0], data)


def _of_written_gates(scores: Scores, choice: Choice, weight: ir.Value | None) -> str | None:
    """The router in front of ``log(weights)`` at the chosen places and far less elsewhere, of which a softmax is taken.

    So onnxruntime-genai gives ready weights to an operator that takes logits.
    """
    scatter = computed(scores.logits, "ScatterElements")
    if scatter is None or scores.biased or scores.grouped or weight is None:
        return None
    low, log = fill(scatter.inputs[0]), computed(scatter.inputs[2], "Log")
    if low is None or low > -1e3 or log is None:
        return None
    if weight is not choice.values and kind_of(weight) != ("softmax", choice.values):
        return None
    kept = computed(log.inputs[0], "Clip", "Max", "Add")
    source = log.inputs[0] if kept is None else next((x for x in kept.inputs if not is_constant(x)), None)
    index, first = behind(scatter.inputs[1]), behind(source)
    name = None if index is None or first is None else _name(index, first)
    if name is None or name.endswith("_renormalised") or name == "topk_softmax":
        return name
    return f"{name}_renormalised"


def _is_sparse_mixer(pieces: ir.Node, weight: ir.Value) -> bool:
    """Two choices, the second from what the first leaves; each weight is its score in a softmax of what is near it."""
    weights = computed(weight, "Concat")
    if weights is None or len(pieces.inputs) != 2 or len(weights.inputs) != 2:
        return False
    first, second = (read_choice(item) for item in pieces.inputs)
    if first is None or second is None:
        return False
    rest = computed(second.scores, "ScatterElements")
    if rest is None or not same(rest.inputs[0], first.scores) or not same(rest.inputs[1], first.index):
        return False
    left_out = fill(rest.inputs[2])
    if left_out is None or left_out > -1e4:
        return False
    for item, choice in zip(weights.inputs, (first, second), strict=True):
        gather = _gather(item, choice)
        softmax = None if gather is None else computed(gather.inputs[0], "Softmax")
        if softmax is None or not is_last_axis(softmax) or not _near_the_best(softmax.inputs[0], choice):
            return False
    return True


def _near_the_best(value: ir.Value | None, choice: Choice) -> bool:
    """Scores of which those relatively farther from the best than a constant are left out."""
    where = computed(value, "Where")
    if where is None or not same(where.inputs[2], choice.scores) or (fill(where.inputs[1]) or 0) > -1e4:
        return False
    far = computed(where.inputs[0], "Greater")
    ratio = None if far is None or scalar(far.inputs[1]) is None else computed(far.inputs[0], "Div")
    return ratio is not None and computed(ratio.inputs[0], "Sub") is not None


def _without_scaling(weight: ir.Value | None, choice: Choice) -> tuple[ir.Value | None, bool]:
    """The weights before constant factors and a division by their own sum, and whether there was one."""
    renormalised = False
    weight = behind(weight)
    while (node := producer(weight, "Mul", "Div")) is not None:
        numerator = behind(node.inputs[0])
        if node.op_type == "Mul":
            factors = [a for a, b in pairs(node) if _is_factor(b, choice)]
            inverse = [a for a, b in pairs(node) if _divides_by_sum(b, a)]
            if factors:
                weight = behind(factors[0])
            elif inverse and not renormalised:
                weight, renormalised = behind(inverse[0]), True
            else:
                break
        elif scalar(node.inputs[1]) is not None:
            weight = numerator
        elif not renormalised and _is_sum_of(node.inputs[1], numerator):
            weight, renormalised = numerator, True
        else:
            break
    return weight, renormalised


def _is_factor(value: ir.Value, choice: Choice) -> bool:
    """One constant for all weights, or one for each expert."""
    if is_constant(value):
        return scalar(behind(value)) is not None
    node = computed(value, "Gather")
    return node is not None and is_constant(node.inputs[0]) and same(node.inputs[1], choice.index)


def _divides_by_sum(value: ir.Value, terms: ir.Value) -> bool:
    inverse = computed(value, "Reciprocal")
    return inverse is not None and _is_sum_of(inverse.inputs[0], behind(terms))


def _is_sum_of(value: ir.Value | None, terms: ir.Value | None) -> bool:
    """The sum of the terms, possibly plus a constant or clipped from below."""
    node = computed(value, "Expand")
    if node is not None:
        value = node.inputs[0]
    node = computed(value, "Add", "Clip", "Max")
    if node is not None:
        value = next(itertools.filterfalse(is_constant, filter(None, node.inputs)), None)
    node = computed(value, "ReduceSum", "ReduceL1")
    return node is not None and over_last_axis(node) and same(node.inputs[0], terms)
