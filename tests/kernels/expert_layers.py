"""Thresholded layers of all experts as a model, and what it must give."""

from __future__ import annotations

import dataclasses
import math

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
from layers import TYPES
from onnx import helper, numpy_helper

from sparse_onnx import blocks
from sparse_onnx.blocks.thresholded_experts import experts_reference


@dataclasses.dataclass(frozen=True)
class Experts:
    """`stored` None: weights of `dtype`. `block` is cut down until it divides its axis, 1 or 2. `each`: tau and centre
    differ by input."""

    experts: int
    inputs: int
    outputs: int
    dtype: str = "float32"
    stored: str | None = None
    axis: int = 2
    block: int = 32
    each: bool = False
    tau: float = 0.6
    seed: int = 0

    @property
    def block_size(self) -> int:
        size = (self.inputs, self.outputs)[self.axis - 1]
        return math.gcd(size, self.block) if self.block < size else size


@dataclasses.dataclass(frozen=True)
class Made:
    model: onnx.ModelProto
    weight: np.ndarray
    tau: np.ndarray
    centre: np.ndarray
    bias: np.ndarray

    def expected(self, x: np.ndarray, index: np.ndarray) -> np.ndarray:
        return experts_reference(x, index, self.weight, self.tau, self.centre, self.bias)

    def with_constants(self, **arrays: np.ndarray) -> Made:
        model = onnx.ModelProto.FromString(self.model.SerializeToString())
        for item in model.graph.initializer:
            if item.name in arrays:
                item.CopyFrom(numpy_helper.from_array(arrays[item.name], item.name))
        known = {key: value for key, value in arrays.items() if key in ("tau", "centre")}
        return dataclasses.replace(self, model=model, **known)


def type_of(name: str) -> np.dtype:
    return np.dtype(getattr(ml_dtypes, name, None) or name)


def make(layer: Experts) -> Made:
    rng = np.random.default_rng(layer.seed)
    dtype = type_of(layer.dtype)
    shape = (layer.experts, layer.inputs, layer.outputs)
    some = layer.inputs if layer.each else 1
    tau = np.abs(rng.normal(layer.tau, 0.1 if layer.each else 0, some)).astype(dtype)
    centre = rng.normal(0, 0.2, some).astype(dtype)
    bias = rng.normal(size=(layer.experts, layer.outputs)).astype(dtype)
    arrays: dict[str, np.ndarray] = {}
    attributes = {}
    if layer.stored is None:
        weight = arrays["W"] = (rng.normal(size=shape) / np.sqrt(layer.inputs)).astype(dtype)
    else:
        kind, block = type_of(layer.stored), layer.block_size
        info, grid = ml_dtypes.iinfo(kind), list(shape)
        grid[layer.axis] //= block
        numbers, points = (
            rng.integers(int(info.min), int(info.max), size, endpoint=True).astype(kind)
            for size in (shape, grid)
        )
        scales = (rng.uniform(1, 2, grid) / 2.0**info.bits / np.sqrt(layer.inputs)).astype(dtype)
        zero, scale = (
            np.repeat(each.astype(np.float64), block, axis=layer.axis) for each in (points, scales)
        )
        weight = (numbers.astype(np.float64) - zero) * scale
        arrays |= {"W": numbers, "scales": scales, "zero_points": points}
        attributes = {"axis": layer.axis, "block_size": block}
    arrays |= {"tau": tau, "centre": centre, "folded_bias": bias}
    op = "ThresholdedExpertLinear" if layer.stored is None else "ThresholdedExpertLinearNBits"
    kind_of, names, cast = TYPES[layer.dtype], ("X", "Y"), layer.dtype == "bfloat16"
    if cast:  # which onnxruntime takes from nobody in Python
        names, kind_of = ("x", "y"), TYPES["float32"]
    nodes = [
        helper.make_node(op, [names[0], "index", *arrays], [names[1]], domain="sparse_onnx", **attributes)
    ]
    if cast:
        nodes.insert(0, helper.make_node("Cast", ["X"], ["x"], to=TYPES["bfloat16"]))
        nodes.append(helper.make_node("Cast", ["y"], ["Y"], to=TYPES["float32"]))
    graph = helper.make_graph(
        nodes,
        "layer",
        [
            helper.make_tensor_value_info("X", kind_of, ["S", layer.inputs]),
            helper.make_tensor_value_info("index", onnx.TensorProto.INT64, ["S"]),
        ],
        [helper.make_tensor_value_info("Y", kind_of, ["S", layer.outputs])],
        [numpy_helper.from_array(array, name) for name, array in arrays.items()],
    )
    model = ir.from_proto(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    )
    assert blocks.attach_functions(model)
    return Made(ir.to_proto(model), weight, tau, centre, bias)


def rows(layer: Experts, count: int, seed: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """What the layer reads: x of its type, and experts of which some come often and some not at all."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(count, layer.inputs)).astype(type_of(layer.dtype))
    index = np.minimum(rng.integers(0, layer.experts, count), rng.integers(0, layer.experts, count))
    return x, index


def fed(layer: Experts, x: np.ndarray, index: np.ndarray) -> dict[str, np.ndarray]:
    kind = np.float32 if layer.dtype == "bfloat16" else type_of(layer.dtype)
    return {"X": x.astype(kind), "index": index}
