"""From a value for each slot to one for each token: reshaped, weighted, summed over the slots."""

from __future__ import annotations

import onnx_ir as ir

from sparse_onnx.matching.dims import Dims
from sparse_onnx.matching.hit_weights import Weight
from sparse_onnx.matching.layout import flat
from sparse_onnx.matching.lengths import ONE, Length, Lengths
from sparse_onnx.matching.values import attribute, axes, pairs

_SHAPED = ("Reshape", "Squeeze", "Unsqueeze", "Flatten", "Identity")


def slot_sum(slots: ir.Value, top_k: int, dims: Dims) -> tuple[ir.Value, Weight | None] | None:
    """(sum ``[T, D]``, weights) of ``[T * K, D]``: by ReduceSum, behind a product with weights or not, or by MatMul."""
    value, weight = slots, None
    turned: ir.Value | None = None
    for _ in range(8):
        use = _reader(value)
        if use is None or use.domain:
            return None
        result = use.outputs[0]
        if use.op_type in _SHAPED:
            value = result
            if turned is not None and _rows(dims, value) == _rows(dims, turned):
                return value, weight
            continue
        if turned is not None:
            return None
        lengths = dims.of(value)
        if lengths is None:
            return None
        if use.op_type == "Mul" and weight is None:
            weight = _factor(use, value, lengths, dims)
            if weight is None:
                return None
            value = result
        elif use.op_type == "ReduceSum" and not attribute(use, "keepdims", 1):
            found = axes(use)
            summed = found is not None and [at % len(lengths) for at in found] == [len(lengths) - 2]
            return (result, weight) if summed and lengths[-2] == Length(top_k) and len(lengths) == 3 else None
        elif (
            use.op_type == "MatMul"
            and weight is None
            and use.inputs[1] is value
            and use.inputs[0] is not None
        ):
            factor = dims.of(use.inputs[0])
            if (
                factor is None
                or factor != (*lengths[:-2], ONE, Length(top_k))
                or lengths[-2] != Length(top_k)
            ):
                return None
            weight, value, turned = Weight(flat(use.inputs[0])), result, result
        else:
            return None
    return None


def _reader(value: ir.Value) -> ir.Node | None:
    """The only node that reads more than the value's shape."""
    readers = [use.node for use in value.uses() if use.node.op_type != "Shape"]
    return readers[0] if len(readers) == 1 and not value.is_graph_output() else None


def _rows(dims: Dims, value: ir.Value) -> list[Length] | None:
    """Axes but those of length 1, of a value of rank 2 (or of any other that is not)."""
    found = dims.of(value)
    return None if found is None else [length for length in found if length != ONE]


def _factor(use: ir.Node, value: ir.Value, lengths: Lengths, dims: Dims) -> Weight | None:
    for one, other in pairs(use):
        found = dims.of(other)
        if one is value and found is not None and found == (*lengths[:-1], ONE):
            return Weight(flat(other))
    return None
