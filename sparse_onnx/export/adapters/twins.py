"""A module with the same parts and another forward."""

from __future__ import annotations

import collections
import copy
import inspect
import types
from collections.abc import Callable
from typing import Any

from torch import nn

_HOOKS = (
    *("_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called"),
    *("_forward_pre_hooks", "_forward_pre_hooks_with_kwargs"),
)


def with_methods(module: nn.Module, **methods: Callable[..., Any]) -> nn.Module:
    """The same module with these methods, each called with the module first.

    Raises:
        AttributeError: it has none of that name.
    """
    twin = copy.copy(module)
    for name in _HOOKS:  # those that watch the module would watch the twin
        vars(twin)[name] = collections.OrderedDict()
    for name, method in methods.items():
        getattr(module, name)
        vars(twin)[name] = types.MethodType(method, twin)
    return twin


def forward_with(module: nn.Module, **values: Any) -> Callable[..., Any]:
    """The module's forward, which finds these values under the names of its Python module's own.

    Raises:
        AttributeError: its Python module has none of that name.
    """
    forward = inspect.unwrap(type(module).forward)
    if not all(name in forward.__globals__ for name in values):
        raise AttributeError(f"{type(module).__module__} has no {' or '.join(values)}")
    changed = types.FunctionType(
        forward.__code__,
        {**forward.__globals__, **values},
        forward.__name__,
        forward.__defaults__,
        forward.__closure__,
    )
    changed.__kwdefaults__ = forward.__kwdefaults__
    return changed
