"""A model of the table, and where all of them come from."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from sparse_onnx.bench.coverage import registry, tiny
from sparse_onnx.core.errors import UsageError

#: `python -m sparse_onnx.bench.coverage` without `--cases`.
ARCHITECTURES = "sparse_onnx.bench.coverage.cases:architectures"
WITH_CACHE = "sparse_onnx.bench.coverage.cases:with_cache"
HALF = {name: f"sparse_onnx.bench.coverage.cases:{name}" for name in ("float16", "bfloat16")}


@dataclasses.dataclass(frozen=True)
class Made:
    """What `sparse_onnx.export` is given: its SOURCE, and its further arguments."""

    source: Any
    arguments: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def cached(self) -> bool:
        """Whether it is exported with its key/value cache."""
        return bool(self.arguments.get("past"))

    @property
    def half(self) -> str:
        """`float16` or `bfloat16` where it is exported in such a type."""
        name = self.arguments.get("dtype") or ""
        return name if name in HALF else ""


@dataclasses.dataclass(frozen=True)
class Case:
    """One row. `make` writes whatever it needs into the folder it gets and builds nothing but that; the same call
    gives the same model every time."""

    name: str
    title: str
    make: Callable[[Path], Made]


def architectures() -> list[Case]:
    """Every architecture with experts of the installed transformers, tiny, as a folder with config.json."""

    def maker(architecture: registry.Architecture) -> Callable[[Path], Made]:
        return lambda folder: Made(
            str(tiny.write(architecture, folder / architecture.name)), {"random_weights": True}
        )

    return [Case(each.name, each.model_class, maker(each)) for each in registry.architectures()]


def with_cache() -> list[Case]:
    """The same, each with its key/value cache among inputs and outputs."""

    return _with_further({"past": True})


def float16() -> list[Case]:
    """The same in float16, without a cache."""
    return _with_further({"dtype": "float16"})


def bfloat16() -> list[Case]:
    """The same in bfloat16, without a cache."""
    return _with_further({"dtype": "bfloat16"})


def _with_further(arguments: Mapping[str, Any]) -> list[Case]:
    def maker(case: Case) -> Callable[[Path], Made]:
        def make(folder: Path) -> Made:
            made = case.make(folder)
            return Made(made.source, {**made.arguments, **arguments})

        return make

    return [Case(case.name, case.title, maker(case)) for case in architectures()]


def modules() -> list[Case]:
    """Hand-written modules, as tutorials and papers' repositories write them."""
    from sparse_onnx.bench.coverage.modules import MODULES

    def maker(name: str) -> Callable[[Path], Made]:
        return lambda folder: Made(MODULES[name]())

    return [Case(name, type(MODULES[name]()[0]).__name__, maker(name)) for name in MODULES]


def load(place: str) -> list[Case]:
    """The cases that ``package.module:FUNCTION`` gives.

    Raises:
        UsageError: there is no such function.
    """
    module, _, name = place.partition(":")
    try:
        found: Sequence[Case] = getattr(importlib.import_module(module), name)()
    except (ImportError, AttributeError) as error:
        raise UsageError(f"no cases at '{place}': {error}", "give package.module:FUNCTION") from error
    return list(found)
