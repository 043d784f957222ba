"""Blocks with one thing changed, so that they are no mixture of experts any more, or not provably one.

Each says in a few words (a regular expression) what a refusal must tell. `SAME` are the counterparts: changes that
leave a mixture of experts, which must come out exact.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from changes import (
    NearMiss,
    also_output,
    case,
    centred,
    computed,
    filled,
    graph_input,
    guarded,
    kth_mask,
    next_id,
    only,
    overridable,
    rolled,
    soft_by_fill,
    swapped,
    turned_slots,
    twice,
)
from onnx import TensorProto
from writer import Writer

DENSE = ("dense=columns", "gates=scatter", "column=Slice", "sum=chain")
SLOTS = ("dense=slots", "mask=Where", "sum=chain")
STACK = ("dense=stacked", "stack=inner", "stack-sum=Mul", "gates=scatter")


def _dense() -> list[NearMiss]:
    columns, slots, stack = (case("dense-mask", *forms) for forms in (DENSE, SLOTS, STACK))
    apart = dataclasses.replace(columns, packed=False)
    batched = case("dense-mask", "dense=batched", "copies=none", "gates=scatter")
    top1 = case("dense-mask", *SLOTS, top_k=1, router="softmax")
    return [
        NearMiss("soft-mask", columns, {"gate-base": filled(0.01)}, "zero"),
        NearMiss("mask-filled-with-1e4", columns, {"gates": soft_by_fill}, "zero|mask", differs=False),
        NearMiss("threshold-mask-with-ties", columns, {"gates": kth_mask}, "tie|zero|mask"),
        NearMiss("gates-not-masked", columns, {"gates": lambda g, v: _softmax_of(g)}, None),
        NearMiss("gates-of-another-token", columns, {"gates": rolled}, "mask|token|zero|gate|column"),
        NearMiss(
            "expert-output-used", columns, {"expert-y": only(1, also_output)}, "elsewhere|output", False
        ),
        NearMiss("hidden-value-used", columns, {"hidden": only(1, also_output)}, "elsewhere|output", False),
        NearMiss("ids-one-too-high", slots, {"number": lambda g, e: e + 1}, "missing|expert 0|0\\.\\."),
        NearMiss("number-twice", slots, {"number": twice(1, by=2)}, "missing|twice|duplicate|same"),
        NearMiss("column-twice", columns, {"columns": _column_twice}, "missing|twice|duplicate|same"),
        NearMiss("missing-expert", columns, {"terms": lambda g, v: v[:-1]}, "missing|of the|only"),
        NearMiss("wrong-slot-axis", top1, {"slot-axis": lambda g, v: 0}, "axis|slot|sum"),
        NearMiss("weighted-twice", columns, {"term": _weighted_again}, "weight|twice|gate|mask"),
        NearMiss(
            "ids-of-one-expert-differ", slots, {"number": only(2, lambda g, e: 3)}, "missing|twice|same"
        ),
        NearMiss("mask-inverted", slots, {"branches": lambda g, v: v[::-1]}, "zero|mask|chosen"),
        NearMiss(
            "weight-is-graph-input", apart, {"matrix": only(2, graph_input)}, "not constant|constant|input"
        ),
        NearMiss("weight-is-overridable", apart, {"matrix": only(2, overridable)}, "constant|input", False),
        NearMiss("weight-is-computed", apart, {"matrix": only(2, computed)}, "constant|weight"),
        NearMiss(
            "one-expert-reads-the-next-token", columns, {"expert-x": only(1, rolled)}, "row|token|input|reads"
        ),
        NearMiss("expert-less-the-mean", columns, {"expert-x": only(1, centred)}, "row|token|input|reads"),
        NearMiss("hidden-less-the-mean", stack, {"hidden": only(0, centred)}, "row|token"),
        NearMiss(
            "stack-without-one",
            stack,
            {"terms": lambda g, v: [*v[:-1], v[0]]},
            "missing|twice|duplicate|same",
        ),
        NearMiss("stacked-rows-rolled", stack, {"expert-y": only(3, rolled)}, "row|token"),
        NearMiss("batched-weight-is-input", batched, {"packed": graph_input}, "constant|input"),
        NearMiss(
            "guard-on-the-data", columns, {"expert-y": only(1, guarded)}, "If|guard|condition|row|token"
        ),
    ]


def _softmax_of(g: Writer) -> str:
    return next(n.output[0] for n in g.nodes if n.op_type == "Softmax")


def _column_twice(g: Writer, columns: list[str]) -> list[str]:
    return [columns[0], columns[1], columns[1], *columns[3:]]


def _weighted_again(g: Writer, term: str) -> str:
    product = g.nodes[-1]
    gate = next(i for i in product.input if any(i in n.output for n in g.nodes if n.op_type == "Slice"))
    return g.op("Mul", term, gate)


LAYERS = ("stages=layers", "segments=Range", "put-back=inverse", "inverse=ScatterND", "weight-early=yes")
HISTC = (*LAYERS, "histogram=histc", "floor-div=Div")


def _grouped() -> list[NearMiss]:
    plain = case("grouped", *HISTC)
    onehot = case("grouped", *LAYERS, "histogram=one-hot", "floor-div=chain")
    whole = case("grouped", "stages=experts", "segments=Slice", "put-back=inverse", "histogram=equal")
    cut = case("grouped", "stages=experts", "segments=Split", "put-back=index-add", "histogram=equal")

    def modulo(g: Writer, token: str) -> str:
        order = next(n.output[1] for n in g.nodes if n.op_type == "TopK" and _attribute(n, "largest") == 0)
        return g.op("Mod", order, g.op("Gather", g.shape("x"), g.int(0), axis=0))

    def in_order(g: Writer, inverse: str) -> str:
        return next(n.output[1] for n in g.nodes if n.op_type == "TopK" and _attribute(n, "largest") == 0)

    def exchange(g: Writer, ranges: list[str]) -> list[str]:
        return swapped(ranges)

    def merged(g: Writer, counts: str) -> str:
        return g.op("Concat", g.slice(counts, 1, 4, 0), g.slice(counts, 0, 1, 0), axis=0)

    slot_first = {"slot-axis": lambda g, v: (0, (g.case.top_k, -1, g.case.hidden))}
    return [
        NearMiss("sorted-descending", plain, {"largest": lambda g, v: 1}, "ascend|descend|order|sort"),
        NearMiss("tokens-by-modulo", plain, {"token": modulo}, "token|row|order"),
        NearMiss("wrong-divisor", plain, {"divisor": lambda g, k: k + 1}, "divi|token|row|slot|\\d"),
        NearMiss("offsets-from-other-ids", plain, {"counted": next_id}, "offset|count|segment|bound"),
        NearMiss(
            "offsets-from-other-ids-one-hot", onehot, {"counted": next_id}, "offset|count|segment|bound"
        ),
        NearMiss("offsets-of-other-experts", plain, {"counts": merged}, "offset|count|segment|bound"),
        NearMiss("reversed-offsets", onehot, {"cumsum": lambda g, v: {"reverse": 1}}, "offset|bound"),
        NearMiss("rows-of-another-segment", plain, {"ranges": exchange}, "rows of expert|segment"),
        NearMiss("segments-exchanged", plain, {"fc1-parts": lambda g, v: swapped(v)}, "segment|order|expert"),
        NearMiss(
            "segments-exchanged-whole", whole, {"parts": lambda g, v: swapped(v)}, "segment|order|expert"
        ),
        NearMiss(
            "order-not-put-back", plain, {"restored": lambda g, v: (v[1],)}, "order|permut|put back|sort"
        ),
        NearMiss("order-applied-again", plain, {"inverse": in_order}, "order|permut|inverse"),
        NearMiss("weights-by-token", plain, {"weight-order": _token_of}, "weight"),
        NearMiss("sum-over-other-slots", plain, slot_first, "slot|added|rows of each token"),
        NearMiss("second-layer-less-the-mean", plain, {"hidden": centred}, "ReduceMean|row|token"),
        NearMiss("grouped-weight-is-input", plain, {"packed": graph_input}, "constant|input"),
        NearMiss("added-to-other-tokens", cut, {"target": _reversed_token}, "token|row"),
        NearMiss("split-by-other-counts", cut, {"counted": next_id}, "count|segment|offset|bound"),
    ]


def _attribute(node: Any, name: str) -> Any:
    return next((a.i for a in node.attribute if a.name == name), None)


def _token_of(g: Writer, order: str) -> str:
    return next(n.output[0] for n in g.nodes if n.op_type == "Div" and n.input[0] == order)


def _reversed_token(g: Writer, token: str) -> str:
    last = g.op("Sub", g.op("Gather", g.shape("x"), g.int(0), axis=0), g.int(1))
    return g.op("Sub", last, token)


def _gathered() -> list[NearMiss]:
    rows = case("gathered", "gathered=rows", "repeat=Expand", "weighted=rows", bias=True)
    slots = case("gathered", "gathered=slots", "combine=Mul")

    def blocks(g: Writer, value: str) -> str:
        """``[T, 1, D]`` so that the copies come after one another, not each row's together."""
        return g.op("Transpose", value, perm=[1, 0, 2])

    slot_first = {"slot-axis": lambda g, v: (0, (g.case.top_k, -1, g.case.hidden))}
    copies = {"single": blocks, "copies": lambda g, v: g.ints(g.case.top_k, 1, 1)}
    return [
        NearMiss("layers-of-two-experts", rows, {"fc2-index": turned_slots}, "two experts|ind"),
        NearMiss("second-layer-next-expert", rows, {"fc2-index": next_id}, "two experts|ind"),
        NearMiss("bias-of-another", rows, {"bias-index": turned_slots}, "two experts|bias"),
        NearMiss("copies-after-one-another", rows, copies, "token|row|cop|repeat"),
        NearMiss("gathered-sum-over-tokens", rows, slot_first, "slot|sum|axis"),
        NearMiss("gathered-weight-is-input", rows, {"packed": graph_input}, "constant|input"),
        NearMiss("gathered-result-used", rows, {"y": also_output}, "elsewhere|output", False),
        NearMiss("gathered-less-the-mean", slots, {"hidden": centred}, "ReduceMean|row|token"),
        NearMiss("gathered-rows-rolled", slots, {"y": rolled}, None),
        NearMiss("gathered-weighted-twice", slots, {"products": _times_weight}, "weight|twice", True),
    ]


