"""Routers as exporters write them: groups, argmax, sparsemixer, hash tables, capacity, ready weights as logits."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from text_graphs import graph

from sparse_onnx.inspect.router import router_name

STORED = {
    "k": [2],
    "one": [1],
    "last": [-1],
    "first": [0],
    "groups": [-1, 4, 2],
    "flat": [-1, 8],
    "wide": [1, 4, 2],
    "bias": np.linspace(-1, 1, 8),
    "zeros": np.zeros(8),
    "scale": 2.5,
    "tiny": [1e-20],
    "zero": 0.0,
    "low": -np.inf,
    "jitter": 0.02,
    "unit": 1.0,
    "table": np.arange(128).reshape(64, 2) % 8,
    "each": np.linspace(1, 2, 8),
    "all": 8,
    "none": 0,
    "numbers": np.arange(8),
    "places": 3,
    "most": 7,
    "from_end": [-(2**62)],
    "shape": [1],
}
SCORES = {
    "softmax": "score = Softmax<axis=-1>(logits)\n chosen_by = Identity(score)",
    "sigmoid": "score = Sigmoid(logits)\n chosen_by = Identity(score)",
    "sigmoid_bias": "score = Sigmoid(logits)\n chosen_by = Add(score, bias)",
    "softmax_bias": "score = Softmax<axis=1>(logits)\n chosen_by = Add(bias, score)",
}
GROUP_BY_TWO = """
    grouped = Reshape(chosen_by, groups)
    best, besti = TopK<axis=-1>(grouped, k)
    group = ReduceSum<keepdims=0>(best, last)
"""
GROUP_BY_MAX = """
    grouped = Reshape(chosen_by, groups)
    group = ReduceMax<keepdims=0>(grouped, last)
"""
MASK = """
    groupv, groupi = TopK<axis=-1, sorted=0>(group, k)
    groupshape = Shape(group)
    nothing = Expand(zero, groupshape)
    chosenshape = Shape(groupi)
    ones = ConstantOfShape<value = float[1] {1.0}>(chosenshape)
    mask2 = ScatterElements<axis=1>(nothing, groupi, ones)
    mask3 = Unsqueeze(mask2, last)
    mask4 = Expand(mask3, wide)
    mask5 = Reshape(mask4, flat)
    mask = Cast<to=9>(mask5)
"""
UNMASKED = "covered = Identity(chosen_by)"
CHOICE = """
    value, index = TopK<axis=-1>(covered, k)
    weight = GatherElements<axis=1>(score, index)
"""
RENORMALISED = """
    value, index = TopK<axis=-1, sorted=0>(covered, k)
    taken = GatherElements<axis=1>(score, index)
    sum = ReduceSum<keepdims=1>(taken, last)
    safe = Add(sum, tiny)
    ratio = Div(taken, safe)
    weight = Mul(ratio, scale)
"""


def name_of(*parts: str, inputs: str = "float[T,8] logits") -> str | None:
    model = graph("\n".join(parts), "index, weight", STORED, inputs)
    onnx.checker.check_model(model)
    index, weight = ir.from_proto(model).graph.outputs
    return router_name(index, weight)


@pytest.mark.parametrize("scores", SCORES)
@pytest.mark.parametrize("choice", [CHOICE, RENORMALISED], ids=["plain", "renormalised"])
def test_scores(scores: str, choice: str) -> None:
    tail = "" if choice is CHOICE else "_renormalised"
    assert name_of(SCORES[scores], UNMASKED, choice) == f"{scores}_topk{tail}"


COVERED = {
    "not": "away = Not(mask)\n covered = Where(away, low, chosen_by)",
    "kept": "covered = Where(mask, chosen_by, zero)",
    "times": "factor = Cast<to=1>(mask)\n covered = Mul(chosen_by, factor)",
}


@pytest.mark.parametrize("scores", SCORES)
@pytest.mark.parametrize("group", [GROUP_BY_TWO, GROUP_BY_MAX], ids=["two", "max"])
@pytest.mark.parametrize("cover", COVERED)
def test_groups(scores: str, group: str, cover: str) -> None:
    parts = (SCORES[scores], group, MASK, COVERED[cover])
    assert name_of(*parts, CHOICE) == f"{scores}_group_topk"
    assert name_of(*parts, RENORMALISED) == f"{scores}_group_topk_renormalised"


def test_all_groups_are_no_limit() -> None:
    every = MASK.replace("TopK<axis=-1, sorted=0>(group, k)", "TopK<axis=-1, sorted=0>(group, four)")
    parts = ("four = Constant<value = int64[1] {4}>()", SCORES["sigmoid"], GROUP_BY_TWO, every)
    assert name_of(*parts, COVERED["not"], CHOICE) == "sigmoid_topk"


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("away = Not(mask)\n covered = Where(away", "covered = Where(mask"),  # the best groups are covered
        ("Reshape(chosen_by, groups)", "Reshape(logits, groups)"),  # groups of other values
        ("<axis=-1, sorted=0>(group", "<axis=-1, largest=0>(group"),  # the worst groups
        ("GatherElements<axis=1>(score", "GatherElements<axis=1>(covered"),  # the weights are biased
        ("Where(away, low", "Where(away, unit"),  # covered by something large
    ],
)
def test_groups_that_are_not_plain(old: str, new: str) -> None:
    text = "\n".join((SCORES["sigmoid_bias"], GROUP_BY_TWO, MASK, COVERED["not"], CHOICE))
    assert name_of(text) == "sigmoid_bias_group_topk" and old in text
    assert name_of(text.replace(old, new)) is None


ARGMAX = """
    score = Softmax<axis=-1>(logits)
    index = ArgMax<axis=-1, keepdims=1>(score)
