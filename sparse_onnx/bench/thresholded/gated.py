"""A gated feed-forward layer for `bench.thresholded`: dense, and with units skipped by its gate (CATS).

Y = (silu(X gate) * (X up)) down        X [T, D], gate and up [D, I], down [I, D]
"""

from __future__ import annotations

import functools

import numpy as np
import onnx
from onnx import helper, numpy_helper  # noqa: TID251 - the models are parts of the measurement

from sparse_onnx.blocks.spec import DOMAIN
from sparse_onnx.blocks.thresholded_gated import GATED

#: By which weights are divided: with 4096 inputs the gate's results are standard normal.
_SCALE = 64

Part = tuple[list[onnx.NodeProto], list[onnx.TensorProto]]


@functools.cache
def gate_tau(skipped: int, inputs: int) -> float:
    """The threshold that so many % of the activations lie within, of standard normal inputs."""
    gate = np.random.default_rng(0).standard_normal(1 << 20) * np.sqrt(inputs) / _SCALE
    return float(np.quantile(np.abs(gate / (1 + np.exp(-gate))), skipped / 100))


def dense_gated(index: int, inputs: int, units: int) -> Part:
    nodes, constants = _gate(index, inputs, units)
    up, down, u, h = (f"{name}{index}" for name in ("up", "down", "u", "h"))
    nodes += [
        helper.make_node("MatMul", ["x", up], [u]),
        helper.make_node("Mul", [f"a{index}", u], [h]),
        helper.make_node("MatMul", [h, down], [f"y{index}"]),
    ]
    return nodes, [
        *constants,
        _floats(3 * index + 1, up, inputs, units),
        _floats(3 * index + 2, down, units, inputs),
    ]


def thresholded_gated(index: int, inputs: int, units: int) -> Part:
    nodes, constants = _gate(index, inputs, units)
    up, down = f"up{index}", f"down{index}"
    read = [f"a{index}", "x", up, "centre", down, "t", "bias"]  # `centre` is zeros [I] here: the bias of up
    nodes.append(helper.make_node(GATED, read, [f"y{index}"], domain=DOMAIN))
    return nodes, [
        *constants,
        _floats(3 * index + 1, up, units, inputs),
        _floats(3 * index + 2, down, units, inputs),
    ]


def _gate(index: int, inputs: int, units: int) -> Part:
    gate, g, sigmoid, a = (f"{name}{index}" for name in ("gate", "g", "sigmoid", "a"))
    nodes = [
        helper.make_node("MatMul", ["x", gate], [g]),
        helper.make_node("Sigmoid", [g], [sigmoid]),
        helper.make_node("Mul", [g, sigmoid], [a]),
    ]
    return nodes, [_floats(3 * index, gate, inputs, units)]


def _floats(seed: int, name: str, *shape: int) -> onnx.TensorProto:
    numbers = np.random.default_rng(seed).standard_normal(shape, np.float32) / np.float32(_SCALE)
    return numpy_helper.from_array(numbers, name)
