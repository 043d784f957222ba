"""What stands for Python's own values in a trace, and of which class those are."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from sparse_onnx.export.lifting.arrays import Array
from sparse_onnx.export.lifting.hits import Numbers
from sparse_onnx.export.lifting.texts import Text
from sparse_onnx.export.lifting.values import Count, Negated, Place, SomeItems, Undefined

if TYPE_CHECKING:
    from sparse_onnx.export.lifting.runtime import Runtime

_KINDS: dict[type, type] = {
    torch.SymInt: int,
    torch.SymFloat: float,
    torch.SymBool: bool,
    Numbers: list,
    SomeItems: list,
    Array: np.ndarray,
    Count: int,
    Negated: bool,
    Text: str,
}


def stands_for_others(value: Any) -> bool:
    """Whether a value, or one that it holds, is not what a plain run would have."""
    if type(value) in (tuple, list):
        return any(stands_for_others(each) for each in value)
    if type(value) is SomeItems:
        return value.place is not None or any(stands_for_others(each) for each in list.copy(value))
    return type(value) is Undefined or type(value) in _KINDS


def instance(runtime: Runtime, place: Place, plain: Any, value: Any, classes: Any) -> bool:
    """`isinstance`, as the values would answer that others stand for here."""
    if type(value) is Undefined:
        raise value._error()
    kind = _KINDS.get(type(value))
    return isinstance(value, classes) if kind is None else issubclass(kind, classes)


def of(runtime: Runtime, place: Place, plain: Any, *args: Any, **kwargs: Any) -> Any:
    """`type(value)`."""
    if len(args) == 1 and type(args[0]) is Undefined:
        raise args[0]._error()
    found = plain(*args, **kwargs)
    return _KINDS.get(found, found) if len(args) == 1 else found
