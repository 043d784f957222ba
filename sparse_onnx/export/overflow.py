"""NLLB's layers in float16: where a value has overflowed they clamp all of them, and ask in Python whether one has.

A forward that `patches` puts in place, which asks in the graph.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

#: What transformers leaves below the largest float16.
_ROOM = 1000


def clamped(self: Any, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """The forward of an encoder's or a decoder's layer."""
    source: Any = sys.modules[type(self).__module__]
    asked = _Asked()
    source.torch = asked
    try:
        states = original(self, *args, **kwargs)
    finally:
        source.torch = torch
    for overflown in asked.answers:
        limit = torch.finfo(states.dtype).max - _ROOM
        states = torch.where(overflown, states.clamp(min=-limit, max=limit), states)
    return states


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
