"""Python's and torch's functions on sizes that are symbols in the trace, where they would fix the traced size."""

from __future__ import annotations

import builtins
import dataclasses
import functools
import logging
import math
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import Tensor

from sparse_onnx.export.lifting import hits, kinds, texts, unshaped
from sparse_onnx.export.lifting.arrays import Array
from sparse_onnx.export.lifting.program import Sym, data_dependent, tracing
from sparse_onnx.export.lifting.values import Count, Place, SomeItems, refuse

if TYPE_CHECKING:
    from sparse_onnx.export.lifting.runtime import Runtime

_SYMBOLIC = (torch.SymInt, torch.SymFloat)
_MAX, _MIN = builtins.max, builtins.min
_DTYPES = {bool: torch.bool, int: torch.int64, float: None}
_STATIC = "use tensor operations, or make that axis static"


def find(function: Any, runtime: Runtime, place: Place) -> Callable[..., Any] | None:
    """The function to call in its stead; None: that one as it is."""
    owner, name = getattr(function, "__self__", None), getattr(function, "__name__", "")
    if isinstance(owner, Tensor) and name in _OF_TENSORS:
        made = _OF_TENSORS[name]
        return lambda *args, **kwargs: made(runtime, place, function, owner, *args, **kwargs)
    if isinstance(owner, type) and issubclass(owner, torch.autograd.Function) and name == "apply":
        return functools.partial(_applied, runtime, place, owner)
    if isinstance(owner, logging.Logger) and name in _PRINTING:
        return lambda *args, **kwargs: _printed(runtime, place, function, *args, **kwargs)
    if isinstance(owner, str) and name in ("format", "join"):
        made_text = _format if name == "format" else _join
        return functools.partial(made_text, runtime, place, function)
    if unshaped.place_of(owner) is not None and unshaped.is_patched_view(function):
        return functools.partial(unshaped.RESHAPE, owner)
    try:
        known = _FUNCTIONS.get(_plain(function))
    except TypeError:  # not hashable
        return None
    if known is None:
        return None
    return lambda *args, **kwargs: known(runtime, place, function, *args, **kwargs)


def _plain(function: Any) -> Any:
    """Python's own `max` and `min`, which torch's export puts others for."""
    if function is builtins.max:
        return _MAX
    return _MIN if function is builtins.min else function


def _depends(runtime: Runtime, value: Any) -> bool:
    return isinstance(value, Tensor) and runtime._depends(value)


def _int(runtime: Runtime, place: Place, plain: Any, *args: Any, **kwargs: Any) -> Any:
    value: Any = args[0] if len(args) == 1 and not kwargs else None
    if isinstance(value, torch.SymFloat):
        return math.trunc(value)
    if isinstance(value, torch.SymInt):
        return value
    if isinstance(value, torch.SymBool):
        return torch.sym_ite(value, 1, 0)
    if _depends(runtime, value):
        return _item(
            runtime, place, None, value.trunc().long() if value.is_floating_point() else value.long()
        )
    return plain(*args, **kwargs)


def _float(runtime: Runtime, place: Place, plain: Any, *args: Any) -> Any:
    value: Any = args[0] if len(args) == 1 else None
    if isinstance(value, _SYMBOLIC):
        return torch.sym_float(value)
    return _item(runtime, place, None, value.double()) if _depends(runtime, value) else plain(*args)


def _bool(runtime: Runtime, place: Place, plain: Any, *args: Any) -> Any:
    value = args[0] if len(args) == 1 else None
    if args and runtime._depends(value):
        return runtime._as_truth(value, place)
    return plain(*args)


def _len(runtime: Runtime, place: Place, plain: Any, value: Any) -> Any:
    if unshaped.place_of(value) is not None:
        return value.size(0)
    if isinstance(value, Tensor) and tracing() is not None and value.dim():
        return value.shape[0]
    if isinstance(value, hits.Numbers):
        return value.tensor.shape[0]
    if isinstance(value, SomeItems) and value.place is not None:
        return Count(value)
    return plain(value)


def _number(runtime: Runtime, place: Place, value: Any) -> Any:
    """A tensor of one integer as that integer, which is compared and counted with alike."""
    whole = isinstance(value, Tensor) and not value.is_floating_point() and value.dtype != torch.bool
    return (
        _item(runtime, place, None, value)
        if whole and not value.dim() and _depends(runtime, value)
        else value
    )


def _extreme(join: Any) -> Any:
    def extreme(runtime: Runtime, place: Place, plain: Any, *args: Any, **kwargs: Any) -> Any:
        values = args
        if len(args) == 1 and isinstance(args[0], (list, tuple)):
            values = tuple(args[0])
        values = tuple(_number(runtime, place, each) for each in values)
        if kwargs or len(values) < 2 or not any(isinstance(each, Sym) for each in values):
            return plain(*args, **kwargs)
        if any(isinstance(each, Tensor) for each in values):
            return plain(*args)
        result = values[0]
        for each in values[1:]:
            result = join(result, each)
        return result

    return extreme


