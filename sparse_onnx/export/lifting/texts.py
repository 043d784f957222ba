"""Texts of what a trace does not know: `f"{counts.max().item():.2f}"`, for a log or as a key.

In the trace they show question marks. To print one is right; all that a program may ask of its characters is refused.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from sparse_onnx.export.lifting.hits import Numbers
from sparse_onnx.export.lifting.program import Sym, tracing
from sparse_onnx.export.lifting.values import Count, Negated, Place, SomeItems, refuse

#: Stands in a text for what is not known; of Unicode's private use, so that no one writes it.
_MARK = "\uf5d1"


class Unknown:
    """What is shown of such a value."""

    def __format__(self, spec: str) -> str:
        return _MARK

    def __str__(self) -> str:
        return _MARK

    __repr__ = __str__


class Text(str):
    """A text that depends on tensors, or on the sizes of inputs."""

    place: Place

    def _refused(self, *args: Any, **kwargs: Any) -> Any:
        raise refuse(
            self.place,
            "makes a text of tensor values or sizes, and what follows depends on it",
            "use such texts for logs only",
        )

    def __add__(self, other: Any) -> Text:
        return self._with(str.__add__(self, other))

    def __radd__(self, other: Any) -> Text:
        return self._with(str.__add__(other, self))

    def _with(self, characters: str) -> Text:
        made = Text(characters)
        made.place = self.place
        return made


def _method(name: str) -> Any:
    return lambda self, *args, **kwargs: self._refused()


for _name in ("__eq__", "__ne__", "__lt__", "__le__", "__gt__", "__ge__", "__hash__", "__contains__"):
    setattr(Text, _name, _method(_name))
for _name in (
    "__getitem__",
    "__iter__",
    "__len__",
    *(name for name in vars(str) if not name.startswith("_")),
):
    setattr(Text, _name, _method(_name))


def unknown(value: Any) -> bool:
    """Whether a value, or one that it holds, is not known in the trace."""
    if tracing() is None:
        return False
    kinds = (*Sym, Numbers, Count, Negated, Text)
    if isinstance(value, kinds) or (isinstance(value, SomeItems) and value.place is not None):
        return True
    if isinstance(value, str):
        return _MARK in value
    return any(
        isinstance(each, kinds)
        or (isinstance(each, Tensor) and isinstance(each, torch._subclasses.FakeTensor))
        for each in pytree.tree_leaves(list.copy(value) if isinstance(value, list) else value)
    )


def shown(value: Any) -> Any:
    return Unknown() if unknown(value) else value


def text(value: str, place: Place) -> str:
    """A text that was put together; one of its own kind where it shows what is not known."""
    if _MARK not in value:
        return value
    made = Text(str.replace(value, _MARK, "?"))
    made.place = place
    return made


def joined(join: Any, parts: list[Any], place: Place) -> str:
    """`separator.join(parts)`."""
    several: list[str] = [str(Unknown()) if unknown(each) else each for each in parts]
    return text(join(several), place)


def formatted(pattern: str, values: Any, place: Place) -> Any:
    """`pattern % values`."""
    several = values if isinstance(values, (tuple, list)) else [values]
    if not any(unknown(each) for each in several):
        return pattern % values
    made = Text(f"{pattern} (?)")
    made.place = place
    return made


def plain(value: Any) -> Any:
    """For what only prints: the characters as they are."""
    return str.__str__(value) + "" if isinstance(value, Text) else value
