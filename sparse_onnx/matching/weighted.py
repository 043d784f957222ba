"""Values taken apart into what is weighted and what weights it."""

from __future__ import annotations

import dataclasses

import onnx_ir as ir

from sparse_onnx.matching.dims import Dims
from sparse_onnx.matching.gate import Gate
from sparse_onnx.matching.gate_sources import uniform
from sparse_onnx.matching.gates import Gates
from sparse_onnx.matching.layout import rows_of
from sparse_onnx.matching.values import attribute, is_float, producer, scalar

_TWICE = "an expert's result is multiplied with its gate twice: the weight is applied twice"


@dataclasses.dataclass(frozen=True, eq=False)
class Weighted:
    """``[.., D]`` (or with an axis of experts) times factors, one of which is the gate.

    Attributes:
        value: what is left when the factors are taken off.
        factors: ``[.., 1]``, bool for a mask; scalars.
        gate: of one of them; None where none is a gate.
        whole: the factor that `gate` is of.
    """

    value: ir.Value
    factors: tuple[ir.Value, ...]
    gate: Gate | None
    whole: ir.Value | None


class Factors:
    """Takes factors off values."""

    def __init__(self, dims: Dims, gates: Gates) -> None:
        self.dims, self.gates = dims, gates

    def read(self, value: ir.Value, feature: int = -1, column: bool = True) -> Weighted:
        """Takes factors off that are the same for all features (the axis `feature`)."""
        factors: list[ir.Value] = []
        gate: Gate | None = None
        whole = None
        while (
            node := producer(value, "Mul", "Where", "Cast", "Unsqueeze", "Squeeze", "Identity")
        ) is not None:
            source = node.inputs[0]
            if node.op_type in ("Cast", "Identity", "Unsqueeze", "Squeeze"):
                # Shapes matter to an axis of experts; a term without one is read up to its rows' shape.
                if source is None or not _carries(node, column and feature == -1):
                    break
                if not factors or node.op_type in ("Cast", "Identity"):
                    value = source
                    continue
                break
            taken = self._factor(node, feature, column)
            if taken is None:
                break
            value, factor, found = taken
            factors.append(factor)
            if found is None:
                continue
            if (
                gate is not None
                and gate.sparse
                and found.sparse
                and not _is_mask(gate, whole)
                and not _is_mask(found, factor)
            ):
                found = dataclasses.replace(found, flaw=_TWICE)
            better = not found.flaw and gate is not None and (bool(gate.flaw) or _is_mask(gate, whole))
            if gate is None or better or found.flaw == _TWICE:
                gate, whole = found, factor
        return Weighted(value, tuple(factors), gate, whole)

    def _factor(
        self, node: ir.Node, feature: int, column: bool
    ) -> tuple[ir.Value, ir.Value, Gate | None] | None:
        if node.op_type == "Where":
            mask, rest, zero = node.inputs
            if mask is None or rest is None or uniform(zero) != 0 or self.dims.size(mask, feature) != 1:
                return None
            if not self.dims.covers(rest, mask) or (zero is not None and not self.dims.covers(rest, zero)):
                return None
            return rest, mask, self._gate(mask, column)
        a, b = node.inputs
        if a is None or b is None:
            return None
        choices = [
            (x, y) for x, y in ((a, b), (b, a)) if self.dims.size(y, feature) == 1 or scalar(y) is not None
        ]
        for x, y in choices:
            found = self._gate(y, column)
            if found is not None:
                return x, y, found
        return (*choices[0], None) if choices and self.dims.covers(*choices[0]) else None

    def _gate(self, value: ir.Value, column: bool) -> Gate | None:
        gate = self.gates.read(value)
        if gate is None or (gate.column is not None) != column or (gate.expert is None) != column:
            return None
        return gate


def _is_mask(gate: Gate, factor: ir.Value | None) -> bool:
    """Whether the gate is 0 or 1: it chooses, and does not weight."""
    if factor is not None and factor.dtype == ir.DataType.BOOL:
        return True
    return gate.inside == 1.0 and not isinstance(gate.inside, ir.Value)


def _carries(node: ir.Node, rows_only: bool) -> bool:
    """Whether a term may be read behind the node: a cast between floats, or a reshape of rows."""
    if node.op_type == "Identity":
        return True
    if node.op_type == "Cast":
        source = node.inputs[0]
        return source is not None and is_float(source.dtype) and is_float(attribute(node, "to"))
    source = node.inputs[0]
    return rows_only and source is not None and rows_of(node.outputs[0]) is not node.outputs[0]