def _times_weight(g: Writer, product: str) -> str:
    return g.op("Mul", product, [n.output[0] for n in g.nodes if n.op_type == "Unsqueeze"][-1])


LOOP = ("hits=Equal", "nonzero=rows-gather", "weight-of-pair=GatherND", "rows=rows")


def _loop() -> list[NearMiss]:
    add = case("per-expert-loop", *LOOP, "accumulate=scatter-elements-add")
    apart = dataclasses.replace(add, packed=False)
    summed = case("per-expert-loop", *LOOP, "accumulate=zeros-scatternd")

    def below(g: Writer, hit: tuple[str, int]) -> str:
        return g.op("Not", g.op("Less", hit[0], g.int(hit[1])))

    def overwritten(g: Writer, how: str) -> str:
        return "none"

    first = {"loop": lambda g, v: list(v)[:-1]}
    return [
        NearMiss("loop-missing-expert", add, first, "missing|of the|only"),
        NearMiss("loop-number-twice", add, {"number": twice(1, by=2)}, "missing|twice|duplicate|same"),
        NearMiss("loop-number-outside", add, {"number": twice(3, by=7)}, "missing|range|0\\.\\."),
        NearMiss("loop-at-least", add, {"hit": below}, "Equal|ids|choice|chosen|mask"),
        NearMiss("loop-overwrites", add, {"reduction": overwritten}, "overwrit|add|last"),
        NearMiss("loop-takes-the-largest", add, {"reduction": lambda g, v: "max"}, "max|add|reduction"),
        NearMiss("loop-other-target", summed, {"target": only(1, _reversed_token)}, "token|row|place"),
        NearMiss("loop-other-rows", summed, {"read": only(1, _reversed_token)}, "token|row|read"),
        NearMiss("loop-weight-of-another", add, {"weight-token": only(2, _reversed_token)}, "weight"),
        NearMiss("loop-mean-of-the-rows", summed, {"expert-x": only(0, centred)}, "row|token|reads|gathered"),
        NearMiss(
            "loop-guard-on-the-data", add, {"expert-y": only(1, guarded)}, "If|guard|condition|row|token"
        ),
        NearMiss(
            "loop-weight-is-overridable", apart, {"matrix": only(0, overridable)}, "constant|input", False
        ),
        NearMiss("loop-result-used", add, {"expert-y": only(2, also_output)}, "elsewhere|output", False),
    ]


