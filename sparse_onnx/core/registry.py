"""Passes by name. Built-in and third-party passes come through the same door: an entry point each, loaded on use."""

from __future__ import annotations

import difflib
import functools
import importlib.metadata

from sparse_onnx.core.errors import UsageError
from sparse_onnx.core.passes import Pass

GROUP = "sparse_onnx.passes"


@functools.cache
def _entry_points() -> dict[str, importlib.metadata.EntryPoint]:
    return {entry.name: entry for entry in importlib.metadata.entry_points(group=GROUP)}


def names() -> list[str]:
    """Names of all registered passes, without importing any of them."""
    return sorted(_entry_points())


def get(name: str) -> type[Pass]:
    """The pass class of that name.

    Raises:
        UsageError: no such pass, or what is registered under the name is not a pass.
    """
    entry = _entry_points().get(name)
    if entry is None:
        close = difflib.get_close_matches(name, names(), n=1)
        hint = f"did you mean '{close[0]}'?" if close else "`sparse-onnx passes` lists them"
        raise UsageError(f"unknown pass '{name}'", hint)
    loaded = entry.load()
    if not (isinstance(loaded, type) and issubclass(loaded, Pass)):
        raise UsageError(f"entry point '{name}' is not a sparse_onnx Pass", f"see {entry.value}")
    return loaded
