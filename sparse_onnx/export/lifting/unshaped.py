"""Tensors that have no elements on one side of a branch, and there another number of axes than in the trace.

`torch.cat(outs) if outs else x.new_empty(0)`: where no expert has rows the model has a tensor of shape [0], the graph
one of shape [0, width]. That is one value for what asks only for elements, and for what brings a shape of its own.
Everything else would be answered by the trace's shape, and is refused.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils import _pytree as pytree

from sparse_onnx.core.errors import ImpossibleError
from sparse_onnx.export.lifting.values import Place, refuse

_PLACE = "_sparse_onnx_unshaped"
#: As it is where transformers has put its own in place of `Tensor.reshape`.
RESHAPE = torch._C.TensorBase.reshape


def _named(*names: str) -> frozenset[Any]:
    found = (
        getattr(place, name, None) for place in (torch, Tensor, torch._C.TensorBase, F) for name in names
    )
    return frozenset(each for each in found if each is not None)


def _property(name: str) -> Any:
    return getattr(Tensor, name).__get__


#: The same for each tensor without elements, whatever its shape, when they reduce all of it.
_WHOLE = _named("sum", "mean", "prod", "any", "all", "count_nonzero")
#: Their result has the shape that they are given; its axes that they are to find out follow from the elements' number.
_GIVEN_SHAPE = _named("view", "reshape", "view_as", "reshape_as")
#: Of each element by itself, under these names in torch, Tensor or torch.nn.functional.
UNARY = (
    "relu",
    "gelu",
    "silu",
    "sigmoid",
    "tanh",
    "exp",
    "log",
    "sqrt",
    "rsqrt",
    "abs",
    "neg",
    "square",
    "dropout",
)
_ABOUT_NO_SHAPE = _named("numel", "nelement", "is_floating_point", "is_complex", "untyped_storage") | {
    _property(name) for name in ("dtype", "device", "layout", "requires_grad", "is_sparse", "is_quantized")
}
#: Without elements, and of as many axes as before; of two tensors, of those that broadcasting gives.
_KEEPING = _named(
    *UNARY,
    *("clamp", "clone", "contiguous", "detach", "float", "half", "double", "bool", "long", "int", "bfloat16"),
    *(
        "to",
        "type",
        "type_as",
        "nan_to_num",
        "empty_like",
        "zeros_like",
        "ones_like",
        "add",
        "sub",
        "mul",
        "div",
    ),
    *("add_", "sub_", "mul_", "div_", "__add__", "__radd__", "__sub__", "__rsub__", "__mul__", "__rmul__"),
    *("__truediv__", "__rtruediv__", "__iadd__", "__isub__", "__imul__", "__itruediv__", "__neg__"),
)


def mark(tensor: Tensor, place: Place) -> None:
    """From now on the tensor is one whose shape nobody may ask for."""
    setattr(tensor, _PLACE, place)


def place_of(value: Any) -> Place | None:
    """Where such a tensor comes from; None for all other values."""
    return getattr(value, "__dict__", {}).get(_PLACE) if isinstance(value, Tensor) else None


def place_of_any(values: Any) -> Place | None:
    return next((place for each in pytree.tree_leaves(values) if (place := place_of(each)) is not None), None)


def is_patched_view(function: Any) -> bool:
    """Whether a method is `view` or `reshape` as transformers puts it: it asks for strides, to copy what is not
    contiguous, which the values of the result do not depend on."""
    inner = getattr(function, "__func__", None)
    return inner is not None and inner in (Tensor.view, Tensor.reshape)


def refusal(place: Place) -> ImpossibleError:
    return refuse(
        place,
        "depends on tensor values and gives a tensor of other axes where nothing is selected, which what follows shows",
        "give both sides the same axes, such as x.new_empty(0, width), or write an adapter (--adapter)",
    )


def called(func: Any, args: Any, kwargs: Any) -> Place | None:
    """Of a call that takes such a tensor: the place that its results have, too; None where they have their own shape.

    Raises:
        ImpossibleError: the call asks for the tensor's shape.
    """
    place = place_of_any((args, kwargs))
    if place is None or func in _ABOUT_NO_SHAPE:
        return None
    own = place_of(args[0]) is not None if args else False
    if func in _WHOLE and len(args) == 1 and not set(kwargs) - {"dtype"}:
        return None
    if func is Tensor.size and args[1:] == (0,) and not kwargs:  # no rows in either form
        return None
    if func is Tensor.flatten and len(args) == 1 and not kwargs:
        return None
    given_shape = func in _GIVEN_SHAPE or func in (
        Tensor.view,
        Tensor.reshape,
    )  # those may be transformers' own
    if given_shape and own and not any(isinstance(each, torch.dtype) for each in args):
        return None
    if func in _KEEPING and not _writes_elsewhere(func, args, own):
        return place
    if func is Tensor.__setitem__ and own and place_of_any(args[1]) is None:
        return place  # nothing there to be written to
    raise refusal(place)


def _writes_elsewhere(func: Any, args: Any, own: bool) -> bool:
    name = getattr(func, "__name__", "")
    in_place = (name.endswith("_") and not name.endswith("__")) or name.startswith("__i")
    return in_place and not own
