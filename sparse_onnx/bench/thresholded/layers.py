"""The layers that `sparse_onnx.bench.thresholded` compares: each a few nodes from `x` to `y0`, `y1`, ..."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper  # noqa: TID251 - the models are parts of the measurement

from sparse_onnx.bench.thresholded.gated import dense_gated, gate_tau, thresholded_gated
from sparse_onnx.blocks.spec import DOMAIN

TYPES = ("float32", "float16", "bfloat16", "int8", "int4")
#: A gated feed-forward layer of float32, whose shape is inputs x hidden units.
GATED_TYPE = "gated"
#: Thresholds of standard normal inputs by the share that they skip.
TAU = {0: -1.0, 30: 0.3853205, 50: 0.6744898, 70: 1.0364334}
MICROSOFT = "com.microsoft"
FLOATS = {
    "float32": TensorProto.FLOAT,
    "float16": TensorProto.FLOAT16,
    "bfloat16": TensorProto.BFLOAT16,
}

Part = tuple[list[onnx.NodeProto], list[onnx.TensorProto]]


@dataclasses.dataclass(frozen=True)
class Kind:
    """A way to run a layer. `make` gives the nodes and constants of layer number i of shape K, N, whose inputs are of
    `dtype`; `many` says that it differs from others for many tokens alone."""

    name: str
    bits: int
    native: bool
    make: Callable[[int, int, int], Part]
    dtype: str = "float32"
    many: bool = False
    gated: bool = False

    def weights(self, inputs: int, outputs: int) -> int:
        """Of one layer."""
        return (3 if self.gated else 1) * inputs * outputs

    def tau(self, share: int, inputs: int) -> float:
        return gate_tau(share, inputs) if self.gated and share else TAU[share]


def kinds(dtype: str) -> Iterator[Kind]:
    """The dense ones first."""
    if dtype == GATED_TYPE:
        yield Kind("3 MatMul", 32, False, dense_gated, gated=True)
        yield Kind("thresholded, up and down by the gate", 32, True, thresholded_gated, gated=True)
        return
    if dtype in FLOATS:
        bits = 32 if dtype == "float32" else 16
        if dtype == "bfloat16":
            yield Kind("MatMul, float32 copies", bits, False, _dense_bfloat16)
        else:
            yield Kind("MatMul", bits, False, _dense(dtype), dtype)
        yield Kind("thresholded", bits, True, _thresholded(dtype), dtype)
        return
    bits = {"int8": 8, "int4": 4}[dtype]
    for block in (32, 128):
        for level in (4,) if bits == 8 else (0, 4):
            yield Kind(f"MatMulNBits {block}, level {level}", bits, False, _nbits(bits, block, level))
    if bits == 8:
        yield Kind("MatMulInteger", bits, False, _integer)
    for axis, block in ((0, 32), (0, 128), (1, 128)):
        what = "inputs" if axis == 0 else "outputs"
        yield Kind(f"thresholded, {block} {what} a scale", bits, True, _thresholded_nbits(bits, axis, block))
    yield Kind("thresholded, one scale an output", bits, True, _thresholded_nbits(bits, 0, None))
    yield Kind("thresholded, with a copy of level 4", bits, True, _with_copy(bits, 128), many=True)


def cast(given: str, wanted: str, dtype: str) -> onnx.NodeProto:
    """Which ONNX Runtime removes where it changes nothing."""
    return helper.make_node("Cast", [given], [wanted], to=FLOATS[dtype])


def _numbers(index: int, dtype: str, *shape: int) -> onnx.TensorProto:
    numbers = np.random.default_rng(index).standard_normal(shape, np.float32) / np.float32(64)
    return numpy_helper.from_array(
        numbers.astype(helper.tensor_dtype_to_np_dtype(FLOATS[dtype])), f"W{index}"
    )


def _bytes(index: int, count: int) -> bytes:
    return np.random.default_rng(index).bytes(count)


def _ones(name: str, *shape: int) -> onnx.TensorProto:
    return numpy_helper.from_array(np.ones(shape, np.float32), name)


def _dense(dtype: str) -> Callable[[int, int, int], Part]:
    def make(index: int, inputs: int, outputs: int) -> Part:
        node = helper.make_node("MatMul", ["x", f"W{index}"], [f"y{index}"])
        return [node], [_numbers(index, dtype, inputs, outputs)]

    return make


def _dense_bfloat16(index: int, inputs: int, outputs: int) -> Part:
    """ONNX Runtime multiplies no bfloat16 on the CPU: the weights are cast, once, when the session is made."""
    nodes = [
        cast(f"W{index}", f"w{index}", "float32"),
        helper.make_node("MatMul", ["x", f"w{index}"], [f"y{index}"]),
    ]
    return nodes, [_numbers(index, "bfloat16", inputs, outputs)]


def _thresholded(dtype: str) -> Callable[[int, int, int], Part]:
    def make(index: int, inputs: int, outputs: int) -> Part:
        names = ["x", f"W{index}", "t", "centre", "bias"]
        node = helper.make_node("ThresholdedLinear", names, [f"y{index}"], domain=DOMAIN)
        return [node], [_numbers(index, dtype, inputs, outputs)]

    return make


def _nbits(bits: int, block: int, level: int) -> Callable[[int, int, int], Part]:
    def make(index: int, inputs: int, outputs: int) -> Part:
        attributes: dict[str, Any] = {
            "K": inputs,
            "N": outputs,
            "bits": bits,
            "block_size": block,
            "accuracy_level": level,
        }
        names = ["x", f"W{index}", f"s{index}"]
        node = helper.make_node("MatMulNBits", names, [f"y{index}"], domain=MICROSOFT, **attributes)
        shape = (outputs, inputs // block, block * bits // 8)
        weight = helper.make_tensor(
            names[1], TensorProto.UINT8, shape, _bytes(index, inputs * outputs * bits // 8), raw=True
        )
        return [node], [weight, _ones(names[2], outputs, inputs // block)]

    return make


def _integer(index: int, inputs: int, outputs: int) -> Part:
    q, scale, zero, sums, numbers, both = (f"{name}{index}" for name in ("q", "s", "z", "sums", "n", "both"))
    nodes = [
        helper.make_node("DynamicQuantizeLinear", ["x"], [q, scale, zero]),
        helper.make_node("MatMulInteger", [q, f"W{index}", zero], [sums]),
        helper.make_node("Cast", [sums], [numbers], to=TensorProto.FLOAT),
        helper.make_node("Mul", [scale, f"scales{index}"], [both]),
        helper.make_node("Mul", [numbers, both], [f"y{index}"]),
    ]
    weight = helper.make_tensor(
        f"W{index}", TensorProto.INT8, (inputs, outputs), _bytes(index, inputs * outputs), raw=True
    )
    return nodes, [weight, _ones(f"scales{index}", outputs)]


def _thresholded_nbits(bits: int, axis: int, block: int | None) -> Callable[[int, int, int], Part]:
    kind = {8: TensorProto.INT8, 4: TensorProto.INT4}[bits]

    def make(index: int, inputs: int, outputs: int) -> Part:
        size = block or (inputs, outputs)[axis]
        names = ["x", f"W{index}", f"s{index}", f"z{index}", "t", "centre", "bias"]
        node = helper.make_node(
            "ThresholdedLinearNBits", names, [f"y{index}"], domain=DOMAIN, axis=axis, block_size=size
        )
        grid = (inputs // size, outputs) if axis == 0 else (inputs, outputs // size)
        weight, points = (
            helper.make_tensor(name, kind, shape, data, raw=True)
            for name, shape, data in (
                (names[1], (inputs, outputs), _bytes(index, inputs * outputs * bits // 8)),
                (names[3], grid, bytes(grid[0] * grid[1] * bits // 8)),
            )
        )
        return [node], [weight, _ones(names[2], *grid), points]

    return make


def _with_copy(bits: int, block: int) -> Callable[[int, int, int], Part]:
    def make(index: int, inputs: int, outputs: int) -> Part:
        [skipping], stored = _thresholded_nbits(bits, 0, block)(index, inputs, outputs)
        [dense], copy = _nbits(bits, block, 4)(index, inputs, outputs)
        skipping.input[0], skipping.output[0] = "few", f"few{index}"
        for tensor in copy:
            tensor.name = f"copy.{tensor.name}"
        dense.input[1:] = [tensor.name for tensor in copy]
        dense.output[0] = f"dense{index}"
        same = helper.make_node("Identity", [f"few{index}"], [f"same{index}"])
        branches = {
            f"{name}_branch": helper.make_graph(
                [node],
                f"{name}{index}",
                [],
                [helper.make_tensor_value_info(node.output[0], TensorProto.FLOAT, None)],
            )
            for name, node in (("then", dense), ("else", same))
        }
        return [skipping, helper.make_node("If", ["many"], [f"y{index}"], **branches)], [*stored, *copy]

    return make
