"""Blocks on rows sorted by expert, written by hand, with one thing changed where a test asks for it."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper


@dataclasses.dataclass
class Grouped:
    """What is written, and what is changed in it.

    Attributes:
        counts: histc, scatter, one-hot, equal, apart (one sum an expert) or rows (ones at each token's ids).
        cut: range, slice, split, running (starts added up one by one) or exclusive.
        division: div, chain, float or shift.
        back: inverse, argsort, rows, put (as torch's index_put, to rows of computed length), add or add-elements.
        whole: each expert runs from end to end on its segment.
        early: weights are applied to sorted rows.
        wrong: the change.
    """

    experts: int = 4
    top_k: int = 2
    hidden: int = 8
    inner: int = 6
    bias: bool = False
    counts: str = "scatter"
    cut: str = "split"
    division: str = "div"
    back: str = "inverse"
    whole: bool = False
    early: bool = True
    wrong: str = ""


class _Writer:
    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: list[onnx.TensorProto] = []
        self.random = np.random.default_rng(3)

    def __call__(self, op: str, *inputs: str, n: int = 1, **attributes: Any) -> Any:
        names = [f"{op}_{len(self.nodes)}_{at}" for at in range(n)]
        self.nodes.append(helper.make_node(op, inputs, names, name=f"node_{len(self.nodes)}", **attributes))
        return names[0] if n == 1 else names

    def array(self, value: Any, dtype: Any = np.int64) -> str:
        name = f"c{len(self.initializers)}"
        self.initializers.append(numpy_helper.from_array(np.asarray(value, dtype), name))
        return name

    def weights(self, *shape: int) -> str:
        return self.array(self.random.standard_normal(shape) / shape[-2] ** 0.5, np.float32)


def grouped(**options: Any) -> onnx.ModelProto:
    """``x [T, D]`` to ``y [T, D]``."""
    case = Grouped(**options)
    g = _Writer()
    wrong, k, d, e = case.wrong, case.top_k, case.hidden, case.experts
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["T", d])]
    ids, weight = _router(g, case, "x")
    other_ids, _ = _router(g, case, "x")
    one, last = g.array(1), g.array([-1])
    flat = g("Reshape", ids, last)
    sorted_ids, order = _sort(g, flat, largest=int(wrong == "descending"))
    _, other_order = _sort(g, g("Reshape", other_ids, last))
    token = _divided(g, case, order)
    tokens = "x"
    if wrong == "other tokens":
        inputs.append(helper.make_tensor_value_info("z", TensorProto.FLOAT, ["M", d]))
        tokens = "z"
    rows = g("GatherND", tokens, g("Unsqueeze", token, last))
    counted = other_ids if wrong == "other ids" else ids
    segments = _segments(g, case, g("Reshape", counted, last), counted)
    first, second = _matrices(g, case, d, case.inner), _matrices(g, case, case.inner, d)
    outputs = []

    def layer(value: str, matrices: list[str], shift: int = 0) -> str:
        parts = segments(value, shift)
        if wrong == "swapped" and matrices is second:
            parts[0], parts[1] = parts[1], parts[0]
        if wrong == "missing expert":
            parts = parts[:-1]
        products = [g("MatMul", part, matrix) for part, matrix in zip(parts, matrices, strict=False)]
        joined = g("Concat", *products, axis=0)
        if not case.bias:
            return joined
        table = g.weights(e, d if matrices is second else case.inner)
        picked = flat if wrong == "unsorted bias" else sorted_ids
        return g("Add", joined, g("GatherND", table, g("Unsqueeze", picked, last)))

    if case.whole:
        done = []
        for at, part in enumerate(segments(rows, 0)):
            act = "Tanh" if wrong == "another activation" and at == 1 else "Relu"
            done.append(g("MatMul", g(act, g("MatMul", part, first[at])), second[at]))
        y = g("Concat", *done, axis=0)
    else:
        hidden = g("Relu", layer(rows, first))
        if wrong == "used elsewhere":
            outputs.append(helper.make_tensor_value_info(hidden, TensorProto.FLOAT, None))
        y = layer(hidden, second, shift=int(wrong == "shifted"))
    if wrong == "norm":
        y = g("Mul", y, g.weights(1, d))
    weights = g("Reshape", weight, last)
    if case.early and wrong != "no weight":
        by = other_order if wrong == "weights of another order" else order
        y = g("Mul", y, g("Unsqueeze", g("Gather", weights, by), last))
    way = other_order if wrong == "another permutation" else order
    if case.back in ("add", "add-elements"):
        base = g("Expand", g.array(float(wrong == "base"), np.float32), g("Shape", "x"))
        index = g("Unsqueeze", token, last)
        if case.back == "add":
            y = g("ScatterND", base, index, y, reduction="add")
        else:
            y = g("ScatterElements", base, g("Expand", index, g("Shape", y)), y, axis=0, reduction="add")
    else:
        y = _returned(g, case, way, y)
        slots = k + 1 if wrong == "wrong sum" else k
        shape = g.array([-1, slots, d])
        if case.back == "put":
            shape = g("Concat", g("Shape", "x", start=0, end=1), g.array([slots, -1]), axis=0)
        by_token = g("Reshape", y, shape)
        if case.early or wrong == "no weight":
            y = g("ReduceSum", by_token, g.array([1]), keepdims=0)
        else:
            y = g("Squeeze", g("MatMul", g("Unsqueeze", weight, g.array([1])), by_token), g.array([1]))
    g("Add", y, g("Cast", one, to=TensorProto.FLOAT))
    g.nodes[-1].output[0] = "y"
    outputs.insert(0, helper.make_tensor_value_info("y", TensorProto.FLOAT, None))
    graph = helper.make_graph(g.nodes, "g", inputs, outputs, g.initializers)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    return onnx.shape_inference.infer_shapes(model, data_prop=True)


def _router(g: _Writer, case: Grouped, x: str) -> tuple[str, str]:
    """(ids, weights), each ``[T, K]``."""
    bins = case.experts + int(case.wrong == "ids beyond")
    scores = g("Softmax", g("Gemm", x, g.weights(case.hidden, bins)))
    weight, ids = g("TopK", scores, g.array([case.top_k]), n=2)
    if case.wrong == "sentinel":
        small = g("Less", weight, g.array(0.3, np.float32))
        ids = g("Where", small, g.array(case.experts), ids)
    return ids, weight


def _sort(g: _Writer, flat: str, largest: int = 0) -> list[str]:
    return g("TopK", flat, g("Shape", flat), n=2, axis=0, largest=largest)


def _divided(g: _Writer, case: Grouped, order: str) -> str:
    """The token of each slot."""
    by = case.top_k + int(case.wrong == "wrong K")
    k = g.array(by)
    if case.division == "chain":
        odd = g("Cast", g("Mod", order, k), to=TensorProto.BOOL)
        below = g("Cast", g("And", g("Less", order, g.array(0)), odd), to=TensorProto.INT64)
        return g("Sub", g("Div", order, k), below)
    if case.division == "float":
        part = g("Div", g("Cast", order, to=TensorProto.FLOAT), g.array(by, np.float32))
        signed = g("Mul", g("Floor", g("Abs", part)), g("Sign", part))
        return g("Cast", signed, to=TensorProto.INT64)
    if case.division == "shift":
        bits = g(
            "BitShift", g("Cast", order, to=TensorProto.UINT64), g.array(1, np.uint64), direction="RIGHT"
        )
        return g("Cast", bits, to=TensorProto.INT64)
    divided = g("Div", order, k)
    return g("Clip", divided, g.array(0), g.array(900)) if case.wrong == "clipped" else divided


def _histogram(g: _Writer, case: Grouped, flat: str, ids: str) -> str:
    """``[E]`` slots of each expert."""
    e = case.experts + int(case.wrong == "bins")
    ones = g("Expand", g.array(1), g("Shape", flat))
    if case.counts == "histc":
        factor = 0.6 if case.wrong == "histc" else (e - 1) / e
        real = g("Div", g("Cast", flat, to=TensorProto.FLOAT), g.array(factor, np.float32))
        flat = g("Clip", g("Cast", real, to=TensorProto.INT64), g.array(0), g.array(e - 1))
    if case.counts == "one-hot":
        return g("ReduceSum", g("OneHot", flat, g.array(e), g.array([0, 1])), g.array([0]), keepdims=0)
    if case.counts == "equal":
        hit = g("Equal", g("Unsqueeze", flat, g.array([1])), g.array(np.arange(e)))
        return g("ReduceSum", g("Cast", hit, to=TensorProto.INT64), g.array([0]), keepdims=0)
    if case.counts == "apart":
        hits = [g("Cast", g("Equal", flat, g.array(at)), to=TensorProto.INT64) for at in range(e)]
        return g("Concat", *[g("ReduceSum", hit, g.array([0])) for hit in hits], axis=0)
    if case.counts == "rows":
        shape = g("Concat", g("Shape", ids, start=0, end=1), g.array([e]), axis=0)
        zeros = g("ConstantOfShape", shape)
        hot = g(
            "ScatterElements", zeros, ids, g("Cast", g("Expand", g.array(1), g("Shape", ids)), to=1), axis=1
        )
        return g("Cast", g("ReduceSum", hot, g.array([0]), keepdims=0), to=TensorProto.INT64)
    start = np.full(e, int(case.wrong == "counted from one"))
    return g("ScatterElements", g.array(start), flat, ones, axis=0, reduction="add")


def _segments(g: _Writer, case: Grouped, flat: str, ids: str) -> Any:
    """A function that cuts sorted rows into those of each expert; `shift` moves every segment by one row count."""
    e = case.experts
    counts = _histogram(g, case, flat, ids)
    if case.wrong == "bins":
        counts = g("Slice", counts, g.array([0]), g.array([e]))
    if case.cut == "split":
        return lambda value, shift: g("Split", value, counts, n=e, axis=0)
    zero = g.array([0])
    if case.cut == "running":
        sizes = g("Split", counts, n=e, axis=0, num_outputs=e)
        stops = [sizes[0]]
        for part in sizes[1:]:
            stops.append(g("Add", stops[-1], part))
    else:
        ends = g("CumSum", counts, g.array(0), exclusive=int(case.wrong == "exclusive ends"))
        stops = g("Split", ends, n=e, axis=0, num_outputs=e)
    starts = [zero, *stops[:-1]]
    if case.cut == "exclusive":
        starts = g("Split", g("CumSum", counts, g.array(0), exclusive=1), n=e, axis=0, num_outputs=e)

    def cut(value: str, shift: int) -> list[str]:
        pairs = list(zip(starts, stops, strict=True))
        pairs = pairs[shift:] + pairs[:shift]
        if case.cut != "range":
            return [g("Slice", value, a, b, zero) for a, b in pairs]
        scalars = [(g("Squeeze", a, zero), g("Squeeze", b, zero)) for a, b in pairs]
        return [g("Gather", value, g("Range", a, b, g.array(1)), axis=0) for a, b in scalars]

    return cut


def _matrices(g: _Writer, case: Grouped, rows: int, columns: int) -> list[str]:
    pieces = g(
        "Split", g.weights(case.experts, rows, columns), n=case.experts, axis=0, num_outputs=case.experts
    )
    return [g("Squeeze", piece, g.array([0])) for piece in pieces]


def _returned(g: _Writer, case: Grouped, order: str, y: str) -> str:
    """Rows of slots in their own order."""
    shape, column = g("Shape", order), g("Unsqueeze", order, g.array([-1]))
    if case.back == "rows":
        return g("ScatterND", g("Expand", g.array(0.0, np.float32), g("Shape", y)), column, y)
    if case.back == "put":
        spread = g("Expand", y, g("Concat", shape, g.array([case.hidden]), axis=0))
        return g("ScatterND", g("Expand", g.array(0.0, np.float32), g("Shape", y)), column, spread)
    if case.back == "argsort":
        inverse = g("TopK", order, shape, n=2, axis=0, largest=0)[1]
    else:
        places = g("Range", g.array(0), g("Squeeze", shape), g.array(1))
        inverse = g("ScatterND", g("Expand", g.array(0), shape), column, places)
    return g("Gather", y, inverse, axis=0)
