"""The generator: a whole model of one block, in any spelling, and the numbers that it must give."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import onnx
import onnxruntime
from experts import Stored
from family import Array, Case, Weights, invalid, make_weights, reference, tokens
from forms_dense import contrib, dense, gshard
from forms_gathered import gathered
from forms_grouped import grouped
from forms_loop import loop
from onnx import helper, numpy_helper
from routers import logits, routed
from writer import FLOAT, Writer

onnxruntime.set_default_logger_severity(4)


@dataclasses.dataclass(frozen=True)
class Built:
    """A model ``x -> y``, and what was picked on the way."""

    case: Case
    model: onnx.ModelProto
    weights: Weights
    picked: dict[str, str]

    def shaped(self, rows: Array) -> Array:
        """Rows ``[T, D]`` as the model takes them."""
        if self.case.rank == 2:
            return rows
        batch = 3 if len(rows) % 3 == 0 and len(rows) else 1
        return rows.reshape(batch, len(rows) // batch, self.case.hidden)

    def expected(self, rows: Array) -> Array:
        """What the model must give for rows ``[T, D]``, in the shape of its output."""
        y = reference(self.case, self.weights, rows, self.picked.get("order", "slots"))
        if self.picked["residual"] == "yes":
            y = y + rows
        return self.shaped(y)

    def routings(self) -> dict[str, Array]:
        """Inputs of several token counts and routings."""
        made = {f"{n} tokens": tokens(self.case, self.weights, n, seed=n) for n in (1, 2, 7, 33)}
        made["one expert"] = tokens(self.case, self.weights, 9, seed=5, same=True)
        return {name: self.shaped(rows) for name, rows in made.items()}


@functools.lru_cache(maxsize=512)
def build(case: Case) -> Built:
    """The model of a case.

    Raises:
        ValueError: there is no such block.
    """
    return spoiled(case, {})


def spoiled(case: Case, spoil: Mapping[str, Callable[..., Any]]) -> Built:
    """The model of a case with something else at the spots that `spoil` names."""
    reason = invalid(case)
    if reason:
        raise ValueError(reason)
    weights = make_weights(case)
    g = Writer(case, spoil)
    inner = "x"
    if g.pick("scaled", "no", "yes") == "yes":  # so that the block's input is not the model's
        inner = g.mul("x", g.constant(np.ones(case.hidden, case.numpy)))
    y = _block(g, weights, inner)
    if g.pick("residual", "no", "yes") == "yes":
        y = g.add(y, "x")
    g.nodes.append(helper.make_node("Identity", [y], ["y"]))
    return Built(case, model_of(g), weights, dict(g.picked))


def _block(g: Writer, weights: Weights, x: str) -> str:
    case, stored = g.case, Stored(g, weights)
    d, k = case.hidden, case.top_k
    if case.spelling == "contrib":
        rows = x if case.rank == 2 else g.reshape(x, -1, d)
        score = logits(g, weights, rows, 2)
        if case.rank == 2 or g.pick("operator-input", "rows", "whole") == "whole":
            return contrib(g, stored, x, score)
        return _unflatten(g, contrib(g, stored, rows, score), x)
    when = "never"
    if case.rank == 3:
        whole = ["never"] if case.spelling == "dense-mask" else []
        when = g.pick("flatten", "before", "after-router", *whole)
    if when == "never":
        index, weight = routed(g, weights, x, case.rank)
        form = {"dense-mask": functools.partial(dense, rank=case.rank)}
        return {**_FORMS, **form}[case.spelling](g, stored, x, index, weight)
    rows = g.reshape(x, -1, d)
    if g.maybe(0.3):
        rows = g.reshape(rows, -1, d)
    if when == "before":
        index, weight = routed(g, weights, rows, 2)
    else:
        index, weight = routed(g, weights, x, 3)
        index, weight = g.reshape(index, -1, k), g.reshape(weight, -1, k)
    return _unflatten(g, _FORMS[case.spelling](g, stored, rows, index, weight), x)


def _unflatten(g: Writer, y: str, x: str) -> str:
    """Rows as `x` has them. Without allowzero, a 0 in the shape means another size: the model takes no empty axis."""
    exact = {"allowzero": 1} if g.case.opset >= 14 and g.pick("empty-axes", "taken", "not") == "taken" else {}
    shape = g.shape(x)
    if g.maybe():
        return g.op("Reshape", y, shape, **exact)
    sizes = [g.slice(shape, 0, 1, 0), g.slice(shape, 1, 2, 0), g.ints(g.case.hidden)]
    return g.op("Reshape", y, g.op("Concat", *sizes, axis=0), **exact)


_FORMS = {
    "gathered": gathered,
    "grouped": grouped,
    "per-expert-loop": loop,
    "dense-mask": functools.partial(dense, rank=2),
    "gshard": gshard,
}


def model_of(g: Writer) -> onnx.ModelProto:
    """The writer's nodes as a checked model ``x -> y``."""
    case = g.case
    leading = ["T"] if case.rank == 2 else ["B", "S"]
    shape = [*leading, case.hidden]
    kind = FLOAT[case.dtype]
    graph = helper.make_graph(
        g.nodes,
        "block",
        [helper.make_tensor_value_info("x", kind, shape), *g.inputs],
        [
            helper.make_tensor_value_info("y", kind, shape),
            *[helper.make_tensor_value_info(name, kind, [f"{name}_n", f"{name}_m"]) for name in g.outputs],
        ],
        g.initializers,
    )
    opsets = [helper.make_opsetid("", case.opset)]
    if any(node.domain for node in g.nodes):
        opsets.append(helper.make_opsetid("com.microsoft", 1))
    model = helper.make_model(graph, opset_imports=opsets, ir_version=8 if case.opset < 19 else 10)
    if g.pick("value-info", "with", "without") == "with":
        model = onnx.shape_inference.infer_shapes(model)
    onnx.checker.check_model(model)
    return model


def session(model: onnx.ModelProto | str, threads: int = 1) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 4
    source = model if isinstance(model, str) else model.SerializeToString()
    return onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])


def run(model: onnx.ModelProto | str, x: Array) -> Array:
    return session(model).run(None, {"x": x})[0]


def error(expected: Array, actual: Array) -> float:
    """The largest difference, relative to the largest value."""
    assert expected.shape == actual.shape
    expected, actual = expected.astype(float), actual.astype(float)
    if not expected.size:
        return 0.0
    return float(np.abs(actual - expected).max() / max(np.abs(expected).max(), 1e-3))


def initializer(model: onnx.ModelProto, name: str) -> Array:
    [tensor] = [tensor for tensor in model.graph.initializer if tensor.name == name]
    return numpy_helper.to_array(tensor)
