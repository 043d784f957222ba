"""Blocks of any kind and routings of any kind, for the tests of lowerings."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
from builders import DTYPES, Shape
from hypothesis import strategies as st
from moe_cases import Case
from onnx import numpy_helper

from sparse_onnx.blocks import reference

KINDS = ["random", "one", "ties", "duplicates", "dropped", "all dropped"]


def routing(shape: Shape, tokens: int, kind: str, seed: int = 0) -> dict[str, np.ndarray]:
    """Inputs of `builders.routed_model`. What is dropped is poison: it must not matter."""
    rng = np.random.default_rng([seed, tokens])
    x = rng.standard_normal((tokens, shape.hidden)).astype(DTYPES[shape.dtype])
    index = rng.integers(0, shape.experts, (tokens, shape.top_k))
    weight = rng.uniform(-1, 1, index.shape).astype(DTYPES[shape.weight_dtype])
    if kind == "one":
        index[:] = rng.integers(shape.experts)
    elif kind == "ties":
        weight[:] = 0.5
    elif kind == "duplicates":
        index[:] = index[:, :1]
    elif kind == "dropped":
        index[rng.random(index.shape) < 0.5] = shape.experts
        weight[index == shape.experts] = np.inf
        x[(index == shape.experts).all(axis=1)] = np.nan
    elif kind == "all dropped":
        index[:] = shape.experts
    return {"tokens": x, "index": index.astype(np.int64), "weight": weight}


@st.composite
def shapes(draw: st.DrawFn) -> Shape:
    gated = draw(st.booleans())
    separate = gated and draw(st.booleans())
    return Shape(
        experts=draw(st.sampled_from([1, 2, 5, 9])),
        top_k=draw(st.integers(1, 4)),
        hidden=draw(st.sampled_from([1, 8, 20])),
        inner=draw(st.sampled_from([1, 8, 12])),
        activation=draw(st.integers(0, 4)),
        gate_layout=draw(st.sampled_from([1, 2])) if gated else 0,
        weight_layout=draw(st.sampled_from([0, 1])),
        biases=draw(st.booleans()),
        separate=separate,
        limit=draw(st.sampled_from([0.0, 0.7])) if gated else 0.0,
        alpha=draw(st.sampled_from([1.0, 1.702])),
        beta=draw(st.sampled_from([0.0, 1.0])) if gated else 0.0,
    )


def constant_weights(case: Case, weights: dict[str, np.ndarray]) -> ir.Model:
    """The case's model with its weights as initializers."""
    proto = case.model()
    kept = [value for value in proto.graph.input if value.name not in weights]
    del proto.graph.input[:]
    proto.graph.input.extend(kept)
    proto.graph.initializer.extend(numpy_helper.from_array(array, name) for name, array in weights.items())
    return ir.from_proto(proto)


def expected(case: Case, feeds: dict[str, np.ndarray], weights: dict[str, np.ndarray]) -> np.ndarray:
    """By the numpy reference, in float64."""
    return reference(case.spec, **feeds, **weights)


def frozen(model: ir.Model, tokens: int) -> ir.Model:
    """The model for one number of tokens."""
    proto = ir.to_proto(model)
    for value in [*proto.graph.input, *proto.graph.output, *proto.graph.value_info]:
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param == "T":
                dim.dim_value = tokens
    return ir.from_proto(proto)


def open_sizes(model: ir.Model) -> list[str]:
    """Values of the main graph that have an axis of unknown size."""
    proto = onnx.shape_inference.infer_shapes(
        ir.to_proto(model), check_type=True, strict_mode=True, data_prop=True
    )
    infos = {info.name: info.type.tensor_type for info in [*proto.graph.value_info, *proto.graph.output]}
    found = []
    for name in (name for node in proto.graph.node for name in node.output):
        kind = infos.get(name)
        known = kind is not None and kind.HasField("shape")
        if not known or not all(dim.HasField("dim_value") for dim in kind.shape.dim):
            found.append(name)
    return found