def _gshard() -> list[NearMiss]:
    plain = case("gshard", "order=slots", "place=clipped", "dispatch=Greater", "slot-product=Einsum")
    small = dataclasses.replace(plain, capacity=2)

    def soft(g: Writer, mask: str) -> str:
        return g.op("Add", mask, g.number(0.01))

    return [
        NearMiss(
            "positions-along-experts", plain, {"cumsum-axis": lambda g, v: 1}, "axis|position|slot|place"
        ),
        NearMiss(
            "exclusive-positions", small, {"cumsum": lambda g, v: {"exclusive": 1}}, "position|place|slot"
        ),
        NearMiss(
            "dispatch-over-a-threshold",
            plain,
            {"threshold": lambda g, v: 0.3},
            "dispatch|threshold|mask|soft",
        ),
        NearMiss("slots-not-zero", plain, {"mask": soft}, "zero|mask|one-hot|slot|seat"),
        NearMiss("slots-less-their-mean", plain, {"hidden": _slot_mean}, "ReduceMean|row|token|slot"),
        NearMiss("gshard-weight-is-input", plain, {"packed": graph_input}, "constant|input"),
    ]


def _slot_mean(g: Writer, value: str) -> str:
    return g.op("Sub", value, g.op("ReduceMean", value, g.ints(1), keepdims=1))


