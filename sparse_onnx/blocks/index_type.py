"""The integer type that a lowering computes experts' indices in: some providers have no kernels for int64."""

from __future__ import annotations

import onnx_ir as ir

from sparse_onnx.core.errors import UsageError
from sparse_onnx.graph.build import Emitter

INDEX_TYPES = ("int64", "int32")


def require_index_type(name: str, index: str) -> None:
    """
    Raises:
        UsageError: no such type.
    """
    if index not in INDEX_TYPES:
        raise UsageError(f"pass '{name}': index={index} is not one of {', '.join(INDEX_TYPES)}")


def emit_index(emit: Emitter, expert_index: ir.Value, index: str) -> ir.Value:
    """`expert_index [T, K]` in that type. It is int64 in the neutral form, and counts experts."""
    if index == "int64":
        return expert_index
    value = emit.op("Cast", expert_index, to=ir.DataType.INT32)
    value.dtype, value.shape = ir.DataType.INT32, expert_index.shape
    return value
