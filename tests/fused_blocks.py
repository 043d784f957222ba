"""Neutral blocks for com.microsoft::MoE and QMoE: weights proved not negative, and routings of any kind."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
from builders import DTYPES, Shape
from harness import run_model
from onnx import helper

from sparse_onnx.graph import io

KINDS = ["random", "one", "dropped", "all dropped", "zeros", "tiny", "large"]


def proven(plain: ir.Model, operator: str = "Abs") -> ir.Model:
    """The model of `routed_model`, with its weights behind an operator that gives nothing negative."""
    proto = ir.to_proto(plain)
    [block] = [node for node in proto.graph.node if node.domain == "sparse_onnx"]
    block.input[2] = "positive"
    attributes = {"axis": -1} if operator == "Softmax" else {}
    proto.graph.node.insert(0, helper.make_node(operator, ["weight"], ["positive"], "proof", **attributes))
    [weight] = [value for value in proto.graph.input if value.name == "weight"]
    info = proto.graph.value_info.add()
    info.CopyFrom(weight)
    info.name = "positive"
    return ir.from_proto(proto)


def routing(shape: Shape, tokens: int, kind: str) -> dict[str, np.ndarray]:
    """Inputs of `proven`. A token without any weight and dropped slots are poison: they must not matter."""
    rng = np.random.default_rng([tokens, KINDS.index(kind)])
    x = rng.standard_normal((tokens, shape.hidden))
    index = rng.integers(0, shape.experts, (tokens, shape.top_k))  # experts of a token repeat
    weight = rng.uniform(-1, 1, index.shape)
    if kind == "one":
        index[:] = rng.integers(shape.experts)
    elif kind == "dropped":
        index[rng.random(index.shape) < 0.5] = shape.experts
        weight[index == shape.experts] = np.inf
        x[(index == shape.experts).all(axis=1)] = np.nan
    elif kind == "all dropped":
        index[:] = shape.experts
        x[:1] = np.inf
    elif kind == "zeros":
        weight[rng.random(index.shape) < 0.5] = 0
        weight[:1] = 0
    elif kind == "tiny":
        weight = 10.0 ** rng.uniform(-12, 0, index.shape)
    elif kind == "large":
        weight *= 10.0 ** rng.uniform(-6, 4, (tokens, 1))
    numbers = (DTYPES[shape.dtype], DTYPES[shape.weight_dtype])
    return {"tokens": x.astype(numbers[0]), "index": index, "weight": weight.astype(numbers[1])}


def run_file(path: Path, inputs: dict[str, np.ndarray]) -> list[np.ndarray]:
    return run_model(ir.external_data.load_to_model(io.load(path)), inputs)


def fused(after: ir.Model) -> ir.Node:
    [node] = [node for node in after.graph.all_nodes() if node.domain == "com.microsoft"]
    return node


def attributes(node: ir.Node) -> dict[str, object]:
    return {name: attribute.value for name, attribute in node.attributes.items()}