def _range(runtime: Runtime, place: Place, plain: Any, *args: Any) -> Any:
    for each in args:
        if isinstance(each, torch.SymInt) and each.node.expr.free_symbols:
            what = "a number that depends on tensor values" if data_dependent(each) else "a dynamic axis"
            raise refuse(place, f"loops in Python over {what}", _STATIC)
        if _depends(runtime, each):
            raise refuse(place, "loops in Python over a number that depends on tensor values", _STATIC)
    return plain(*args)


def _one_hot(runtime: Runtime, place: Place, plain: Any, tensor: Any, num_classes: Any = -1) -> Any:
    """Of a symbolic number of classes: a comparison with each of them. What torch refuses, an index out of
    range, gives zeros."""
    if _depends(runtime, num_classes):
        num_classes = _item(runtime, place, None, num_classes.long())
    if not isinstance(num_classes, torch.SymInt):
        return plain(tensor, num_classes)
    count: Any = num_classes
    classes = torch.arange(count, device=tensor.device, dtype=tensor.dtype)
    return (tensor.unsqueeze(-1) == classes).to(torch.int64)


def _tensor(runtime: Runtime, place: Place, plain: Any, *args: Any, **kwargs: Any) -> Any:
    """`torch.tensor(capacity)`; and on one side of a branch `torch.tensor(3)`, whose constant no graph of a condition
    can hold."""
    value: Any = args[0] if args else None
    if runtime.open and type(value) in _DTYPES and not set(kwargs) - {"dtype", "device"}:
        dtype = kwargs.get("dtype") or _DTYPES[type(value)] or torch.get_default_dtype()
        return torch.full((), value, dtype=dtype, device=kwargs.get("device"))
    if isinstance(value, _SYMBOLIC) and not set(kwargs) - {"dtype", "device"}:
        default = torch.int64 if isinstance(value, torch.SymInt) else torch.get_default_dtype()
        number: Any = value
        return torch.scalar_tensor(number, dtype=kwargs.get("dtype") or default, device=kwargs.get("device"))
    return plain(*args, **kwargs)


def _zip_like(runtime: Runtime, place: Place, plain: Any, *args: Any, **kwargs: Any) -> Any:
    if plain is zip and len(args) > 1 and (joined := SomeItems.side_by_side(args)) is not None:
        return joined
    for each in args:
        if isinstance(each, hits.Numbers) or (isinstance(each, Tensor) and hits.of(each, runtime, place)):
            raise refuse(
                place, "loops over tensor values", "loop over all experts, or write an adapter (--adapter)"
            )
    return plain(*args, **kwargs)


def _sorted(runtime: Runtime, place: Place, plain: Any, *args: Any, **kwargs: Any) -> Any:
    if args and isinstance(args[0], hits.Numbers) and not kwargs:
        return dataclasses.replace(
            args[0], ordered=True
        )  # a list keeps its order: `hits` takes ascending ones only
    return plain(*args, **kwargs)


def _set(runtime: Runtime, place: Place, plain: Any, *args: Any) -> Any:
    if args and isinstance(args[0], hits.Numbers):
        return hits.Numbers(torch.unique(args[0].tensor), place, ordered=False)
    return plain(*args)


def _list(runtime: Runtime, place: Place, plain: Any, *args: Any) -> Any:
    return SomeItems(plain(*args))


def _cat(runtime: Runtime, place: Place, plain: Any, *args: Any, **kwargs: Any) -> Any:
    """Concatenation along the first axis leaves out what has no rows."""
    tensors = args[0] if args else kwargs.get("tensors")
    if isinstance(tensors, SomeItems) and tensors.place is not None:
        dim = args[1] if len(args) > 1 else kwargs.get("dim", kwargs.get("axis", 0))
        items = list.copy(tensors)
        rank = items[0].dim()
        if dim not in (0, -rank) or any(each.dtype != items[0].dtype for each in items):
            raise tensors._error()
        return plain(items, dim=0)
    return plain(*args, **kwargs)


def _checkpoint(runtime: Runtime, place: Place, plain: Any, function: Any, *args: Any, **kwargs: Any) -> Any:
    """Without gradients it calls its function, which is the user's."""
    own = ("use_reentrant", "context_fn", "determinism_check", "debug", "preserve_rng_state", "early_stop")
    given = {key: value for key, value in kwargs.items() if key not in own}
    return runtime.call(function, place)(*args, **given)


class _NoContext:
    """What an autograd function keeps for a backward pass that never comes."""

    needs_input_grad = (False,) * 64

    def _nothing(self, *args: Any, **kwargs: Any) -> None:
        pass

    save_for_backward = save_for_forward = mark_dirty = mark_non_differentiable = set_materialize_grads = (
        _nothing
    )


