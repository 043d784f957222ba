"""Routers: index and weight ``[.., K]`` of ``x [.., D]``, in the ways that models choose experts."""

from __future__ import annotations

import numpy as np
from experts import linear
from family import EPS, JITTER, SCALE, Weights
from onnx import TensorProto, numpy_helper
from writer import Writer

F32 = np.float32


def logits(g: Writer, weights: Weights, x: str, rank: int) -> str:
    """Of the model's type: ``[.., E]``."""
    layout = g.pick("router-layout", "out_in", "in_out")
    matrix = weights.router if layout == "out_in" else weights.router.T
    bias = None if weights.router_bias is None else g.weight(weights.router_bias)
    return linear(g, x, rank, g.weight(matrix), layout, bias)


def routed(g: Writer, weights: Weights, x: str, rank: int) -> tuple[str, str]:
    """Index int64 and weight of the model's type; the router itself computes in float32."""
    score = logits(g, weights, x, rank)
    if g.case.dtype != "float32" or g.maybe(0.2):
        score = g.cast(score, TensorProto.FLOAT)
    index, weight = _choose(g, weights, score, rank)
    if g.case.dtype != "float32" or g.maybe(0.2):
        weight = g.cast(weight, g.type)
    if g.maybe(0.2):
        index = g.cast(index, TensorProto.INT64)
    return g.at("index", index), g.at("weight", weight)


def _choose(g: Writer, weights: Weights, score: str, rank: int) -> tuple[str, str]:
    kind, k = g.case.router, g.case.top_k
    if kind == "sparsemixer":
        return _sparse_mixer(g, score)
    if kind == "argmax":
        return _argmax(g, score, rank)
    if kind == "topk-softmax":
        top, index = g.op("TopK", score, g.ints(k), outputs=2, axis=-1)
        return index, g.op("Softmax", top, axis=g.axis(-1, rank))
    if kind == "sigmoid-bias":
        probability = _sigmoid(g, score)
        selection = g.add(probability, g.constant(weights.selection_bias))
        in_order = int(g.case.capacity is not None or g.maybe())  # who comes first, has a place
        _, index = g.op("TopK", selection, g.ints(k), outputs=2, axis=-1, largest=1, sorted=in_order)
        weight = g.op("GatherElements", probability, index, axis=g.axis(-1, rank))
        total = g.reduce_sum(weight, -1, rank, keep=True)
        weight = g.op("Div", weight, g.add(total, g.number(EPS, F32)))
        return index, g.mul(weight, g.number(SCALE, F32))
    probability = g.op("Softmax", score, axis=g.axis(-1, rank))
    weight, index = g.op("TopK", probability, g.ints(k), outputs=2, axis=g.axis(-1, rank))
    if kind == "softmax-renorm":
        weight = g.op("Div", weight, g.reduce_sum(weight, -1, rank, keep=True))
    return index, weight


def _sigmoid(g: Writer, x: str) -> str:
    if g.maybe():
        return g.op("Sigmoid", x)
    return g.op("Reciprocal", g.add(g.op("Exp", g.op("Neg", x)), g.number(1.0, F32)))


def _argmax(g: Writer, score: str, rank: int) -> tuple[str, str]:
    probability = g.op("Softmax", score, axis=-1)
    if g.maybe():
        index = g.op("ArgMax", probability, axis=g.axis(-1, rank), keepdims=1)
    else:
        index = g.unsqueeze(g.op("ArgMax", probability, axis=-1, keepdims=0), -1, rank)
    if g.maybe():
        return index, g.op("GatherElements", probability, index, axis=g.axis(-1, rank))
    return index, g.reduce_max(probability, -1, keep=True)


def _sparse_mixer(g: Writer, score: str) -> tuple[str, str]:
    """Two ArgMax, the second without the first's choice; each weight a softmax over what is near the best."""
    size = g.op("Abs", score)
    low = g.constant(np.array(-np.inf, F32))
    rest, index, weight = score, [], []
    for turn in range(2):
        top = g.reduce_max(rest, -1, keep=True)
        best = g.op("ArgMax", rest, axis=-1, keepdims=1)
        distance = g.op("Div", g.op("Sub", top, score), g.both("Max", size, top))
        far = g.op("Greater", distance, g.number(2 * JITTER, F32))
        gate = g.op("Softmax", g.op("Where", far, low, rest), axis=-1)
        index.append(best)
        weight.append(g.op("GatherElements", gate, best, axis=-1))
        if turn == 0:
            minus = numpy_helper.from_array(np.array([-np.inf], F32))
            gone = g.op("ConstantOfShape", g.shape(best), value=minus)
            rest = g.op("ScatterElements", score, best, gone, axis=-1)
    return g.op("Concat", *index, axis=-1), g.op("Concat", *weight, axis=-1)
