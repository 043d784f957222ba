"""One thresholded layer as a model, and what it must give."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
from onnx import helper, numpy_helper

from sparse_onnx import blocks, register_kernels
from sparse_onnx.blocks.thresholded import thresholded_reference

TYPES = {
    "float32": onnx.TensorProto.FLOAT,
    "float16": onnx.TensorProto.FLOAT16,
    "bfloat16": onnx.TensorProto.BFLOAT16,
}


@dataclasses.dataclass(frozen=True)
class Layer:
    """`stored` None: weights of `dtype`. `block` is cut down until it divides its axis. `each`: tau and centre differ
    by input."""

    inputs: int
    outputs: int
    dtype: str = "float32"
    stored: str | None = None
    axis: int = 1
    block: int = 32
    each: bool = False
    tau: float = 0.6
    seed: int = 0

    @property
    def block_size(self) -> int:
        size = (self.inputs, self.outputs)[self.axis]
        return math.gcd(size, self.block) if self.block < size else size


@dataclasses.dataclass(frozen=True)
class Made:
    model: onnx.ModelProto
    weight: np.ndarray
    tau: np.ndarray
    centre: np.ndarray
    bias: np.ndarray

    def expected(self, x: np.ndarray) -> np.ndarray:
        return thresholded_reference(x, self.weight, self.tau, self.centre, self.bias)


def make(layer: Layer) -> Made:
    rng = np.random.default_rng(layer.seed)
    dtype = np.dtype(getattr(ml_dtypes, layer.dtype, None) or layer.dtype)
    k, n = layer.inputs, layer.outputs
    some = k if layer.each else 1
    tau = np.abs(rng.normal(layer.tau, 0.1 if layer.each else 0, some)).astype(dtype)
    centre = rng.normal(0, 0.2, some).astype(dtype)
    bias = rng.normal(size=n).astype(dtype)
    arrays: dict[str, np.ndarray] = {}
    if layer.stored is None:
        weight = (rng.normal(size=(k, n)) / np.sqrt(k)).astype(dtype)
        arrays["W"] = weight
    else:
        kind = np.dtype(getattr(ml_dtypes, layer.stored, None) or layer.stored)
        info, block = ml_dtypes.iinfo(kind), layer.block_size
        grid = (k, n // block) if layer.axis else (k // block, n)
        numbers, points = (
            rng.integers(int(info.min), int(info.max), size, endpoint=True).astype(kind)
            for size in ((k, n), grid)
        )
        scales = (rng.uniform(1, 2, grid) / 2.0**info.bits / np.sqrt(k)).astype(dtype)
        spread = (np.repeat(each.astype(np.float64), block, axis=layer.axis) for each in (points, scales))
        weight = (numbers.astype(np.float64) - next(spread)) * next(spread)
        arrays |= {"W": numbers, "scales": scales, "zero_points": points}
    arrays |= {"tau": tau, "centre": centre, "folded_bias": bias}
    op = "ThresholdedLinear" if layer.stored is None else "ThresholdedLinearNBits"
    attributes = {} if layer.stored is None else {"axis": layer.axis, "block_size": layer.block_size}
    kind_of = TYPES[layer.dtype]
    names = ("X", "Y")
    if layer.dtype == "bfloat16":  # which onnxruntime takes from nobody in Python
        names, kind_of = ("x", "y"), TYPES["float32"]
    nodes = [helper.make_node(op, [names[0], *arrays], [names[1]], domain="sparse_onnx", **attributes)]
    if layer.dtype == "bfloat16":
        nodes.insert(0, helper.make_node("Cast", ["X"], ["x"], to=TYPES["bfloat16"]))
        nodes.append(helper.make_node("Cast", ["y"], ["Y"], to=TYPES["float32"]))
    graph = helper.make_graph(
        nodes,
        "layer",
        [helper.make_tensor_value_info("X", kind_of, [None, k])],
        [helper.make_tensor_value_info("Y", kind_of, [None, n])],
        [numpy_helper.from_array(array, name) for name, array in arrays.items()],
    )
    model = ir.from_proto(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    )
    assert blocks.attach_functions(model)
    return Made(ir.to_proto(model), weight, tau, centre, bias)


def inputs(layer: Layer, tokens: int, seed: int = 1) -> np.ndarray:
    dtype = np.dtype(getattr(ml_dtypes, layer.dtype, None) or layer.dtype)
    return np.random.default_rng(seed).normal(size=(tokens, layer.inputs)).astype(dtype)


def session(model: onnx.ModelProto | Path, *, native: bool, threads: int = 2) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    # Else a DequantizeLinear with blocks of inputs becomes a MatMulNBits that rounds activations to 8 bits.
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    if native:
        register_kernels(options)
    source = str(model) if isinstance(model, Path) else model.SerializeToString()
    return onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])


def error(expected: np.ndarray, actual: np.ndarray) -> float:
    """The largest, relative to the largest magnitude."""
    assert expected.shape == actual.shape
    if not expected.size:
        return 0.0
    return float(np.abs(actual.astype(np.float64) - expected).max() / max(np.abs(expected).max(), 1e-30))