def _applied(runtime: Runtime, place: Place, owner: Any, *args: Any) -> Any:
    """Of an autograd function only its forward pass, which is the user's."""
    separate = owner.setup_context is not torch.autograd.Function.setup_context
    given = args if separate else (_NoContext(), *args)
    return runtime.call(owner.forward, place)(*given)


def _item(runtime: Runtime, place: Place, plain: Any, tensor: Tensor) -> Any:
    return tensor.item() if plain is None else plain()


def _tolist(runtime: Runtime, place: Place, plain: Any, tensor: Tensor) -> Any:
    if not _depends(runtime, tensor):
        return plain()
    if tensor.dim() == 0:
        return tensor.item()
    length = tensor.shape[0]
    if isinstance(length, torch.SymInt):
        return hits.Numbers(tensor.clone(), place)  # a list stays as it is when its tensor is written to
    return SomeItems(_tolist(runtime, place, plain, each) for each in tensor.unbind())


def _bincount(runtime: Runtime, place: Place, plain: Any, tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
    """The counts of integers that are known to be below `minlength`, so that their number is known."""
    given = dict(zip(("weights", "minlength"), args, strict=False)) | kwargs
    least = given.get("minlength", 0)
    if not _depends(runtime, tensor) or given.get("weights") is not None or not isinstance(least, int):
        return plain(tensor, *args, **kwargs) if plain is torch.bincount else plain(*args, **kwargs)
    count = hits.bound_of(tensor, runtime)
    if count is None or count > least:
        return plain(tensor, *args, **kwargs) if plain is torch.bincount else plain(*args, **kwargs)
    return F.one_hot(tensor, least).sum(0)


def _numpy(runtime: Runtime, place: Place, plain: Any, tensor: Tensor) -> Any:
    """Looped over and indexed, an array of integers is like their list."""
    if not _depends(runtime, tensor):
        return plain()
    if tensor.dim() != 1 or tensor.is_floating_point():
        raise refuse(
            place, "takes tensor values to numpy", "use torch there, or write an adapter (--adapter)"
        )
    numbers = _tolist(runtime, place, plain, tensor)
    return Array(numbers, place) if isinstance(numbers, SomeItems) else numbers


def _str(runtime: Runtime, place: Place, plain: Any, *args: Any, **kwargs: Any) -> Any:
    if len(args) == 1 and not kwargs and texts.unknown(args[0]):
        return texts.text(str(texts.Unknown()), place)
    return plain(*args, **kwargs)


def _any(runtime: Runtime, place: Place, plain: Any, items: Any) -> Any:
    """One after the other, as far as Python would go."""
    thunks = (functools.partial(lambda value: value, each) for each in items)
    join, goes_on = (torch.logical_or, False) if plain is any else (torch.logical_and, True)
    return runtime._joined(place, True, thunks, join, goes_on)


def _format(runtime: Runtime, place: Place, plain: Any, *args: Any, **kwargs: Any) -> Any:
    """`"{}".format(value)`."""
    made = {key: texts.shown(value) for key, value in kwargs.items()}
    return texts.text(plain(*map(texts.shown, args), **made), place)


def _join(runtime: Runtime, place: Place, plain: Any, parts: Any) -> Any:
    return texts.joined(plain, list(parts), place)


def _printed(runtime: Runtime, place: Place, plain: Any, *args: Any, **kwargs: Any) -> Any:
    """For people to read: what is not known here is left out, with what it would be put into."""
    if any(texts.unknown(each) for each in args):
        args = tuple(texts.plain(each) for each in args if isinstance(each, str))[:1] or ("?",)
        if plain is print:
            kwargs = {}
        elif getattr(plain, "__name__", "") == "log":
            return None
    return plain(*args, **kwargs)


_PRINTING = ("debug", "info", "warning", "error", "critical", "exception", "log", "warning_once", "warn")

_FUNCTIONS: dict[Any, Callable[..., Any]] = {
    builtins.any: _any,
    builtins.all: _any,
    builtins.isinstance: kinds.instance,
    builtins.type: kinds.of,
    builtins.str: _str,
    builtins.print: _printed,
    warnings.warn: _printed,
    **{getattr(logging, name): _printed for name in _PRINTING if hasattr(logging, name)},
    builtins.int: _int,
    builtins.float: _float,
    builtins.bool: _bool,
    builtins.len: _len,
    _MAX: _extreme(torch.sym_max),
    _MIN: _extreme(torch.sym_min),
    builtins.range: _range,
    builtins.enumerate: _zip_like,
    builtins.zip: _zip_like,
    builtins.sorted: _sorted,
    builtins.set: _set,
    builtins.list: _list,
    F.one_hot: _one_hot,
    torch.tensor: _tensor,
    torch.bincount: _bincount,
    torch.utils.checkpoint.checkpoint: _checkpoint,
    torch.cat: _cat,
    torch.concat: _cat,
    torch.concatenate: _cat,
}
_OF_TENSORS: dict[str, Callable[..., Any]] = {"tolist": _tolist, "numpy": _numpy, "bincount": _bincount}
