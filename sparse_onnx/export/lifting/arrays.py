"""numpy's arrays of integers that are symbols in the trace."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable
from typing import Any

from sparse_onnx.export.lifting.program import Sym
from sparse_onnx.export.lifting.values import Place, SomeItems, refuse


class Array(SomeItems):
    """What numpy's integer arrays have besides lists; all else is refused, for a list would answer it otherwise."""

    def __init__(self, items: Any, line: Place) -> None:
        super().__init__(items)
        self.line = line

    def _no(self, *args: Any, **kwargs: Any) -> Any:
        raise refuse(
            self.line,
            "takes tensor values to numpy, for more than counting on them",
            "use torch there, or write an adapter (--adapter)",
        )

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # what libraries look for to tell kinds of objects apart
            raise AttributeError(name)
        return self._no()

    def __getitem__(self, index: Any) -> Any:
        found = super().__getitem__(index)
        return Array(found, self.line) if isinstance(index, slice) else found

    def cumsum(self, axis: int = 0) -> Array:
        return Array(itertools.accumulate(self), self.line)

    def sum(self, axis: int = 0) -> Any:
        return sum(self)

    def tolist(self) -> SomeItems:
        return SomeItems(self)

    def copy(self) -> Array:
        return Array(self, self.line)

    @property
    def shape(self) -> tuple[int]:
        return (len(self),)

    @property
    def size(self) -> int:
        return len(self)


def _elementwise(compute: Callable[[Any, Any], Any], *, swapped: bool = False) -> Any:
    def method(self: Array, other: Any) -> Array:
        if isinstance(other, (list, tuple)) and len(other) == len(self):
            others = list(other)
        elif isinstance(other, (int, *Sym)) and not isinstance(other, bool):
            others = [other] * len(self)
        else:
            return self._no()  # type: ignore[no-any-return]
        pairs = zip(others, self, strict=True) if swapped else zip(self, others, strict=True)
        return Array((compute(left, right) for left, right in pairs), self.line)

    return method


for _name in ("add", "sub", "mul", "truediv"):
    setattr(Array, f"__{_name}__", _elementwise(getattr(operator, _name)))
    setattr(Array, f"__r{_name}__", _elementwise(getattr(operator, _name), swapped=True))
#: A list answers these for all its items together, or changes by them.
for _name in (
    *(
        "eq",
        "ne",
        "lt",
        "le",
        "gt",
        "ge",
        "contains",
        "bool",
        "floordiv",
        "rfloordiv",
        "mod",
        "rmod",
        "pow",
        "rpow",
    ),
    *(
        "iadd",
        "imul",
        "isub",
        "itruediv",
        "neg",
        "and",
        "or",
        "xor",
        "invert",
        "matmul",
        "setitem",
        "delitem",
    ),
):
    setattr(Array, f"__{_name}__", Array._no)
for _name in ("append", "extend", "insert", "pop", "remove", "reverse", "sort", "index", "count", "clear"):
    setattr(Array, _name, Array._no)
