"""One gated layer with a threshold as a model, and what it must give."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
from layers import TYPES
from onnx import helper, numpy_helper

from sparse_onnx import blocks
from sparse_onnx.blocks.thresholded_gated import gated_reference


@dataclasses.dataclass(frozen=True)
class Gated:
    """`stored` None: weights of `dtype`. Blocks are cut down until they divide their axis; (axis, block) of each."""

    inputs: int
    units: int
    outputs: int
    dtype: str = "float32"
    stored: str | None = None
    up: tuple[int, int] = (1, 32)
    down: tuple[int, int] = (0, 32)
    tau: float = 0.6
    seed: int = 0


@dataclasses.dataclass(frozen=True)
class Made:
    model: onnx.ModelProto
    up: np.ndarray
    up_bias: np.ndarray
    down: np.ndarray
    tau: np.ndarray
    bias: np.ndarray

    def expected(self, gate: np.ndarray, x: np.ndarray) -> np.ndarray:
        return gated_reference(gate, x, self.up, self.up_bias, self.down, self.tau, self.bias)

    def with_constants(self, **arrays: np.ndarray) -> Made:
        model = onnx.ModelProto.FromString(self.model.SerializeToString())
        for item in model.graph.initializer:
            if item.name in arrays:
                item.CopyFrom(numpy_helper.from_array(arrays[item.name], item.name))
        return dataclasses.replace(self, model=model, **arrays)


def type_of(name: str) -> np.dtype:
    return np.dtype(getattr(ml_dtypes, name, None) or name)


def make(layer: Gated) -> Made:
    rng = np.random.default_rng(layer.seed)
    dtype = type_of(layer.dtype)
    arrays: dict[str, np.ndarray] = {}
    attributes: dict[str, int] = {}
    numbers = {}
    for name, width, (axis, block) in (("up", layer.inputs, layer.up), ("down", layer.outputs, layer.down)):
        shape = (layer.units, width)
        deep = layer.inputs if name == "up" else layer.units
        if layer.stored is None:
            arrays[name] = numbers[name] = (rng.normal(size=shape) / np.sqrt(deep)).astype(dtype)
        else:
            size = math.gcd(shape[axis], block) if block < shape[axis] else shape[axis]
            attributes |= {f"{name}_axis": axis, f"{name}_block_size": size}
            found = dict(_integers(rng, name, shape, axis, size, layer.stored, dtype, deep))
            numbers[name] = found.pop("numbers")
            arrays |= found
        if name == "up":
            arrays["up_bias"] = rng.normal(size=layer.units).astype(dtype)
    arrays["tau"] = np.array([layer.tau], dtype)
    arrays["bias"] = rng.normal(size=layer.outputs).astype(dtype)
    op = "ThresholdedGatedMLP" if layer.stored is None else "ThresholdedGatedMLPNBits"
    kind, cast = (
        TYPES[layer.dtype],
        layer.dtype == "bfloat16",
    )  # which onnxruntime takes from nobody in Python
    names = ("a", "x", "y") if cast else ("A", "X", "Y")
    nodes = [helper.make_node(op, [*names[:2], *arrays], [names[2]], domain="sparse_onnx", **attributes)]
    if cast:
        casts = [helper.make_node("Cast", [name.upper()], [name], to=kind) for name in names[:2]]
        nodes = [*casts, *nodes, helper.make_node("Cast", ["y"], ["Y"], to=TYPES["float32"])]
        kind = TYPES["float32"]
    graph = helper.make_graph(
        nodes,
        "layer",
        [
            helper.make_tensor_value_info("A", kind, [None, layer.units]),
            helper.make_tensor_value_info("X", kind, [None, layer.inputs]),
        ],
        [helper.make_tensor_value_info("Y", kind, [None, layer.outputs])],
        [numpy_helper.from_array(array, name) for name, array in arrays.items()],
    )
    model = ir.from_proto(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    )
    assert blocks.attach_functions(model)
    return Made(
        ir.to_proto(model), numbers["up"], arrays["up_bias"], numbers["down"], arrays["tau"], arrays["bias"]
    )


def _integers(
    rng: np.random.Generator,
    name: str,
    shape: tuple[int, int],
    axis: int,
    block: int,
    stored: str,
    dtype: np.dtype,
    deep: int,
) -> Iterator[tuple[str, np.ndarray]]:
    kind = type_of(stored)
    info = ml_dtypes.iinfo(kind)
    grid = (shape[0], shape[1] // block) if axis else (shape[0] // block, shape[1])
    data, points = (
        rng.integers(int(info.min), int(info.max), size, endpoint=True).astype(kind) for size in (shape, grid)
    )
    scales = (rng.uniform(1, 2, grid) / 2.0**info.bits / np.sqrt(deep)).astype(dtype)
    zero, scale = (np.repeat(each.astype(np.float64), block, axis=axis) for each in (points, scales))
    yield "numbers", (data.astype(np.float64) - zero) * scale
    yield from ((name, data), (f"{name}_scales", scales), (f"{name}_zero_points", points))


def rows(layer: Gated, tokens: int, seed: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """What the gate's activation and the layer's input are."""
    rng, dtype = np.random.default_rng(seed), type_of(layer.dtype)
    gate = rng.normal(size=(tokens, layer.units)).astype(dtype)
    return gate, rng.normal(size=(tokens, layer.inputs)).astype(dtype)


def fed(layer: Gated, gate: np.ndarray, x: np.ndarray) -> dict[str, np.ndarray]:
    kind = np.float32 if layer.dtype == "bfloat16" else type_of(layer.dtype)
    return {"A": gate.astype(kind), "X": x.astype(kind)}
