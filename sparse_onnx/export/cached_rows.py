"""Rows that are in a cache already, as operators whose sizes a trace makes no assumption about.

A length that is the difference of two axes would be taken for at least 2. What `rest` gives is a size of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import onnxscript
import torch
from torch import Tensor

_op: Any = onnxscript.opset18
_END = 2**63 - 1


@torch.library.custom_op("sparse_onnx::rest", mutates_args=())
def rest(rows: Tensor, cached: Tensor) -> Tensor:
    """Of `rows` `[batch, length, width]` those behind the first `cached.shape[2]`."""
    return rows[:, cached.shape[2] :].clone()


@rest.register_fake
def _(rows: Tensor, cached: Tensor) -> Tensor:
    count = torch.library.get_ctx().new_dynamic_size()
    return rows.new_empty(rows.shape[0], count, rows.shape[2])


@torch.library.custom_op("sparse_onnx::joined", mutates_args=())
def joined(cached: Tensor, added: Tensor, rows: Tensor) -> Tensor:
    """`cached` and `added` `[batch, heads, ., width]`, together as long as `rows` `[batch, length, .]`."""
    return torch.cat([cached, added], dim=2)


@joined.register_fake
def _(cached: Tensor, added: Tensor, rows: Tensor) -> Tensor:
    return cached.new_empty(cached.shape[0], cached.shape[1], rows.shape[1], cached.shape[3])


def _rest(rows: Any, cached: Any) -> Any:
    first = _op.Shape(cached, start=2, end=3)
    return _op.Slice(rows, first, _op.Constant(value_ints=[_END]), _op.Constant(value_ints=[1]))


def _joined(cached: Any, added: Any, rows: Any) -> Any:
    return _op.Concat(cached, added, axis=2)


#: Translations, by operator.
TABLE: dict[Any, Callable[..., Any]] = {
    torch.ops.sparse_onnx.rest.default: _rest,
    torch.ops.sparse_onnx.joined.default: _joined,
}
