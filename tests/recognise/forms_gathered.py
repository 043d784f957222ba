"""Gathered: a matrix for each (token, slot) pair, and one product with all of them."""

from __future__ import annotations

import numpy as np
from experts import Stored, mlp
from onnx import TensorProto
from writer import Writer


def repeated(g: Writer, x: str) -> str:
    """``x [T, D]``, each row K times in succession: ``[T K, D]``."""
    k, d = g.case.top_k, g.case.hidden
    if k == 1 and g.maybe(0.3):
        return x
    how = g.pick("repeat", "Expand", "Tile", "Gather")
    if how == "Gather":
        count = g.op("Mul", g.op("Gather", g.shape(x), g.int(0), axis=0), g.int(k))
        pairs = g.op("Range", g.int(0), count, g.int(1))
        return g.rows(x, g.op("Div", pairs, g.int(k)))
    wide = g.op(how, g.at("single", g.unsqueeze(x, 1, 3)), g.at("copies", g.ints(1, k, 1)))
    return g.reshape(wide, -1, d)


def combined(g: Writer, y: str, weight: str) -> str:
    """``y [T, K, D]`` weighted with ``[T, K]`` and summed: ``[T, D]``."""
    how = g.pick("combine", "Mul", "Mul", "Einsum", "MatMul")
    if how == "Einsum":
        return g.einsum("tkd,tk->td", y, weight) if g.maybe() else g.einsum("tk,tkd->td", weight, y)
    if how == "MatMul":
        return g.squeeze(g.op("MatMul", g.unsqueeze(weight, 1, 3), y), 1, 3)
    wide = g.unsqueeze(weight, g.at("weight-axis", 2), 3)
    return g.reduce_sum(g.at("products", g.mul(y, wide)), g.at("sum-axis", 1), 3)


def summed_rows(g: Writer, y: str, weight: str) -> str:
    """``y [T K, D]`` in slot order, weighted with ``[T, K]`` and summed over the slots."""
    k, d = g.case.top_k, g.case.hidden
    if g.pick("weighted", "rows", "slots") == "slots":
        return combined(g, g.reshape(y, -1, k, d), weight)
    y = g.mul(y, g.column(g.flat(weight)) if g.maybe() else g.reshape(weight, -1, 1))
    if k == 1 and g.maybe(0.4):
        return y
    return slot_sum(g, y)


def slot_sum(g: Writer, y: str) -> str:
    """``y [T K, D]`` summed over each token's slots."""
    k, d = g.case.top_k, g.case.hidden
    axis, shape = g.at("slot-axis", (1, (-1, k, d)))
    return g.reduce_sum(g.reshape(y, *shape), axis, 3)


def gathered(g: Writer, stored: Stored, x: str, index: str, weight: str) -> str:
    """``x [T, D]``, index and weight ``[T, K]`` to ``[T, D]``."""
    form = g.pick("gathered", "rows", "rows-einsum", "slots", "slots-einsum")
    if form.startswith("rows"):
        return _by_rows(g, stored, x, index, weight, form.endswith("einsum"))
    return _by_slots(g, stored, x, index, weight, form.endswith("einsum"))


def _by_rows(g: Writer, stored: Stored, x: str, index: str, weight: str, einsum: bool) -> str:
    case = g.case
    flat = g.flat(index)
    if g.maybe(0.15):
        flat = g.cast(g.cast(flat, TensorProto.INT32), TensorProto.INT64)

    def project(role: str, value: str) -> str:
        mine = g.at(f"{role}-index", flat)
        matrix = g.rows(stored.whole(role), mine)
        size = case.roles[role][0]
        if einsum:
            y = g.einsum("ni,nio->no" if case.layout == "in_out" else "ni,noi->no", value, matrix)
        elif case.layout == "out_in" and g.pick("side", "matrix-first", "row-first") == "matrix-first":
            column = g.op("MatMul", matrix, g.unsqueeze(value, 2, 3))
            y = g.squeeze(column, 2, 3) if g.maybe(0.7) else g.reshape(column, -1, size)
        else:
            if case.layout == "out_in":
                matrix = g.op("Transpose", matrix, perm=[0, 2, 1])
            row = g.op("MatMul", g.unsqueeze(value, 1, 3), matrix)
            y = g.squeeze(row, 1, 3) if g.maybe(0.7) else g.reshape(row, -1, size)
        if not case.bias:
            return y
        return g.add(y, g.rows(stored.whole(role + "_bias"), g.at("bias-index", flat)))

    return summed_rows(g, g.at("y", mlp(g, project, repeated(g, x), 2)), weight)


def _by_slots(g: Writer, stored: Stored, x: str, index: str, weight: str, einsum: bool) -> str:
    case = g.case

    def take(role: str) -> str:
        if g.maybe():
            return g.op("Gather", stored.whole(role), index, axis=0)
        return g.op("GatherND", stored.whole(role), g.unsqueeze(index, 2, 3))

    def project(role: str, value: str) -> str:
        first, matrix = value == x, take(role)
        if einsum:
            left = "ti" if first else "tki"
            right = "tkio" if case.layout == "in_out" else "tkoi"
            y = g.einsum(f"{left},{right}->tko", value, matrix)
        else:
            if first:
                value = g.unsqueeze(value, 1, 3)
            if case.layout == "out_in":
                y = g.squeeze(g.op("MatMul", matrix, g.unsqueeze(value, 3, 4)), 3, 4)
            else:
                y = g.squeeze(g.op("MatMul", g.unsqueeze(value, 2, 4), matrix), 2, 4)
        return g.add(y, take(role + "_bias")) if case.bias else y

    return combined(g, g.at("y", mlp(g, project, x, 3)), weight)


def arange(g: Writer) -> str:
    """The experts' numbers."""
    return g.constant(np.arange(g.case.experts, dtype=np.int64))