"""


def test_one_expert_by_argmax() -> None:
    assert name_of(ARGMAX, "weight = ReduceMax<keepdims=1>(score, last)") == "softmax_top1"
    assert name_of(ARGMAX, "weight = GatherElements<axis=-1>(score, index)") == "softmax_top1"
    by_logits = ARGMAX.replace("(score)\n", "(logits)\n")
    assert name_of(by_logits, "weight = GatherElements<axis=-1>(score, index)") == "softmax_top1"
    by_sigmoid = ARGMAX.replace("Softmax<axis=-1>", "Sigmoid")
    assert name_of(by_sigmoid, "weight = ReduceMax<keepdims=1>(score, last)") == "sigmoid_top1"
    assert name_of(ARGMAX, "weight = ReduceMax<keepdims=1>(score, first)") is None
    assert name_of(ARGMAX.replace("axis=-1, keep", "axis=0, keep"), "weight = Identity(score)") is None


def test_logits_choose_as_their_scores_do() -> None:
    choice = "value, index = TopK<axis=-1>(logits, k)\n score = Softmax<axis=-1>(logits)"
    assert name_of(choice, "weight = GatherElements<axis=-1>(score, index)") == "softmax_topk"
    assert name_of(choice, "weight = Sigmoid(value)") == "sigmoid_topk"
    picked = "picked = GatherElements<axis=-1>(logits, index)\n weight = Softmax<axis=-1>(picked)"
    assert name_of(choice, picked) == "topk_softmax"
    masked = """
        size = Shape(logits)
        empty = Expand(low, size)
        kept = ScatterElements<axis=-1>(empty, index, value)
        gates = Softmax<axis=-1>(kept)
        weight = GatherElements<axis=-1>(gates, index)
    """
    assert name_of(choice, masked) == "topk_softmax"
    assert name_of(choice, "flipped = Neg(value)", masked.replace("index, value)", "index, flipped)")) is None


def test_a_bias_of_the_layer_is_no_bias_of_the_choice() -> None:
    parts = ("score = Add(logits, bias)", "value, index = TopK<axis=-1>(score, k)")
    assert name_of(*parts, "weight = Softmax<axis=-1>(value)") == "topk_softmax"
    gates = "gates = Softmax<axis=-1>(score)\n weight = GatherElements<axis=-1>(gates, index)"
    assert name_of(*parts, gates) == "softmax_topk"
    unbiased = "gates = Softmax<axis=-1>(logits)\n weight = GatherElements<axis=-1>(gates, index)"
    assert name_of(*parts, unbiased) == "softmax_bias_topk"


SPARSE_MIXER = """
    size = Abs(logits)
    top1 = ReduceMax<keepdims=1>(logits, last)
    index1 = ArgMax<axis=-1, keepdims=1>(logits)
    far1 = Sub(top1, logits)
    scale1 = Max(size, top1)
    ratio1 = Div(far1, scale1)
    away1 = Greater(ratio1, jitter)
    near1 = Where(away1, low, logits)
    gate1 = Softmax<axis=-1>(near1)
    weight1 = GatherElements<axis=-1>(gate1, index1)
    indexshape = Shape(index1)
    gone = Expand(low, indexshape)
    rest = ScatterElements<axis=-1>(logits, index1, gone)
    top2 = ReduceMax<keepdims=1>(rest, last)
    index2 = ArgMax<axis=-1, keepdims=1>(rest)
    far2 = Sub(top2, logits)
    scale2 = Max(size, top2)
    ratio2 = Div(far2, scale2)
    away2 = Greater(ratio2, jitter)
    near2 = Where(away2, low, rest)
    gate2 = Softmax<axis=-1>(near2)
    weight2 = GatherElements<axis=-1>(gate2, index2)
    index = Concat<axis=-1>(index1, index2)
    weight = Concat<axis=-1>(weight1, weight2)
