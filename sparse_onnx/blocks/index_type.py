"""The integer type that a lowering computes experts' indices in: some providers have no kernels for int64."""

from __future__ import annotations

import dataclasses

import onnx_ir as ir

from sparse_onnx.blocks.lowering import Lowering
from sparse_onnx.core.errors import UsageError
from sparse_onnx.graph.build import Emitter

INDEX_TYPES = ("int64", "int32")


@dataclasses.dataclass(frozen=True)
class IndexedLowering(Lowering):
    """A form with the type of its indices as an option."""

    index: str = dataclasses.field(
        default=INDEX_TYPES[0],
        metadata={
            "help": "type that the experts' indices are computed in: int64, or int32 where that is not run"
        },
    )

    def __post_init__(self) -> None:
        """
        Raises:
            UsageError: no such type.
        """
        if self.index not in INDEX_TYPES:
            raise UsageError(f"pass '{self.name}': index={self.index} is not one of {', '.join(INDEX_TYPES)}")

    @property
    def label(self) -> str:
        return self.form if self.index == INDEX_TYPES[0] else f"{self.form}:index={self.index}"


def emit_index(emit: Emitter, expert_index: ir.Value, index: str) -> ir.Value:
    """`expert_index [T, K]` in that type. It is int64 in the neutral form, and counts experts."""
    if index == "int64":
        return expert_index
    value = emit.op("Cast", expert_index, to=ir.DataType.INT32)
    value.dtype, value.shape = ir.DataType.INT32, expert_index.shape
    return value
