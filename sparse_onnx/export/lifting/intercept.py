"""Calls of torch that C code makes, or that a rewritten call cannot see: indexing, lists read past their methods."""

from __future__ import annotations

import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from sparse_onnx.export.lifting import einsum, slices, strides, unshaped
from sparse_onnx.export.lifting.hits import Numbers
from sparse_onnx.export.lifting.program import data_dependent
from sparse_onnx.export.lifting.values import SomeItems

_NUMBERS = {
    Tensor.__index__: operator.index,
    Tensor.__int__: int,
    Tensor.__float__: float,
    Tensor.__bool__: bool,
    Tensor.item: Tensor.item,
    Tensor.tolist: Tensor.tolist,
}

#: The shape is given, and which axes are repeated is ONNX's to see.
_SHAPED = frozenset({Tensor.expand, Tensor.expand_as, torch.broadcast_to, Tensor.unsqueeze, torch.unsqueeze})
#: Element by element, so that no size matters.
_UNARY = frozenset(
    getattr(place, name)
    for place in (torch, Tensor, F)
    for name in [
        *unshaped.UNARY,
        "mish",
        "elu",
        "leaky_relu",
        "relu6",
        "selu",
        "softplus",
        "hardswish",
        "hardsigmoid",
        "hardtanh",
        "logsigmoid",
        "erf",
        "log1p",
        "expm1",
        "clamp",
        "clone",
        "float",
        "half",
        "double",
        "bool",
        "long",
        "to",
    ]
    if hasattr(place, name)
)
#: The same of two tensors, where neither is repeated along an axis whose size the trace does not know.
_BINARY = frozenset(
    getattr(Tensor, name)
    for name in [
        "add",
        "sub",
        "mul",
        "div",
        "__add__",
        "__radd__",
        "__sub__",
        "__rsub__",
        "__mul__",
        "__rmul__",
        "__truediv__",
        "__rtruediv__",
    ]
) | {torch.add, torch.sub, torch.mul, torch.div}


class Calls(TorchFunctionMode):
    """Lists of an unknown number of items are refused; constants of the trace stay constants, where torch would
    have it forget their value."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for each in (*args, *(kwargs or {}).values()):
            if isinstance(each, SomeItems) and each.place is not None:
                raise each._error()
        if func in _NUMBERS and args and (constant := _constant(args[0])) is not None:
            number: Any = _NUMBERS[func]
            return number(constant)
        if func is Tensor.__getitem__ or func is Tensor.__setitem__:
            args = (args[0], _plain(_unlisted(args[1])), *args[2:])
            if func is Tensor.__getitem__ and (rows := slices.first_rows(*args)) is not None:
                return rows
        for each in pytree.tree_leaves((args, kwargs)):
            if isinstance(each, Numbers):
                raise each.refusal()
        place = unshaped.called(func, args, kwargs or {})
        result = _made(func, args, kwargs or {})
        if place is not None:
            for each in (result, args[0] if func is Tensor.__setitem__ else None):
                if isinstance(each, Tensor):
                    unshaped.mark(each, place)
        return result


def _made(func: Any, args: Any, kwargs: Any) -> Any:
    if func is torch.functional.einsum and (made := einsum.kept(*args)) is not None:
        return made
    if func is F.batch_norm and (normed := _normed(*args, **kwargs)) is not None:
        return normed
    if func in _SHAPED or func in _UNARY or (func in _BINARY and _unbroadcast(args)):
        func = strides.quiet(func)
    return func(*args, **kwargs)


def _normed(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor | None:
    """Batch normalisation by known statistics, of rows whose number is open: torch asks whether there is one."""
    if training or running_mean is None or running_var is None or not any(map(data_dependent, input.shape)):
        return None
    if any(
        each is not None and each.dtype != input.dtype for each in (running_mean, running_var, weight, bias)
    ):
        return None
    shape = [1, -1, *[1] * (input.dim() - 2)]
    scale = torch.rsqrt(running_var + eps)
    scale = scale if weight is None else scale * weight
    shift = -running_mean * scale
    shift = shift if bias is None else shift + bias
    return input * scale.reshape(shape) + shift.reshape(shape)


def _unbroadcast(values: Any) -> bool:
    return strides.one_size([value.shape for value in values if isinstance(value, Tensor)])


def _constant(value: Any) -> Tensor | None:
    """The value of a tensor that the trace knows."""
    found = getattr(value, "constant", None) if isinstance(value, torch._subclasses.FakeTensor) else None
    return found if isinstance(found, Tensor) else None


def _unlisted(index: Any) -> Any:
    """`x[rows.tolist()]` picks what `x[rows]` does."""
    if isinstance(index, Numbers):
        return index.as_index()
    return tuple(map(_unlisted, index)) if type(index) is tuple else index


def _plain(index: Any) -> Any:
    """An index with one constant tensor of one number as that number, or as the slice that picks it."""
    parts = list(index) if isinstance(index, tuple) else [index]
    tensors = [position for position, each in enumerate(parts) if isinstance(each, (Tensor, list))]
    if len(tensors) != 1:
        return index
    constant = _constant(parts[tensors[0]])
    if (
        constant is None
        or constant.numel() != 1
        or constant.dim() > 1
        or constant.dtype in (torch.bool, torch.uint8)
    ):
        return index
    number = int(constant)
    if number < 0:
        return index
    parts[tensors[0]] = number if constant.dim() == 0 else slice(number, number + 1)
    return tuple(parts) if isinstance(index, tuple) else parts[0]
