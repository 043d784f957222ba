"""A branch an expert: its tokens by NonZero, its rows, its results added where they came from."""

from __future__ import annotations

import numpy as np
from experts import Stored, one_expert
from onnx import TensorProto
from writer import Writer


def loop(g: Writer, stored: Stored, x: str, index: str, weight: str) -> str:
    """``x [T, D]``, index and weight ``[T, K]`` to ``[T, D]``."""
    case = g.case
    options = ["scatternd-gathered", "optimum", "zeros-scatternd", "sum"]
    if case.opset >= 16 and case.dtype == "float32":  # the CPU's kernels do not add in float16
        options += ["scatter-elements-add", "scatternd-add"]
    if case.top_k == 1:
        options += ["overwrite"]
    if case.router == "sparsemixer":  # ids that nothing shows to differ: only what adds is right
        options = [option for option in options if option.endswith("-add")]
    how = g.pick("accumulate", *options)
    branches = _Branches(g, x, index, weight)
    total = "" if how == "sum" else g.at("start", g.zeros(g.shape(x)))
    shape = g.shape(x)
    terms = []
    for e in g.at("loop", range(case.experts)):
        g.expert = e
        token, scale = branches.take(g.at("number", e))
        y = one_expert(g, stored, e, branches.rows(g.at("read", token)), 2)
        y = g.mul(y, g.at("scale", scale))
        token = g.at("target", token)
        if how in ("zeros-scatternd", "sum", "optimum"):
            zeros = g.zeros(shape)
            if how == "optimum" or (how == "sum" and g.maybe()):
                term = g.op("ScatterElements", zeros, _wide(g, token, y), y, axis=0)
            else:
                term = g.op("ScatterND", zeros, g.column(token), y)
            if how == "sum":
                terms.append(term)
            else:
                total = g.add(total, term)
        elif how == "overwrite":
            total = g.op("ScatterND", total, g.column(token), y)
        elif how == "scatternd-gathered":
            total = g.op("ScatterND", total, g.column(token), g.add(g.rows(g.at("old", total), token), y))
        elif how == "scatternd-add":
            total = g.op("ScatterND", total, g.column(token), y, reduction=g.at("reduction", "add"))
        else:
            how_much = g.at("reduction", "add")
            total = g.op("ScatterElements", total, _wide(g, token, y), y, axis=0, reduction=how_much)
    return g.sum(terms) if how == "sum" else total


def _wide(g: Writer, token: str, y: str) -> str:
    return g.op("Expand", g.column(token), g.shape(y))


class _Branches:
    """Each expert's tokens ``[n]`` and weights ``[n, 1]``."""

    def __init__(self, g: Writer, x: str, index: str, weight: str) -> None:
        self.g, self.x, self.index, self.weight = g, x, index, weight
        once = [] if g.case.router == "sparsemixer" else ["any"]
        self.how = g.pick("hits", "Equal", "Equal", "OneHot", *once)
        if self.how == "OneHot":
            depth = g.int(g.case.experts)
            values = g.constant(np.array([0, 1], np.int64))
            one_hot = g.op("OneHot", index, depth, values, axis=-1)
            self.mask = g.op("Transpose", one_hot, perm=[2, 1, 0])

    def take(self, e: int) -> tuple[str, str]:
        g = self.g
        if self.how == "any":
            return self._any(e)
        if self.how == "OneHot":
            mask = g.op("Gather", self.mask, g.int(e), axis=0)
            slot, token = self._axes(g.op("NonZero", g.cast(mask, TensorProto.BOOL)), 2)
        else:
            hit = g.at("hit", (self.index, e))
            hit = hit if isinstance(hit, str) else g.both("Equal", self.index, g.int(e))
            token, slot = self._axes(g.op("NonZero", hit), 2)
        return token, self._weight(token, slot)

    def _axes(self, nonzero: str, axes: int) -> list[str]:
        """The rows of NonZero's result, one an axis."""
        g = self.g
        how = g.pick("nonzero", "columns-split", "columns-slice", "rows-split", "rows-gather")
        if how == "rows-gather":
            return [g.op("Gather", nonzero, g.int(i), axis=0) for i in range(axes)]
        if how == "rows-split":
            parts = g.split(nonzero, [1] * axes, 0)
            return [g.squeeze(p, 0, 2) if g.maybe(0.7) else g.flat(p) for p in parts]
        pairs = g.op("Transpose", nonzero, perm=[1, 0])
        if how == "columns-split":
            parts = g.split(pairs, [1] * axes, 1)
        else:
            parts = [g.slice(pairs, i, i + 1, 1) for i in range(axes)]
        return [g.squeeze(p, 1, 2) if g.maybe(0.7) else g.flat(p) for p in parts]

    def _weight(self, token: str, slot: str) -> str:
        """``weight[token, slot]`` as ``[n, 1]``."""
        g = self.g
        how = g.pick("weight-of-pair", "GatherND-3d", "GatherND", "flat")
        if how == "flat":
            place = g.add(g.mul(token, g.int(g.at("stride", g.case.top_k))), slot)
            return g.column(g.op("Gather", g.flat(self.weight), place, axis=0))
        pair = g.op("Concat", g.column(g.at("weight-token", token)), g.column(slot), axis=-1)
        if how == "GatherND":
            return g.column(g.op("GatherND", self.weight, pair))
        return g.op("GatherND", g.unsqueeze(self.weight, 2, 3), pair)

    def _any(self, e: int) -> tuple[str, str]:
        """Tokens that have the expert in any slot, with the sum of what those slots weigh."""
        g = self.g
        hit = g.both("Equal", self.index, g.int(e))
        share = g.reduce_sum(g.op("Where", hit, self.weight, g.number(0.0)), -1, 2, keep=True)
        any_slot = g.reduce_max(g.cast(hit, TensorProto.INT32), -1, keep=False)
        [token] = self._axes(g.op("NonZero", g.cast(any_slot, TensorProto.BOOL)), 1)
        return token, g.rows(share, token)

    def rows(self, token: str) -> str:
        g = self.g
        if g.pick("rows", "rows", "optimum") == "rows":
            return g.rows(self.x, token)
        wide = g.op("Gather", g.op("Unsqueeze", self.x, g.ints(0)), token, axis=1)
        return g.reshape(wide, -1, g.case.hidden)
