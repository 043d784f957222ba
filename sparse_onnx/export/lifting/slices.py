"""`rows[:sum(counts)]`: the first rows of a tensor, as many as numbers that depend on tensors add up to.

torch gives the result a length of its own, and forgets it where the pieces that it is split into say what it is.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sparse_onnx.export.lifting.known import Known
from sparse_onnx.export.lifting.program import Program, data_dependent, tracing


def first_rows(tensor: Tensor, index: Any) -> Tensor | None:
    """`tensor[:count]` with the lesser of count and length as its length; None for any other index, and for a count
    that may be negative, which torch counts from the end."""
    if not isinstance(index, slice) or index.start is not None or index.step is not None:
        return None
    count: Any = index.stop
    mode = tracing()
    if mode is None or not isinstance(count, torch.SymInt) or not data_dependent(count) or not tensor.dim():
        return None
    formula = count.node.expr
    if formula.is_Symbol or not Known(Program(mode.tracer.graph, mode.tracer.root)).from_zero(formula):
        return None
    return tensor.narrow(0, 0, torch.sym_min(count, tensor.shape[0]))
