"""Translations of torch operators that torch's ONNX exporter lacks, or gets wrong."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import onnxscript
import torch

_op: Any = onnxscript.opset18


def _stable_sort(self: Any, stable: bool | None = None, dim: int = -1, descending: bool = False) -> Any:
    """TopK gives equal elements in order of their index."""
    axis = _op.Constant(value_ints=[dim])
    count = _op.Gather(_op.Shape(self), axis)
    return _op.TopK(self, count, axis=dim, largest=int(descending), sorted=1)


def _conv3d(self: Any, weight: Any, bias: Any = None, *args: Any, **kwargs: Any) -> Any:
    """onnxscript 0.7 makes `[channels, 2]` zeros of a bias that is not there, which ONNX Runtime refuses."""
    from onnxscript.function_libs.torch_lib.ops.core import aten_conv3d

    if bias is None:
        bias = _op.Expand(_op.CastLike(0.0, self), _op.Shape(weight, start=0, end=1))
    return aten_conv3d(self, weight, bias, *args, **kwargs)


def _reshaped(tensors: Sequence[Any], shape: list[int], least: int) -> list[Any]:
    return [
        each if len(each.shape) >= least else _op.Reshape(each, _op.Constant(value_ints=shape))
        for each in tensors
    ]


def _vstack(tensors: Sequence[Any]) -> Any:
    """onnxscript makes lists of these and the next ones, which ONNX does not define for bfloat16."""
    return _op.Concat(*_reshaped(tensors, [1, -1], 2), axis=0)


def _hstack(tensors: Sequence[Any]) -> Any:
    tensors = _reshaped(tensors, [-1], 1)
    return _op.Concat(*tensors, axis=min(1, len(tensors[0].shape or ()) - 1))


#: By operator.
TABLE: dict[Any, Callable[..., Any]] = {
    torch.ops.aten.sort.stable: _stable_sort,
    torch.ops.aten.conv3d.default: _conv3d,
    torch.ops.aten.vstack.default: _vstack,
    torch.ops.aten.hstack.default: _hstack,
}
