"""Which axes of an expert's result count its tokens: rows of a batch, or whole images."""

from __future__ import annotations

import onnx_ir as ir

from sparse_onnx.matching.dims import Dims
from sparse_onnx.matching.lengths import ONE


def same_axis(dims: Dims, a: ir.Value, at: int, b: ir.Value, other: int) -> bool:
    """Whether axis `at` of the one and axis `other` of the other are of one length."""
    views = ((dims.of(a), dims.of(b)), (dims.named(a), dims.named(b)))
    for x, y in views:
        if x is None or y is None or at >= len(x) or other >= len(y):
            continue
        if x[at] is not None and x[at] == y[other]:
            return True
    return False


def leading(dims: Dims, value: ir.Value, gate: ir.Value, without: int = 0) -> int | None:
    """How many axes of the value count the tokens that the gate has one number each for; None where that is open.

    The gate has these axes alike, and then axes of length 1. `without`: an axis, counted from the right, that both
    have besides, of one length.
    """
    dimensions, own = dims.rank(value), dims.of(gate)
    if dimensions is None or own is None or dimensions != len(own):
        return None
    experts = dimensions - without
    kept = [at for at in range(dimensions) if at != experts]
    count = max((at for at, axis in enumerate(kept, 1) if own[axis] != ONE), default=1)
    if count >= len(kept):
        return None
    wanted = [*kept[:count], experts] if without else kept[:count]
    return count if all(same_axis(dims, value, axis, gate, axis) for axis in wanted) else None
