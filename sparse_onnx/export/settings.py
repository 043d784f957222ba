"""What an export sets in a module, and how it comes back: training mode, and settings of transformers."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import nn

_ABSENT = object()


def without_cache(module: nn.Module) -> None:
    """Has transformers' models return no key-value cache, which is no tensor; sets `use_cache` in their
    configurations."""
    for config in _configurations(module):
        if getattr(config, "use_cache", False):
            config.use_cache = False


@contextlib.contextmanager
def left_as_it_was(found: Any) -> Iterator[None]:
    """Restores what an export changes in the user's own module: training mode, and settings of transformers'
    configurations."""
    module = found[0] if isinstance(found, tuple) and found else found
    if not isinstance(module, nn.Module):
        yield
        return
    training = [(each, each.training) for each in module.modules()]
    kept = [
        (vars(config), name, vars(config).get(name, _ABSENT))
        for config in _configurations(module)
        for name in ("use_cache", "_experts_implementation_internal")
    ]
    try:
        yield
    finally:
        for each, mode in training:
            each.training = mode
        for values, name, value in kept:
            if value is _ABSENT:
                values.pop(name, None)
            else:
                values[name] = value


def _configurations(module: nn.Module) -> list[Any]:
    """transformers' configurations of all its parts."""
    configs = {id(c): c for m in module.modules() if (c := getattr(m, "config", None)) is not None}
    return [
        config for config in configs.values() if hasattr(config, "to_dict") and hasattr(config, "__dict__")
    ]
