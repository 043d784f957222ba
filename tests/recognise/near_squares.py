"""More near-misses: with all sizes equal, so that no shape tells one axis from another, and in the bookkeeping.

`SAME_SQUARES` are changes that leave some mixture of experts, often another one: exact or refused.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
from changes import NearMiss, case, next_id, only, twice
from family import LIMIT, Case
from writer import Writer

SQUARE: dict[str, Any] = {"experts": 4, "top_k": 4, "hidden": 4, "inner": 4, "router": "softmax"}
LOOP = ("hits=Equal", "nonzero=rows-gather", "rows=rows")
SORTED = ("stages=layers", "segments=Range", "put-back=inverse", "weight-early=yes", "floor-div=Div")


def transposed(*perm: int) -> Any:
    return lambda g, value: g.op("Transpose", value, perm=list(perm))


def _axes() -> list[NearMiss]:
    slots = case("gathered", "gathered=slots", "combine=Mul", **SQUARE)
    stack = case("dense-mask", "dense=stacked", "stack=inner", "stack-sum=Mul", "gates=scatter", **SQUARE)
    hot = case("dense-mask", "dense=columns", "gates=one-hot", "column=Slice", "sum=chain", **SQUARE)
    return [
        NearMiss("sum-over-features", slots, {"sum-axis": lambda g, v: 2}, "axis|slot|sum"),
        NearMiss("weights-along-features", slots, {"weight-axis": lambda g, v: 1}, "weight|axis|slot|sum"),
        NearMiss("gates-along-features", stack, {"gate-axis": lambda g, v: -2}, "gate|axis|soft|mask|sum"),
        NearMiss(
            "one-hot-along-slots", hot, {"one-hot-axis": lambda g, v: 1}, "one-hot|OneHot|axis|gate|mask|zero"
        ),
    ]


def _bookkeeping() -> list[NearMiss]:
    plain = case("grouped", *SORTED, "inverse=ScatterND", "histogram=one-hot", "counted=unsorted")
    elements = case("grouped", *SORTED, "inverse=ScatterElements", "histogram=equal")
    flat = case("per-expert-loop", *LOOP, "weight-of-pair=flat", "accumulate=scatter-elements-add")
    on_old = case("per-expert-loop", *LOOP, "weight-of-pair=GatherND", "accumulate=scatternd-gathered")
    slots = case("dense-mask", "dense=slots", "mask=Cast", "sum=chain")
    seats = case("gshard", "order=slots", "place=clipped", "dispatch=Greater")

    def clipped(g: Writer, ids: str) -> str:
        return g.op("Clip", ids, g.int(0), g.int(g.case.experts - 2))

    def backwards(g: Writer, places: str) -> str:
        last = g.op("Sub", g.squeeze(g.shape(places), 0, 1), g.int(1))
        return g.op("Sub", last, places)

    def fresh(g: Writer, total: str) -> str:
        return g.op("Mul", total, g.number(0.5))

    def a_slot(g: Writer, hit: tuple[str, int]) -> str:
        return g.op("Equal", hit[0], g.ints(hit[1], (hit[1] + 1) % 4))

    def apart(g: Writer, seen: tuple[str, str]) -> tuple[str, str]:
        return g.op("CumSum", seen[1], g.int(0)), seen[1]

    return [
        NearMiss("histogram-clipped", plain, {"counted": clipped}, "count|clip|bound|ids"),
        NearMiss("sorted-by-other-ids", plain, {"keys": next_id}, "sort|count|ids"),
        NearMiss("not-sorted", plain, {"in-order": lambda g, v: 0}, "sort", differs=None),
        NearMiss("places-backwards", plain, {"places": backwards}, "order|permut|place"),
        NearMiss("places-backwards-elements", elements, {"places": backwards}, "order|permut|place"),
        NearMiss("weights-by-another-stride", flat, {"stride": lambda g, v: 1}, "weight"),
        NearMiss("added-to-less", on_old, {"old": fresh}, "add|total|start|sum|result|gather|missing"),
        NearMiss("another-number-a-slot", on_old, {"hit": a_slot}, "Equal|number|constant|slot|ids|expert"),
        NearMiss("a-number-that-is-no-expert", slots, {"number": twice(3, by=9)}, "missing|range|expert 3"),
        NearMiss("one-hot-of-two", seats, {"on-off": lambda g, v: v * 2}, "one-hot|one|zero|count|mask|soft"),
        NearMiss("slots-counted-apart", seats, {"seen": apart}, "seat|slot|count|position|place"),
        NearMiss(
            "dispatched-to-all",
            seats,
            {"comparison": lambda g, v: "GreaterOrEqual"},
            "mask|soft|dispatch|one",
        ),
    ]


MORE_NEAR_MISSES = [*_axes(), *_bookkeeping()]


def _perms() -> list[NearMiss]:
    """Packed weights whose axes change places first: the expert's axis is then another one."""
    found = []
    gathered = case("gathered", "gathered=rows", **SQUARE)
    batched = case("dense-mask", "dense=batched", "gates=scatter", **SQUARE)
    cut = case("per-expert-loop", *LOOP, "accumulate=scatter-elements-add", "weight-slice=Split", **SQUARE)
    seats = case("gshard", "slot-product=Einsum", **SQUARE)
    for base in (gathered, batched, cut, seats):
        for perm in ((0, 2, 1), (1, 0, 2), (2, 1, 0), (1, 2, 0)):
            name = f"{base.spelling}-axes-{''.join(map(str, perm))}"
            found.append(NearMiss(name, base, {"packed": transposed(*perm)}, None))
    return found


