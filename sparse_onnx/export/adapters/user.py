"""Adapters that the user names: `FILE.py:NAME`, or functions."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sparse_onnx.core.errors import UsageError
from sparse_onnx.export import sources, users
from sparse_onnx.export.adapters.apply import Named

CONTRACT = "an adapter is a function that takes a torch module and gives another one, or None"


def load(adapters: Sequence[Any], source: Any) -> list[Named]:
    """Imports the adapters that are given by name.

    Args:
        adapters: each `FILE.py:NAME` or `package.module:NAME`, which RUNS THAT CODE, or a function.
        source: what is exported; of the same file, its classes are those that the adapters see.

    Raises:
        UsageError: another form, no such name, or no function.
        ModelError: no such file.
        OutsideError: the code raises.
    """
    if isinstance(adapters, (str, os.PathLike)) or not isinstance(adapters, Sequence):
        raise UsageError("adapters are given as a list", CONTRACT)
    return [_named(adapter, source) for adapter in adapters]


def _named(adapter: Any, source: Any) -> Named:
    if not isinstance(adapter, (str, os.PathLike)):
        _check(adapter, repr(adapter))
        return Named(getattr(adapter, "__qualname__", type(adapter).__qualname__), adapter)
    text = os.fspath(adapter)
    match = sources.OBJECT.fullmatch(text)
    if match is None:
        raise UsageError("an adapter is named FILE.py:NAME", CONTRACT, where=text)
    place, name = match["place"], match["name"]
    key = users.module_key(Path(place))
    if place.endswith(".py") and key in sys.modules and _file(source) == Path(place).resolve():
        found = getattr(sys.modules[key], name, None)
        if found is None:
            raise UsageError(f"it has no '{name}'", CONTRACT, where=place)
    else:
        found = users.imported(place, name, CONTRACT, "the adapter")
    _check(found, text)
    return Named(text, found)


def _file(source: Any) -> Path | None:
    match = sources.OBJECT.fullmatch(os.fspath(source)) if isinstance(source, (str, os.PathLike)) else None
    return Path(match["place"]).resolve() if match and match["place"].endswith(".py") else None


def _check(adapter: Any, name: str) -> None:
    if not callable(adapter):
        raise UsageError("it cannot be called", CONTRACT, where=name)