"""


@pytest.mark.parametrize(
    ("old", "new", "name"),
    [
        ("", "", "sparsemixer"),
        ("(index1, index2)", "(index2, index1)", None),
        ("ArgMax<axis=-1, keepdims=1>(rest)", "ArgMax<axis=-1, keepdims=1>(logits)", None),
        ("Where(away2, low, rest)", "Where(away2, zero, rest)", None),
        ("Greater(ratio1, jitter)", "Greater(logits, jitter)", None),
    ],
)
def test_sparse_mixer(old: str, new: str, name: str | None) -> None:
    assert name_of(SPARSE_MIXER.replace(old, new)) == name


def test_hash_table() -> None:
    inputs = "int64[B,S] tokens, float[T,8] logits"
    parts = ("found = Gather(table, tokens)", "rows = Constant<value = int64[2] {-1, 2}>()")
    rest = "score = Sigmoid(logits)\n weight = GatherElements<axis=1>(score, index)"
    assert name_of(*parts, "index = Reshape(found, rows)", rest, inputs=inputs) == "hash"
    computed = "flipped = Neg(tokens)\n found = Gather(table, flipped)"
    assert name_of(computed, *parts[1:], "index = Reshape(found, rows)", rest, inputs=inputs) is None


QUEUE = """
    score = Softmax<axis=-1>(logits)
    chosen = ArgMax<axis=-1, keepdims=0>(score)
    column = Unsqueeze(chosen, last)
    hot = Equal(column, numbers)
    count = Cast<to=7>(hot)
    queue = CumSum(count, none)
    place = GatherElements<axis=-1>(queue, column)
    kept = Less(place, places)
    index = Where(kept, column, all)
    weight = ReduceMax<keepdims=1>(score, last)
"""


def test_capacity() -> None:
    """The index becomes E where the place in the expert's queue is C or more."""
    assert name_of(QUEUE) == "softmax_top1_capacity"
    guarded = QUEUE.replace("Less(place, places)", "Less(column, places)")
    assert name_of(guarded) == "softmax_top1"
    random = QUEUE.replace("kept = Less(place, places)", "kept = Identity(drop)")
    assert name_of(random, inputs="float[T,8] logits, bool[T,1] drop") is None


LOGITS_OF_WEIGHTS = """
    neg = Neg(logits)
    exp = Exp(neg)
    more = Add(exp, unit)
    score = Reciprocal(more)
    chosen_by = Add(score, bias)
    firstv, firsti = TopK<axis=-1>(chosen_by, k)
    taken = GatherElements<axis=1>(score, firsti)
    log = Log(taken)
    size = Shape(score)
    empty = ConstantOfShape<value = float[1] {-10000.0}>(size)
    ready = ScatterElements<axis=1>(empty, firsti, log)
    back = Slice(ready, last, from_end, last, last)
    value, reversed = TopK<axis=-1>(back, k)
    index = Sub(most, reversed)
    weight = Softmax<axis=-1>(value)
"""


def test_ready_weights_behind_an_operator_that_takes_logits() -> None:
    assert name_of(LOGITS_OF_WEIGHTS) == "sigmoid_bias_topk_renormalised"
    for old, new in (
        ("-10000.0", "0.0"),
        ("Log(taken)", "Neg(taken)"),
    ):  # then they are logits like any others
        assert name_of(LOGITS_OF_WEIGHTS.replace(old, new)) == "topk_softmax"


@pytest.mark.parametrize(
    ("tail", "name"),
    [
        ("inverse = Reciprocal(sum)\n weight = Mul(inverse, value)", "softmax_topk_renormalised"),
        ("wide_sum = Expand(sum, shape)\n weight = Div(value, wide_sum)", "softmax_topk_renormalised"),
        ("per = Gather(each, index)\n weight = Mul(per, value)", "softmax_topk"),
        ("weight = Mul(sum, value)", None),
        ("per = Gather(each, other)\n weight = Mul(per, value)", None),
        ("rooted = Sqrt(sum)\n weight = Div(value, rooted)", None),
        ("across = ReduceSum(value, first)\n weight = Div(value, across)", None),
    ],
)
def test_factors_of_the_weights(tail: str, name: str | None) -> None:
    parts = ("score = Softmax<axis=-1>(logits)", "value, index = TopK<axis=-1>(score, k)")
    total = "sum = ReduceL1<keepdims=1>(value, last)"
    assert name_of(*parts, total, tail, inputs="float[T,8] logits, int64[T,2] other") == name
