"""Additions as trees: the terms of a sum, however it is bracketed."""

from __future__ import annotations

from collections.abc import Collection

import onnx_ir as ir

from sparse_onnx.matching.layout import flat
from sparse_onnx.matching.values import producer, sole_use, tensor

_SUMS = ("Add", "Sum")
_ARITHMETIC = (
    *_SUMS,
    "Sub",
    "Mul",
    "Div",
    "Neg",
    "Cast",
    "Reshape",
    "Squeeze",
    "Unsqueeze",
    "Flatten",
    "Identity",
)


def is_sum(value: ir.Value | None) -> bool:
    return producer(value, *_SUMS) is not None


def is_root(node: ir.Node) -> bool:
    """Whether the node is the last addition of a sum: nobody adds anything to its result alone."""
    if node.domain or node.op_type not in _SUMS:
        return False
    user = sole_use(node.outputs[0])
    return user is None or user.domain != "" or user.op_type not in _SUMS or user.graph is not node.graph


def terms(root: ir.Value) -> list[ir.Value]:
    """The addends, in order. A partial sum that others read too is one addend."""
    found: list[ir.Value] = []
    work = [root]
    while work:
        value = work.pop()
        node = producer(value, *_SUMS)
        if node is None or (value is not root and sole_use(value) is None):
            found.append(value)
        else:
            work.extend(item for item in reversed(node.inputs) if item is not None)
    return found


def smallest(root: ir.Value, wanted: Collection[ir.Value]) -> ir.Value:
    """The innermost partial sum that holds all of the wanted terms."""
    wanted = set(wanted)
    held: dict[ir.Value, int] = {}
    order = [root]
    for value in order:
        if value in wanted or not _is_inner(value, root):
            continue
        node = value.producer()
        assert node is not None
        order.extend(item for item in node.inputs if item is not None)
    for value in reversed(order):
        inner = value not in wanted and _is_inner(value, root)
        node = value.producer()
        below = [item for item in node.inputs if item is not None] if inner and node is not None else []
        held[value] = (value in wanted) + sum(held[item] for item in below)
        if inner and held[value] == len(wanted):
            return value
    return root


def _is_inner(value: ir.Value, root: ir.Value) -> bool:
    return is_sum(value) and (value is root or sole_use(value) is not None)


def made_of(value: ir.Value, base: ir.Value) -> bool:
    """Whether a few products and sums make the value of another one."""
    base, work = flat(base), [value]
    for _ in range(8):
        node = producer(work.pop(), *_ARITHMETIC) if work else None
        for item in () if node is None else node.inputs:
            if item is not None and flat(item) is base:
                return True
            if item is not None and tensor(item) is None:
                work.append(item)
    return False
