"""What Python code can change besides its own local variables: attributes of modules, containers.

A branch that depends on tensors runs both sides in one trace, so that each must be undone before the other
starts, and what it did must be compared.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from sparse_onnx.export.lifting.values import SomeItems

_SIMPLE = (int, float, complex, bool, str, bytes, type(None), Tensor, torch.dtype, torch.device, torch.Size)
_DEPTH = 6


@dataclasses.dataclass(frozen=True)
class Slot:
    """One container or object: what it held."""

    holder: Any
    content: Any


@dataclasses.dataclass
class Snapshot:
    """The state of all that is reachable from a module and some variables; `slots` by identity."""

    slots: dict[int, Slot]

    def restore(self) -> None:
        for slot in self.slots.values():
            _fill(slot.holder, slot.content)

    def changed(self, other: Snapshot) -> list[tuple[Any, Any, Any]]:
        """`(holder, here, there)` for each holder of both whose content differs by identity."""
        found = []
        for key, slot in self.slots.items():
            later = other.slots.get(key)
            if later is not None and not _same(slot.content, later.content):
                found.append((slot.holder, slot.content, later.content))
        return found


def take(module: nn.Module, variables: Iterable[Any]) -> Snapshot:
    """A snapshot of what can be reached from the module and these values."""
    slots: dict[int, Slot] = {}
    for each in module.modules():
        _visit(each, slots, _DEPTH)
    for value in variables:
        _visit(value, slots, _DEPTH)
    return Snapshot(slots)


def _visit(value: Any, slots: dict[int, Slot], depth: int) -> None:
    if isinstance(value, _SIMPLE) or depth < 0 or id(value) in slots or isinstance(value, type):
        return
    content = _content(value)
    if content is None:
        return
    slots[id(value)] = Slot(value, content)
    if isinstance(value, SomeItems):
        _visit(vars(value), slots, depth)
    for inner in content.values() if isinstance(content, Mapping) else content:
        _visit(inner, slots, depth - 1)


def _content(value: Any) -> Any:
    if isinstance(value, dict):
        return dict(value)
    if isinstance(value, (list, tuple, set)):
        return (
            list.copy(value)
            if isinstance(value, list)
            else type(value)(value)
            if type(value) is set
            else list(value)
        )
    module = type(value).__module__.partition(".")[0]
    if isinstance(value, nn.Module) or (module not in ("torch", "builtins", "numpy", "sparse_onnx", "types")):
        found = getattr(value, "__dict__", None)
        return dict(found) if isinstance(found, dict) else None
    return None


def _fill(holder: Any, content: Any) -> None:
    if isinstance(holder, tuple):
        return
    if isinstance(holder, dict):
        if not _same(content, holder):
            holder.clear()
            holder.update(content)
    elif isinstance(holder, list):
        list.__setitem__(holder, slice(None), content)
    elif isinstance(holder, set):
        holder.clear()
        holder.update(content)
    elif not _same(content, vars(holder)):
        vars(holder).clear()
        vars(holder).update(content)


def _same(left: Any, right: Any) -> bool:
    if len(left) != len(right):
        return False
    if isinstance(left, Mapping):
        return list(left) == list(right) and all(left[key] is right[key] for key in left)
    if isinstance(left, set):
        return bool(left == right)
    return all(
        a is b for a, b in zip(left, list.__iter__(right) if isinstance(right, list) else right, strict=True)
    )
