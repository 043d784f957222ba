"""NLLB's layers in float16: where a value has overflowed they clamp all of them, and ask in Python whether one has.

A forward that `patches` puts in place, which asks in the graph.
"""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

#: What transformers leaves below the largest float16.
_ROOM = 1000


def clamped(self: Any, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """The forward of an encoder's or a decoder's layer."""
    asked = _Asked()
    states = _with_torch(original, asked)(self, *args, **kwargs)
    for overflown in asked.answers:
        limit = torch.finfo(states.dtype).max - _ROOM
        states = torch.where(overflown, states.clamp(min=-limit, max=limit), states)
    return states


def _with_torch(forward: Callable[..., Any], other: _Asked) -> Callable[..., Any]:
    """The forward, without what it is wrapped in, where the name `torch` is another thing. Its module is left alone:
    other threads may run it."""
    inner: Any = inspect.unwrap(forward)
    names = {**inner.__globals__, "torch": other}
    copy = types.FunctionType(inner.__code__, names, inner.__name__, inner.__defaults__, inner.__closure__)
    copy.__kwdefaults__ = inner.__kwdefaults__
    return copy


class _Asked:
    """torch, but that questions about values that are not finite are answered with no, and noted."""

    def __init__(self) -> None:
        self.answers: list[Tensor] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    def isfinite(self, states: Tensor) -> _Always:
        self.answers.append(~torch.isfinite(states).all())
        return _Always(True)

    def isinf(self, states: Tensor) -> _Always:
        self.answers.append(torch.isinf(states).any())
        return _Always(False)


class _Always:
    def __init__(self, answer: bool) -> None:
        self._answer = answer

    def all(self) -> bool:
        return self._answer

    any = all
