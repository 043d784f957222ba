"""A replacement against the module that it is to replace, on the values that the module was called with and others."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from sparse_onnx.export import experts
from sparse_onnx.export.sources import leaves

Call = tuple[tuple[Any, ...], dict[str, Any]]
_DRAWS = 2


def copied(call: Call) -> Call:
    """The same values: a module may write into what it is given."""
    return torch.utils._pytree.tree_map(
        lambda value: value.clone() if isinstance(value, Tensor) else value, call
    )


def drawn(call: Call) -> list[Call]:
    """The same call with its first floating-point tensor drawn anew, normal with its mean and deviation."""
    values, tree = torch.utils._pytree.tree_flatten(call)
    first = next(
        (i for i, value in enumerate(values) if isinstance(value, Tensor) and value.is_floating_point()), None
    )
    if first is None or values[first].numel() < 2:
        return []
    example = values[first]
    mean, deviation = example.double().mean(), example.double().std()
    calls = []
    for seed in range(_DRAWS):
        generator = torch.Generator().manual_seed(seed)
        normal = torch.randn(example.shape, dtype=torch.float64, generator=generator)
        value = (normal.to(example.device) * deviation + mean).to(example.dtype)
        calls.append(torch.utils._pytree.tree_unflatten([*values[:first], value, *values[first + 1 :]], tree))
    return calls


def error(expected: Any, actual: Any) -> tuple[float, float]:
    """The largest error of any output, relative to its row, and how much is accepted in its type; infinite where the
    outputs are of other number, shape or type."""
    left, right = leaves(expected), leaves(actual)
    if len(left) != len(right):
        return float("inf"), 0.0
    worst, accepted = 0.0, 0.0
    for one, other in zip(left, right, strict=True):
        if one.shape != other.shape or one.dtype != other.dtype:
            return float("inf"), 0.0
        value = experts.row_error(_rows(one), _rows(other))
        limit = experts.tolerance(_real(one).dtype)
        if value > limit or value > worst:
            worst, accepted = value, limit
        if value > limit:
            break
    return worst, accepted


def answer(module: nn.Module, call: Call) -> Any:
    args, kwargs = copied(call)
    with torch.no_grad():
        return module(*args, **kwargs)


def _real(value: Tensor) -> Tensor:
    return torch.view_as_real(value) if value.is_complex() else value


def _rows(value: Tensor) -> Tensor:
    value = _real(value)
    return value.reshape(-1, value.shape[-1]) if value.dim() else value.reshape(1, 1)
