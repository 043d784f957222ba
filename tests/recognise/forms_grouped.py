"""Grouped: pairs sorted by expert, one product an expert on its segment, and the order put back."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from experts import Stored, linear, mlp, one_expert
from forms_gathered import arange, slot_sum, summed_rows
from onnx import TensorProto
from writer import Writer


def grouped(g: Writer, stored: Stored, x: str, index: str, weight: str) -> str:
    """``x [T, D]``, index and weight ``[T, K]`` to ``[T, D]``."""
    case = g.case
    flat = g.flat(index)
    keys = g.at("keys", flat)
    count = g.shape(flat)
    if g.pick("count", "Shape", "Gather") == "Gather":
        count = g.reshape(g.op("Gather", count, g.int(-1), axis=0), 1)
    largest = g.at("largest", 0)
    in_order = g.at("in-order", 1)
    ids, order = g.op("TopK", keys, count, outputs=2, axis=-1, largest=largest, sorted=in_order)
    token = g.at("token", _floor_div(g, order))
    rows = g.rows(x, token)
    counted = ids if g.pick("counted", "sorted", "unsorted") == "sorted" else flat
    segments = _segments(g, g.at("counted", counted))

    def layer(role: str, value: str) -> str:
        """One matrix on all segments; the bias behind, by the sorted ids."""
        parts = segments(value)
        done = []
        for e, part in enumerate(parts):
            g.expert = e
            done.append(linear(g, part, 2, g.at("matrix", stored.one(role, e)), case.layout, None))
        y = g.op("Concat", *g.at(f"{role}-parts", done), axis=0)
        return g.add(y, g.rows(stored.whole(role + "_bias"), ids)) if case.bias else y

    stages = ("layers", "experts") if case.packed or not case.bias else ("experts",)
    if g.pick("stages", *stages) == "layers":
        y = mlp(g, layer, rows, 2)
    else:
        parts = segments(rows)
        done = [one_expert(g, stored, e, part, 2) for e, part in enumerate(parts)]
        y = g.op("Concat", *g.at("parts", done), axis=0)
    return _put_back(g, x, y, order, token, weight)


def _floor_div(g: Writer, order: str) -> str:
    """``order // K``: the token of a pair."""
    k = g.int(g.at("divisor", g.case.top_k))
    if g.pick("floor-div", "chain", "Div") == "Div":
        return g.op("Div", order, k)
    negative = g.op("Less", order, g.int(0))
    opposite = g.op("Equal", negative, g.constant(np.array(True)))
    rest = g.cast(g.op("Mod", order, k, fmod=0), TensorProto.BOOL)
    one = g.cast(g.both("And", opposite, rest), TensorProto.INT64)
    return g.op("Sub", g.op("Div", order, k), one)


def _counts(g: Writer, ids: str) -> str:
    """How many pairs each expert has: ``[E]``, int64."""
    e = g.case.experts
    options = ["one-hot", "equal"]
    if g.case.opset >= 16:
        options += ["histc", "scatter"]
    how = g.pick("histogram", *options)
    if how == "one-hot":
        values = g.constant(np.array([0, 1], np.int64))
        return g.reduce_sum(g.op("OneHot", ids, g.int(e), values, axis=-1), 0, 2)
    if how == "equal":
        hit = g.both("Equal", g.unsqueeze(ids, 1, 2), arange(g))
        return g.reduce_sum(g.cast(hit, TensorProto.INT64), 0, 2)
    if how == "scatter":
        ones = g.op("Expand", g.int(1), g.shape(ids))
        zeros = g.constant(np.zeros(e, np.int64))
        return g.op("ScatterElements", zeros, ids, ones, axis=0, reduction="add")
    real = np.float32
    bins = g.op("Div", g.cast(ids, TensorProto.FLOAT), g.number((e - 1) / e, real))
    bins = g.op("Clip", g.cast(bins, TensorProto.INT64), g.int(0), g.int(e - 1))
    ones = g.op("Expand", g.number(1.0, real), g.shape(bins))
    zeros = g.constant(g.at("histogram-base", np.zeros(e, real)))
    counts = g.op("ScatterElements", zeros, bins, ones, axis=0, reduction="add")
    return g.cast(counts, TensorProto.INT32)


def _segments(g: Writer, ids: str) -> Callable[[str], list[str]]:
    """A function that cuts ``[T K, ..]`` in sorted order into the experts' rows."""
    e = g.case.experts
    counts = _counts(g, ids)
    integer = g.picked["histogram"] != "histc"
    how = g.pick("segments", "Range", "Slice", "Split")
    if how == "Split":
        sizes = counts if integer else g.cast(counts, TensorProto.INT64)
        return lambda value: g.op("Split", value, sizes, outputs=e, axis=0)
    ends = g.op("CumSum", g.at("counts", counts), g.int(0), **g.at("cumsum", {}))
    if not integer or g.maybe(0.3):
        ends = g.cast(ends, TensorProto.INT64)
    if g.maybe():
        parts = g.split(ends, [1] * e, 0)
    else:
        parts = [g.slice(ends, i, i + 1, 0) for i in range(e)]
    if how == "Slice":
        starts = [g.ints(0), *parts[:-1]]

        def slices(value: str) -> list[str]:
            axes = g.ints(0)
            return [g.op("Slice", value, a, b, axes) for a, b in zip(starts, parts, strict=True)]

        return slices
    stops = [g.squeeze(part, 0, 1) if g.maybe(0.8) else g.reshape(part) for part in parts]
    starts = [g.int(0), *stops[:-1]]
    step = g.int(1)
    ranges = g.at("ranges", [g.op("Range", a, b, step) for a, b in zip(starts, stops, strict=True)])
    return lambda value: [g.rows(value, part) for part in ranges]


def _put_back(g: Writer, x: str, y: str, order: str, token: str, weight: str) -> str:
    """``y [T K, D]`` in sorted order, weighted and summed over each token's slots."""
    options = ["inverse", "inverse"]
    if g.case.opset >= 16 and g.case.dtype == "float32":  # the CPU's kernels do not add in float16
        options += ["index-add", "scatter-add"]
    how = g.pick("put-back", *options)
    early = how != "inverse" or g.pick("weight-early", "yes", "no") == "yes"
    if early:
        y = g.mul(y, g.column(g.rows(g.flat(weight), g.at("weight-order", order))))
    if how == "index-add":
        zeros = g.zeros(g.shape(x))
        return g.op("ScatterND", zeros, g.column(g.at("target", token)), y, reduction="add")
    if how == "scatter-add":
        wide = g.op("Expand", g.column(token), g.shape(y))
        return g.op("ScatterElements", g.zeros(g.shape(x)), wide, y, axis=0, reduction="add")
    y = g.at("restored", (g.rows(y, g.at("inverse", _inverse(g, order))), y))[0]
    if not early:
        return summed_rows(g, y, weight)
    if g.case.top_k == 1 and g.maybe(0.4):
        return y
    return slot_sum(g, y)


def _inverse(g: Writer, order: str) -> str:
    """The permutation that undoes `order`."""
    how = g.pick("inverse", "ScatterND", "ScatterElements", "TopK")
    shape = g.shape(order)
    if how == "TopK":
        return g.op("TopK", order, shape, outputs=2, axis=0, largest=0, sorted=1)[1]
    count = g.squeeze(shape, 0, 1)
    places = g.at("places", g.op("Range", g.int(0), count, g.int(1)))
    empty = g.zeros(shape, np.int64)
    if how == "ScatterND":
        return g.op("ScatterND", empty, g.column(order), places)
    return g.op("ScatterElements", empty, order, places, axis=0)
