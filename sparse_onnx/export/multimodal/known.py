"""Tensors whose values a trace may know: what a fixed image size alone decides is computed once, outside the graph.

Vision encoders read the image's grid by Python - `.tolist()`, loops over it, slices by it - which no trace follows for
a tensor. Here the grid is a constant: operations on such tensors alone run at once, with their numbers, and what comes
of them enters the graph as a constant where it meets another tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_any, tree_map_only

#: What makes a tensor of Python numbers alone.
_MADE = frozenset({torch.tensor, torch.as_tensor, torch.arange, torch.linspace})
#: What asks for the tensor that another is a view of: a plain one of a known one would be a view of it, without end.
_VIEWS = frozenset({Tensor._is_view, Tensor._base.__get__})  # type: ignore[union-attr]


class Known(Tensor):
    """A tensor of known values."""

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func in _VIEWS:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        if tree_any(_is_other, (args, kwargs)):
            if _writes(func) and isinstance(args[0], Known):
                raise NotImplementedError("a tensor that the image's size decides is written into")
            with torch._C.DisableTorchFunctionSubclass():
                return func(*_plain(args), **_plain(kwargs))
        return _at_once(func, args, kwargs)


class _Factories(TorchFunctionMode):
    """Has tensors that Python numbers alone make be known."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func in _MADE and not tree_any(_is_symbolic, (args, kwargs)):
            return _at_once(func, args, kwargs)
        return func(*args, **kwargs)


@contextmanager
def factories() -> Iterator[None]:
    """Within the block tensors that are made of Python numbers are known too."""
    with _Factories():
        yield


def known(value: Tensor) -> Tensor:
    """A copy of the tensor whose values a trace knows."""
    with _disable_current_modes():
        return value.clone().as_subclass(Known)


def unknown(value: Any) -> Any:
    """The same without knowledge: as tensors of their own kind, in any nest."""
    return _plain(value)


def _at_once(func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    with _disable_current_modes(), torch._C.DisableTorchFunction():
        result = func(*_plain(args), **_plain(kwargs))
    return tree_map_only(Tensor, lambda value: value.as_subclass(Known), result)


def _plain(values: Any) -> Any:
    return tree_map_only(Known, lambda value: value.as_subclass(Tensor), values)


def _is_other(value: Any) -> bool:
    return isinstance(value, (torch.SymInt, torch.SymFloat)) or (
        isinstance(value, Tensor) and not isinstance(value, Known)
    )


def _is_symbolic(value: Any) -> bool:
    return _is_other(value) or isinstance(value, torch.SymBool)


def _writes(func: Callable[..., Any]) -> bool:
    name = getattr(func, "__name__", "")
    return name == "__setitem__" or (name.endswith("_") and not name.endswith("__"))
