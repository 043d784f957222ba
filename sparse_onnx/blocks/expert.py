"""One expert's feed-forward network in standard operators, written out for known attributes."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import onnx_ir as ir

from sparse_onnx.blocks.spec import Activation, ExpertSpec, GateLayout, WeightLayout
from sparse_onnx.graph.build import Emitter


@dataclasses.dataclass(frozen=True)
class Linear:
    """One expert's matrix and its bias (None: no bias), as values of the graph."""

    weight: ir.Value
    bias: ir.Value | None


def emit_linear(emit: Emitter, spec: ExpertSpec, rows: ir.Value, linear: Linear) -> ir.Value:
    """`rows [n, in] -> [n, out]`. Gemm takes both layouts as they lie in the file; ORT prepacks it like MatMul."""
    inputs = (rows, linear.weight) if linear.bias is None else (rows, linear.weight, linear.bias)
    return emit.op("Gemm", *inputs, transB=int(spec.weight_layout == WeightLayout.OUT_IN))


def emit_hidden(
    emit: Emitter,
    spec: ExpertSpec,
    projected: Sequence[ir.Value],
    dtype: ir.DataType,
    opset: int,
    axis: int = -1,
) -> ir.Value:
    """What lies between an expert's first and last matrix: `[n, N1] -> [n, I]`, row by row alike for all experts.

    Args:
        emit: where the nodes go.
        spec: activation and gate layout.
        projected: fc1's output, or (gate's, up's) when they are stored apart; n may be 0.
        dtype: of the rows.
        opset: of the graph's default domain; it decides whether there is a Gelu operator.
        axis: of the features, where `projected` has more axes or another order of them.
    """
    if len(projected) == 2:
        return _gated(emit, spec, projected[0], projected[1], dtype, opset)
    if spec.gate_layout == GateLayout.CONCATENATED:
        gate, up = emit.ops("Split", projected, 2, axis=axis, num_outputs=2)
        return _gated(emit, spec, gate, up, dtype, opset)
    if spec.gate_layout == GateLayout.INTERLEAVED:
        end, axes, step = emit.ints(2**62), emit.ints(axis), emit.ints(2)
        gate = emit.op("Slice", projected[0], emit.ints(0), end, axes, step)
        up = emit.op("Slice", projected[0], emit.ints(1), end, axes, step)
        return _gated(emit, spec, gate, up, dtype, opset)
    return emit_activation(emit, spec, projected[0], dtype, opset)


def _gated(
    emit: Emitter, spec: ExpertSpec, gate: ir.Value, up: ir.Value, dtype: ir.DataType, opset: int
) -> ir.Value:
    if spec.limit > 0 and spec.activation == Activation.SILU_SOFTCAP:
        up = _softcap(emit, up, spec.limit, dtype)
    elif spec.limit > 0:
        limit = emit.scalar(spec.limit, dtype)
        # Not Min: WebGPU and CoreML have no kernel of it. A missing lower bound is the lowest finite number.
        gate = emit.op("Clip", gate, emit.scalar(-math.inf, dtype), limit)
        up = emit.op("Clip", up, emit.scalar(-spec.limit, dtype), limit)
    if spec.beta != 0:
        up = emit.op("Add", up, emit.scalar(spec.beta, dtype))
    return emit.op("Mul", emit_activation(emit, spec, gate, dtype, opset), up)


def _softcap(emit: Emitter, x: ir.Value, cap: float, dtype: ir.DataType) -> ir.Value:
    bound = emit.scalar(cap, dtype)
    return emit.op("Mul", emit.op("Tanh", emit.op("Div", x, bound)), bound)


def emit_activation(emit: Emitter, spec: ExpertSpec, x: ir.Value, dtype: ir.DataType, opset: int) -> ir.Value:
    """The activation alone. ORT fuses the silu and gelu chains into one kernel each."""
    if spec.activation == Activation.SILU:
        slope = x if spec.alpha == 1 else emit.op("Mul", x, emit.scalar(spec.alpha, dtype))
        return emit.op("Mul", x, emit.op("Sigmoid", slope))
    if spec.activation == Activation.SILU_SOFTCAP:
        return emit.op("Mul", _softcap(emit, x, spec.alpha, dtype), emit.op("Sigmoid", x))
    if spec.activation in (Activation.GELU, Activation.GELU_TANH):
        tanh = spec.activation == Activation.GELU_TANH
        if opset >= 20:
            return emit.op("Gelu", x, approximate="tanh" if tanh else "none")
        half = emit.op("Mul", x, emit.scalar(0.5, dtype))
        if tanh:
            cube = emit.op("Mul", emit.op("Mul", x, x), x)
            inner = emit.op("Add", x, emit.op("Mul", cube, emit.scalar(0.044715, dtype)))
            bend = emit.op("Tanh", emit.op("Mul", inner, emit.scalar(math.sqrt(2 / math.pi), dtype)))
        else:
            bend = emit.op("Erf", emit.op("Mul", x, emit.scalar(math.sqrt(0.5), dtype)))
        return emit.op("Mul", half, emit.op("Add", bend, emit.scalar(1.0, dtype)))
    positive = emit.op("Relu", x)
    return positive if spec.activation == Activation.RELU else emit.op("Mul", positive, positive)
