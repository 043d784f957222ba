"""A matrix of 8-bit rows for com.microsoft::DynamicQuantizeMatMul, a product of integers.

    y = ((round(x / s) + z) - z) s  @  W * scale        s, z: one scale and zero point for all rows of the operand

The operator takes `[K, N]` int8 with one scale an output, so the stored rows are turned when they are written, and lose
their offset of 128. At 64 rows and more it is the fastest product of ORT on CPU (measured on ORT 1.32 with AVX512-VNNI:
2 times MatMulNBits at accuracy level 4).

Activations are rounded to 8 bits with one scale for all rows of the operand, which are the tokens of one expert. So
a token's result depends on which others come with it: the same token in another batch, or with other tokens at its
expert, gives another rounding, and one token with huge activations coarsens those of all others at its expert (an
infinite one makes them NaN). Measured: off by 7e-3 to 1e-2 of the results' root mean square on normal activations.

x86 processors without VNNI multiply such operands by an instruction that saturates (session option
`session.x64quantprecision`); where the model must run on these, MatMulNBits is the right product.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import onnx_ir as ir

from sparse_onnx.blocks.nbits import DOMAIN
from sparse_onnx.blocks.quantized import Quantized
from sparse_onnx.graph.build import Emitter
from sparse_onnx.graph.external import read_array
from sparse_onnx.graph.retyped import retyped
from sparse_onnx.graph.stacked import computed, stored

_MIDDLE = 128


@dataclasses.dataclass(frozen=True, eq=False)
class Rows:
    """Inputs of DynamicQuantizeMatMul: int8 ``[K, N]`` and scales ``[N]``, read and turned when they are written."""

    data: ir.TensorProtocol
    scales: ir.TensorProtocol

    @staticmethod
    def of(weight: Quantized) -> Rows:
        """Of one expert's matrix ``[N, K]`` without an `obstacle`."""
        outputs, inputs = weight.shape
        name = weight.data.name or "weight"
        data = computed(_Turned(), [weight.data], ir.DataType.INT8, (inputs, outputs), name)
        scales = retyped(weight.scale, weight.scale.dtype, (outputs,), f"{name}.scales")
        return Rows(data, scales)


@dataclasses.dataclass(frozen=True)
class _Turned:
    def __call__(self, *arrays: np.ndarray) -> np.ndarray:
        [codes] = arrays
        return (codes ^ np.uint8(_MIDDLE)).view(np.int8).T if codes.dtype == np.uint8 else codes.T


def obstacle(weight: Quantized) -> str:
    """Why the operator cannot multiply by a matrix ``[..., N, K]`` of rows of inputs; empty where it can."""
    last = len(weight.shape) - 1
    if weight.data.dtype not in (ir.DataType.INT8, ir.DataType.UINT8):
        return f"its weights have {weight.data.dtype.bitwidth} bits, not 8"
    if weight.axis != last or weight.block < weight.shape[-1]:
        return "its weights do not have one scale a row"
    if weight.dtype != ir.DataType.FLOAT:
        return f"the integer product takes float32 activations, not {weight.dtype.name.lower()}"
    unsigned = weight.data.dtype == ir.DataType.UINT8
    middle = _MIDDLE if unsigned else 0
    zeros = weight.zero_point
    if (zeros is None and unsigned) or (zeros is not None and not _all_equal(zeros, middle)):
        return "its zero points are not all in the middle of the range"
    return ""


def emit_dynamic(
    emit: Emitter, rows: ir.Value, data: ir.Value, scales: ir.Value, bias: ir.Value | None
) -> ir.Value:
    """``rows [n, K] -> [n, N]``; n may be 0, which reads no weights."""
    inputs = [rows, data, scales] if bias is None else [rows, data, scales, None, bias]
    return emit.op("DynamicQuantizeMatMul", *inputs, domain=DOMAIN)


def _all_equal(zeros: ir.TensorProtocol, number: int) -> bool:
    parts = {id(part): part for part in stored(zeros)}.values()  # of a stack, one part may be all
    if any(isinstance(part, ir.LazyTensor) for part in parts):
        return False  # computed from the weights, and so not the same for all of them
    return all(bool((read_array(part) == number).all()) for part in parts)