def _bodies(bases: dict[str, Case]) -> list[NearMiss]:
    """Experts that compute a little more, or otherwise."""
    found = []
    for name, base in bases.items():
        result = "y" if base.spelling == "gathered" else "expert-y"
        plain = dataclasses.replace(base, gated="none")
        gated = dataclasses.replace(base, gated="concatenated", activation="silu")
        clamped = dataclasses.replace(base, gated="interleaved", activation="swiglu")
        ones = np.linspace(0.5, 1.5, base.hidden).astype(np.float32)
        inner = np.linspace(-0.5, 0.5, base.inner).astype(np.float32)
        changes: dict[str, tuple[Case, dict[str, Any]]] = {
            "relu-behind": (plain, {result: lambda g, v: g.op("Relu", v)}),
            "half-of-it": (plain, {result: lambda g, v: g.op("Mul", v, g.number(0.5))}),
            "scaled-features": (plain, {result: lambda g, v, ones=ones: g.op("Mul", v, g.weight(ones))}),
            "more-bias": (plain, {result: lambda g, v, ones=ones: g.op("Add", v, g.weight(ones))}),
            "hidden-bias": (plain, {"hidden": lambda g, v, inner=inner: g.op("Add", v, g.weight(inner))}),
            "hidden-twice": (plain, {"hidden": lambda g, v: g.op("Add", v, v)}),
            "up-is-gate": (gated, {"gate-and-up": lambda g, v: v[::-1]}),
            "gate-alone": (gated, {"gate-and-up": lambda g, v: (v[0], v[0])}),
            "gate-clamped-below": (clamped, {"clamped": _both_sides}),
            "up-not-clamped-below": (clamped, {"clamped": _above}),
            "normalized": (plain, {result: _normalized}),
        }
        for change, (changed, spoil) in changes.items():
            found.append(NearMiss(f"{name}-{change}", changed, spoil, None))
    return found


def _both_sides(g: Writer, value: tuple[str, str]) -> tuple[str, str]:
    return g.op("Clip", value[0], g.number(-LIMIT), g.number(LIMIT)), value[1]


def _above(g: Writer, value: tuple[str, str]) -> tuple[str, str]:
    """The up part clamped again, more tightly above than below."""
    return value[0], g.op("Min", value[1], g.number(LIMIT / 2))


def _normalized(g: Writer, value: str) -> str:
    """Each row less its own mean."""
    rank = 2 if g.case.spelling != "gathered" or g.picked["gathered"].startswith("rows") else 3
    mean = g.op("ReduceSum", value, g.ints(rank - 1), keepdims=1)
    return g.op("Sub", value, g.op("Mul", mean, g.number(1 / g.case.hidden)))


def _others() -> list[NearMiss]:
    columns = case("dense-mask", "dense=columns", "gates=scatter", "sum=chain")
    sums = dataclasses.replace(columns, force=(*columns.force[:-1], ("sum", "Sum")))
    add = case("per-expert-loop", *LOOP, "accumulate=scatter-elements-add")
    over = case("per-expert-loop", *LOOP, "accumulate=overwrite", top_k=1, router="argmax")
    sort = case("grouped", *SORTED, "inverse=TopK", "histogram=one-hot")

    def from_x(g: Writer, zeros: str) -> str:
        return g.op("Identity", "x")

    def shared(g: Writer, terms: list[str]) -> list[str]:
        rng = np.random.default_rng(1)
        up, down = (g.weight(rng.standard_normal(s).astype(np.float32)) for s in ((8, 12), (12, 8)))
        dense = g.op("MatMul", g.op("Relu", g.op("MatMul", "x", up)), down)
        return [terms[0], dense, *terms[1:]]

    def nothing(g: Writer, y: str) -> str:
        return g.op("Identity", "x")

    return [
        NearMiss("shared-expert-in-the-sum", columns, {"terms": shared}, None),
        NearMiss("shared-expert-in-one-sum", sums, {"terms": shared}, None),
        NearMiss("an-expert-that-does-nothing", columns, {"expert-y": only(2, nothing)}, None),
        NearMiss("overwrites-x", over, {"start": from_x}, None),
        NearMiss("adds-to-x", add, {"start": from_x}, None),
        NearMiss("sorted-and-counted-otherwise", sort, {"keys": next_id, "counted": next_id}, None),
    ]


SAME_SQUARES = [
    *_perms(),
    *_bodies(
        {
            "gathered": case("gathered", "gathered=rows"),
            "loop": case(
                "per-expert-loop", *LOOP, "weight-of-pair=GatherND", "accumulate=scatter-elements-add"
            ),
            "dense": case("dense-mask", "dense=columns", "gates=scatter", "column=Slice"),
            "grouped": case("grouped", "stages=experts", "segments=Range", "put-back=inverse"),
        }
    ),
    *_others(),
]
