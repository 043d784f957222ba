"""An expert's layers as exporters write them: matrices, activations, gates."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from family import ALPHA, BETA, LIMIT, Weights
from writer import Writer


class Stored:
    """The experts' weights in the graph, whole (``[E, ...]``) or one expert's, each written once."""

    def __init__(self, g: Writer, weights: Weights) -> None:
        self.g, self.weights = g, weights
        self._whole: dict[str, str] = {}
        self._split: dict[str, list[str]] = {}

    def arrays(self, role: str) -> np.ndarray:
        if role.endswith("_bias"):
            return self.weights.biases[role.removesuffix("_bias")]
        matrices = self.weights.matrices[role]
        return matrices if self.g.case.layout == "out_in" else matrices.transpose(0, 2, 1)

    def whole(self, role: str) -> str:
        if role not in self._whole:
            self._whole[role] = self.g.at("packed", self.g.weight(self.arrays(role)))
        return self._whole[role]

    def one(self, role: str, e: int) -> str:
        """Expert `e`'s own initializer, or its slice of the packed one."""
        g, case = self.g, self.g.case
        if not case.packed:
            return g.weight(self.arrays(role)[e])
        shape = self.arrays(role).shape
        how = g.pick("weight-slice", "Split", "Slice", "Gather")
        if how == "Gather":
            return g.op("Gather", self.whole(role), g.int(e), axis=0)
        if how == "Slice":
            piece = g.slice(self.whole(role), e, e + 1, 0)
        else:
            if role not in self._split:
                self._split[role] = g.split(self.whole(role), [1] * case.experts, 0)
            piece = self._split[role][e]
        return g.reshape(piece, *shape[1:]) if g.maybe(0.3) else g.squeeze(piece, 0, len(shape))


def linear(g: Writer, x: str, rank: int, matrix: str, layout: str, bias: str | None) -> str:
    """``x [.., in]`` by one matrix: MatMul or, on two axes, Gemm; the bias within or behind."""
    if rank == 2 and g.maybe():
        extra: dict[str, Any] = {}
        if layout == "out_in":
            extra["transB"] = 1
        elif g.maybe():
            extra["transB"] = 0
        if g.maybe():
            extra |= {"alpha": 1.0, "beta": 1.0}
        if bias is not None and g.maybe(0.7):
            return g.op("Gemm", x, matrix, bias, **extra)
        y = g.op("Gemm", x, matrix, **extra)
    else:
        if layout == "out_in":
            matrix = g.op("Transpose", matrix, perm=[1, 0]) if g.maybe() else g.op("Transpose", matrix)
        y = g.op("MatMul", x, matrix)
    return y if bias is None else g.add(y, bias)


def one_expert(g: Writer, stored: Stored, e: int, x: str, rank: int) -> str:
    """The whole of expert `e` on ``x [.., D]``."""

    def project(role: str, value: str) -> str:
        bias = stored.one(role + "_bias", e) if g.case.bias else None
        return linear(g, value, rank, g.at("matrix", stored.one(role, e)), g.case.layout, bias)

    g.expert = e
    return g.at("expert-y", mlp(g, project, g.at("expert-x", x), rank))


def mlp(g: Writer, project: Callable[[str, str], str], x: str, rank: int) -> str:
    """Both layers with what is between them; `project(role, value)` is a layer, `rank` that of its result."""
    gated = g.case.gated
    if gated == "none":
        return project("fc2", g.at("hidden", activate(g, g.case.activation, project("fc1", x))))
    if gated == "separate":
        if g.maybe():
            gate = project("gate", x)
            up = project("up", x)
        else:
            up = project("up", x)
            gate = project("gate", x)
    else:
        gate, up = halves(g, project("fc1", x), rank, gated == "interleaved")
    return project("fc2", g.at("hidden", joined(g, *g.at("gate-and-up", (gate, up)))))