def _contrib() -> list[NearMiss]:
    return [
        NearMiss(
            "operator-weight-is-input", case("contrib"), {"packed": graph_input}, "constant|input|run time"
        )
    ]


NEAR_MISSES = [*_dense(), *_grouped(), *_gathered(), *_loop(), *_gshard(), *_contrib()]


def _same() -> list[NearMiss]:
    """Still mixtures of experts, spelled unusually."""
    columns, slots, stack = (case("dense-mask", *forms) for forms in (DENSE, SLOTS, STACK))
    plain = case("per-expert-loop", *LOOP, "accumulate=scatter-elements-add")

    def from_x(g: Writer, zeros: str) -> str:
        return g.op("Identity", "x")

    def cast_ids(g: Writer, ids: str) -> str:
        return g.cast(g.cast(ids, TensorProto.INT32), TensorProto.INT64)

    def other(g: Writer, name: str) -> str:
        return "relu" if g.expert == 2 else name

    exchanged = {"number": lambda g, e: [0, 2, 1, 3][e]}
    return [
        NearMiss("numbers-exchanged", slots, exchanged, None),
        NearMiss("columns-exchanged", columns, {"columns": lambda g, v: swapped(v)}, None),
        NearMiss("stack-exchanged", stack, {"terms": lambda g, v: swapped(v)}, None),
        NearMiss("loop-numbers-exchanged", plain, exchanged, None),
        NearMiss("loop-from-last", plain, {"loop": lambda g, v: list(v)[::-1]}, None),
        NearMiss("loop-starts-with-x", plain, {"start": from_x}, None),
        NearMiss("ids-through-int32", plain, {"index": cast_ids}, None),
        NearMiss("weights-of-the-next-token", columns, {"weight": rolled}, None),
        NearMiss("ids-of-the-next-token", case("gathered", "gathered=slots"), {"index": rolled}, None),
        NearMiss("one-expert-with-relu", columns, {"activation": other}, None),
        NearMiss("loop-one-expert-with-relu", plain, {"activation": other}, None),
        NearMiss("all-read-less-the-mean", columns, {"expert-x": centred}, None),
        NearMiss("negative-weights", columns, {"weight": lambda g, v: g.op("Neg", v)}, None),
        NearMiss(
            "weights-that-are-zero",
            plain,
            {"weight": lambda g, v: g.op("Relu", g.op("Sub", v, g.number(0.4)))},
            None,
        ),
        NearMiss(
            "reversed-positions", case("gshard", "order=slots"), {"cumsum": lambda g, v: {"reverse": 1}}, None
        ),
    ]


SAME = _same()
