"""Weights as what is to be computed from a checkpoint: stored tensors, and operators of torch on them.

transformers changes a checkpoint while loading it: single experts become packed tensors, gate and up projections one
matrix, types are converted. Here such changes are noted, not made. `take` goes through them, so that one expert of a
packed tensor, or some rows of a matrix, are read without the rest.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import mmap
import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.utils._pytree import tree_map

from sparse_onnx.core.errors import ModelError
from sparse_onnx.export.checkpoint.index import Entry
from sparse_onnx.graph.external import check_range
from sparse_onnx.graph.text import quoted

aten = torch.ops.aten

#: Change no element's place.
_ELEMENTWISE = (aten._to_copy.default, aten.clone.default, aten.detach.default, aten.alias.default)
_VIEWS = (aten.view.default, aten._unsafe_view.default, aten.reshape.default)
_SPLITS = (aten.split.Tensor, aten.split_with_sizes.default)


class Expression:
    """`meta` has shape, strides and type of the value, on the meta device."""

    meta: torch.Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.meta.shape)

    @property
    def dtype(self) -> torch.dtype:
        return self.meta.dtype

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclasses.dataclass(frozen=True, eq=False)
class Leaf(Expression):
    """A stored tensor, or rows of one."""

    entry: Entry

    @functools.cached_property
    def meta(self) -> torch.Tensor:  # type: ignore[override]
        return torch.empty(self.entry.shape, dtype=self.entry.dtype, device="meta")


@dataclasses.dataclass(frozen=True, eq=False)
class Applied(Expression):
    """`function(*args, **kwargs)`, or output `output` of it; arguments are expressions where the function has
    tensors."""

    function: Any
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    output: int | None
    meta: torch.Tensor


def apply(function: Any, *args: Any, **kwargs: Any) -> Any:
    """The expression of a call, or a list of them where the function gives several tensors. Nothing is computed."""
    kwargs = {key: given for key, given in kwargs.items() if key not in ("device", "layout", "pin_memory")}
    result = function(*tree_map(_meta, args), **tree_map(_meta, kwargs))
    if isinstance(result, torch.Tensor):
        return Applied(function, args, kwargs, None, result)
    return [Applied(function, args, kwargs, at, each) for at, each in enumerate(result)]


def _meta(given: Any) -> Any:
    if isinstance(given, Expression):
        return given.meta
    return given.to("meta") if isinstance(given, torch.Tensor) else given


def value(expression: Expression) -> torch.Tensor:
    """Computes it. A stored tensor is mapped from its file, all others are in memory.

    Raises:
        ModelError: a weights file is gone, or became shorter.
    """
    if isinstance(expression, Leaf):
        return _mapped(expression.entry)
    assert isinstance(expression, Applied)
    args, kwargs = tree_map(_value, expression.args), tree_map(_value, dict(expression.kwargs))
    with torch.no_grad():
        result = expression.function(*args, **kwargs)
    return result if expression.output is None else result[expression.output]


def _value(given: Any) -> Any:
    return value(given) if isinstance(given, Expression) else given


def _mapped(entry: Entry) -> torch.Tensor:
    """A copy-on-write mapping, which dies with the tensor."""
    if not entry.nbytes:
        return torch.empty(entry.shape, dtype=entry.dtype)
    name = os.path.basename(entry.path)
    try:
        descriptor = os.open(entry.path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise ModelError(f"weights file {quoted(name)} cannot be opened: {error.strerror}") from None
    try:
        check_range(entry.name, entry.offset, entry.nbytes, name, os.fstat(descriptor).st_size)
        skipped = entry.offset % mmap.ALLOCATIONGRANULARITY
        mapping = mmap.mmap(
            descriptor, skipped + entry.nbytes, access=mmap.ACCESS_COPY, offset=entry.offset - skipped
        )
    finally:
        os.close(descriptor)
    if skipped % entry.dtype.itemsize:  # torch's kernels want whole elements
        return torch.frombuffer(bytearray(mapping[skipped:]), dtype=entry.dtype).reshape(entry.shape)
    count = math.prod(entry.shape)
    return torch.frombuffer(mapping, dtype=entry.dtype, count=count, offset=skipped).reshape(entry.shape)


def simplified(expression: Expression) -> Expression:
    """Without copies that change neither type nor place."""
    while isinstance(expression, Applied) and expression.function in _ELEMENTWISE:
        source = expression.args[0]
        if (source.dtype, source.meta.stride()) != (expression.dtype, expression.meta.stride()):
            break
        expression = source
    return expression


def uncast(expression: Expression) -> Expression:
    """Without conversions of type, which give the same for each element wherever it lies."""
    while isinstance(expression, Applied) and expression.function in _ELEMENTWISE:
        expression = expression.args[0]
    return expression


def take(expression: Expression, at: int | slice) -> Expression:
    """``expression[at]`` along the first axis; only what it needs is read where its operators allow that.

    Args:
        expression: of rank 1 or more.
        at: 0 <= at < N, or a slice with start and stop in that range and without step.
    """
    if isinstance(expression, Leaf):
        return _taken(expression, at)
    assert isinstance(expression, Applied)
    empty = isinstance(at, slice) and at.start >= at.stop
    pushed = None if empty else _pushed(expression, at)
    if pushed is not None:
        return pushed
    if isinstance(at, int):
        return apply(aten.select.int, expression, 0, at)
    return apply(aten.slice.Tensor, expression, 0, at.start, at.stop)


def _taken(leaf: Leaf, at: int | slice) -> Leaf:
    entry = leaf.entry
    row = entry.nbytes // max(1, entry.shape[0])
    first = at if isinstance(at, int) else at.start
    shape = entry.shape[1:] if isinstance(at, int) else (at.stop - at.start, *entry.shape[1:])
    return Leaf(dataclasses.replace(entry, offset=entry.offset + first * row, shape=shape))


def _pushed(expression: Applied, at: int | slice) -> Expression | None:
    """The operator on slices of its arguments; None where a slice needs all of them."""
    function, args, kwargs = expression.function, expression.args, expression.kwargs
    gone = int(isinstance(at, int))
    if function in _ELEMENTWISE:
        if kwargs.get("memory_format") not in (None, torch.preserve_format, torch.contiguous_format):
            return None
        return apply(function, take(args[0], at), **kwargs)
    if kwargs:
        return None
    rank = len(expression.shape)
    if function is aten.stack.default:
        axis = _axis(args, 1, rank)
        if axis:
            return apply(function, [take(each, at) for each in args[0]], axis - gone)
        return args[0][at] if isinstance(at, int) else apply(function, args[0][at], 0)
    if function is aten.cat.default:
        axis = _axis(args, 1, rank)
        if axis:
            return apply(function, [take(each, at) for each in args[0]], axis - gone)
        return _of_joined(args[0], at)
    if function is aten.transpose.int:
        first, second = args[1] % rank, args[2] % rank
        return apply(function, take(args[0], at), first - gone, second - gone) if first and second else None
    if function is aten.permute.default:
        order = [axis % rank for axis in args[1]]
        if order[0]:
            return None
        return apply(function, take(args[0], at), [axis - 1 for axis in order[1:]] if gone else order)
    if function in _VIEWS:
        return _of_view(expression, at)
    if function in _SPLITS:
        axis = _axis(args, 2, rank)
        if axis and expression.output is not None:
            return apply(function, take(args[0], at), args[1], axis - gone)[expression.output]
        return None
    if function is aten.slice.Tensor:
        axis = _axis(args, 1, rank)
        return apply(function, take(args[0], at), axis - gone, *args[2:]) if axis else None
    return None


def _axis(args: Sequence[Any], position: int, rank: int) -> int:
    return int(args[position]) % rank if len(args) > position else 0


def _of_joined(parts: Sequence[Expression], at: int | slice) -> Expression:
    """A slice of tensors that lie one behind the other along the first axis."""
    found, start = [], 0
    first, last = (at, at + 1) if isinstance(at, int) else (at.start, at.stop)
    for part in parts:
        size = part.shape[0]
        low, high = max(first - start, 0), min(last - start, size)
        if low < high:
            found.append(take(part, low if isinstance(at, int) else slice(low, high)))
        start += size
    return found[0] if len(found) == 1 else apply(aten.cat.default, found, 0)


def _of_view(expression: Applied, at: int | slice) -> Expression | None:
    source, shape = expression.args[0], expression.shape
    if not source.shape or source.shape[0] != shape[0]:
        return None
    sizes = [*shape[1:]] if isinstance(at, int) else [at.stop - at.start, *shape[1:]]
    return apply(expression.function, take(source, at), sizes)