def halves(g: Writer, value: str, rank: int, interleaved: bool) -> tuple[str, str]:
    """Gate and up of one matrix's outputs."""
    inner = g.case.inner
    last = g.axis(-1, rank)
    if interleaved:
        how = g.pick("halves", "Slice", "Gather", "Reshape")
        if how == "Slice":
            end = (2**63 - 1) if g.maybe() else 2 * inner
            return g.slice(value, 0, end, last, 2), g.slice(value, 1, end, last, 2)
        if how == "Reshape":
            pairs = g.reshape(value, *([0] * (rank - 1)), inner, 2)
            return g.op("Gather", pairs, g.int(0), axis=-1), g.op("Gather", pairs, g.int(1), axis=-1)
        even, odd = np.arange(0, 2 * inner, 2), np.arange(1, 2 * inner, 2)
    else:
        how = g.pick("halves", "Split", "Slice", "Gather")
        if how == "Split":
            gate, up = g.split(value, [inner, inner], last)
            return gate, up
        if how == "Slice":
            end = (2**63 - 1) if g.maybe() else 2 * inner
            return g.slice(value, 0, inner, last), g.slice(value, inner, end, last)
        even, odd = np.arange(inner), np.arange(inner, 2 * inner)
    gate = g.op("Gather", value, g.constant(even.astype(np.int64)), axis=last)
    return gate, g.op("Gather", value, g.constant(odd.astype(np.int64)), axis=last)


def joined(g: Writer, gate: str, up: str) -> str:
    if g.case.activation != "swiglu":
        return g.mul(activate(g, g.case.activation, gate), up)
    if g.pick("clamp", "Clip", "MinMax") == "Clip":
        gate = g.op("Clip", gate, "", g.number(LIMIT))
        up = g.op("Clip", up, g.number(-LIMIT), g.number(LIMIT))
    else:
        gate = g.both("Min", gate, g.number(LIMIT))
        up = g.both("Max", g.both("Min", up, g.number(LIMIT)), g.number(-LIMIT))
    gate, up = g.at("clamped", (gate, up))
    slope = g.op("Sigmoid", g.mul(gate, g.number(ALPHA)))
    return g.mul(g.add(up, g.number(BETA)), g.mul(gate, slope))


def activate(g: Writer, name: str, x: str) -> str:
    name = g.at("activation", name)
    if name == "silu":
        return _silu(g, x)
    if name == "gelu":
        return _gelu(g, x)
    if name == "gelu_tanh":
        return _gelu_tanh(g, x)
    how = g.pick("relu", "Relu", "Max", "Clip")
    if how == "Relu":
        positive = g.op("Relu", x)
    elif how == "Max":
        positive = g.both("Max", x, g.number(0.0))
    else:
        positive = g.op("Clip", x, g.number(0.0))
    if name == "relu":
        return positive
    if g.pick("square", "Mul", "Pow") == "Mul":
        return g.op("Mul", positive, positive)
    return g.op("Pow", positive, g.number(2.0))


def _silu(g: Writer, x: str) -> str:
    how = g.pick("silu", "Sigmoid", "Sigmoid", "Exp", "QuickGelu")
    if how == "QuickGelu":
        return g.op("QuickGelu", x, domain="com.microsoft", alpha=1.0)
    if how == "Exp":
        return g.op("Div", x, g.add(g.op("Exp", g.op("Neg", x)), g.number(1.0)))
    return g.mul(x, g.op("Sigmoid", x))


def _gelu(g: Writer, x: str) -> str:
    options = ["half-first", "half-last", "half-outer", "contrib"]
    how = g.pick("gelu", *options, *(["operator"] if g.case.opset >= 20 else []))
    if how == "operator":
        return g.op("Gelu", x)
    if how == "contrib":
        return g.op("Gelu", x, domain="com.microsoft")
    root = math.sqrt(2.0)
    inside = g.op("Div", x, g.number(root)) if g.maybe() else g.mul(x, g.number(1 / root))
    one_plus = g.add(g.op("Erf", inside), g.number(1.0))
    if how == "half-first":
        return g.mul(g.mul(x, g.number(0.5)), one_plus)
    if how == "half-last":
        return g.mul(x, g.mul(one_plus, g.number(0.5)))
    return g.mul(g.mul(x, one_plus), g.number(0.5))


def _gelu_tanh(g: Writer, x: str) -> str:
    how = g.pick("gelu_tanh", "chain", "contrib", *(["operator"] if g.case.opset >= 20 else []))
    if how == "operator":
        return g.op("Gelu", x, approximate="tanh")
    if how == "contrib":
        return g.op("FastGelu", x, domain="com.microsoft")
    if g.maybe():
        cubed = g.op("Pow", x, g.number(3.0))
    else:
        cubed = g.mul(g.op("Mul", x, x), x)
    inside = g.mul(g.add(x, g.mul(cubed, g.number(0.044715))), g.number(math.sqrt(2 / math.pi)))
    one_plus = g.add(g.op("Tanh", inside), g.number(1.0))
    return g.mul(g.mul(x, g.number(0.5)), one_plus)
