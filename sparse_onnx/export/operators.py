"""Translations of torch operators that torch's ONNX exporter lacks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import onnxscript
import torch

_op: Any = onnxscript.opset18


def _stable_sort(self: Any, stable: bool | None = None, dim: int = -1, descending: bool = False) -> Any:
    """TopK gives equal elements in order of their index."""
    axis = _op.Constant(value_ints=[dim])
    count = _op.Gather(_op.Shape(self), axis)
    return _op.TopK(self, count, axis=dim, largest=int(descending), sorted=1)


#: By operator.
TABLE: dict[Any, Callable[..., Any]] = {torch.ops.aten.sort.stable: _stable_sort}
