"""Models with conditional parts, built with onnx.helper."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir
from any_body import Graph
from executed import executed
from harness import Feeds
from onnx import TensorProto, helper

from sparse_onnx.graph.infer import infer

WIDTH = 8
#: Name, element type, axes.
Input = tuple[str, int, Sequence[int | str]]
X: Input = ("x", TensorProto.FLOAT, ["T", WIDTH])
FLAG: Input = ("flag", TensorProto.BOOL, [])
MASK: Input = ("mask", TensorProto.BOOL, ["T", 1])


def finished(graph: Graph, inputs: Sequence[Input], outputs: Sequence[str], opset: int = 20) -> ir.Model:
    """A model of what was written, with types and shapes as `optimize` has them when the pass runs."""
    names = [graph.op("Identity", name) for name in outputs]
    values = [helper.make_tensor_value_info(*each) for each in inputs]
    results = [helper.make_empty_tensor_value_info(name) for name in names]
    proto = helper.make_graph(graph.nodes, "g", values, results, graph.initializers)
    imports = [helper.make_opsetid("", opset), helper.make_opsetid("com.microsoft", 1)]
    model = ir.from_proto(helper.make_model(proto, opset_imports=imports, ir_version=10))
    infer(model)
    for value in model.graph.outputs:
        assert value.type is not None
    return model


def layer(graph: Graph, x: str, width: int = WIDTH) -> str:
    return graph.op("Tanh", graph.op("MatMul", x, graph.weight(WIDTH, width)))


def sure(graph: Graph, x: str, bound: str) -> str:
    """One boolean: a confidence above a bound."""
    score = graph.op("ReduceMax", graph.op("MatMul", x, graph.weight(WIDTH, 1)), keepdims=0)
    return graph.op("Greater", score, bound)


def rows(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((count, WIDTH)).astype(np.float32)


def flags(count: int = 5) -> list[Feeds]:
    return [{"x": rows(count), "flag": np.asarray(flag)} for flag in (True, False)]


def masks() -> list[Feeds]:
    some = np.asarray([[True], [False], [False], [True], [False]])
    found = [{"x": rows(5), "mask": each} for each in (some, some | True, some & False)]
    return [*found, {"x": rows(0), "mask": some[:0]}, {"x": rows(1), "mask": some[:1]}]


def products(model: ir.Model, feeds: Feeds) -> int:
    return executed(model, feeds)["MatMul"]
