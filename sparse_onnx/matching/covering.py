"""Sizes that a broadcast has on account of one operand alone: what must stand in where that one is not computed.

shape of Where(mask, A, B) = shape of Where(mask, zeros[lacking([A], [mask, B])], B)
"""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

Size = int | str
Sizes = list[Size]


class UnknownSize(Exception):
    """A size that the graph does not tell."""


def lacking(missing: Sequence[ir.Value], present: Sequence[ir.Value]) -> Sizes:
    """The sizes of a tensor that, broadcast with `present`, has every size that `missing` would give it.

    1 where `present` has the size already: its axis has the same number or name, or a number that the axis of
    `missing`, where that is not known, can only be equal to or 1.

    Raises:
        UnknownSize: an axis of `missing` that may be anything.
    """
    found: Sizes = []
    for value in missing:
        if value.shape is None:
            raise UnknownSize(f"the number of axes of '{value.name}' is not known from the graph")
        found[:0] = [1] * (len(value.shape) - len(found))
        for back in range(1, len(value.shape) + 1):
            own = _axis(value, back)
            others = [_axis(each, back) for each in present]
            if own == 1 or any(isinstance(size, int) and size != 1 for size in (*others, found[-back])):
                continue
            if own is None or (isinstance(own, str) and found[-back] not in (1, own)):
                raise UnknownSize(f"axis -{back} of '{value.name}' is not known from the graph")
            if own not in others:
                found[-back] = own
    return found


def has_sizes(value: ir.Value, sizes: Sizes) -> bool:
    """Whether broadcasting with a tensor of these sizes leaves the value as it is."""
    if value.shape is None or len(value.shape) < len(sizes):
        return False
    return all(size in (1, _axis(value, back)) for back, size in enumerate(reversed(sizes), 1))


def _axis(value: ir.Value, back: int) -> Size | None:
    """The axis counted from the end; None where nothing is known of it, or where there is none."""
    if value.shape is None or back > len(value.shape):
        return None
    size = value.shape[-back]
    return size if isinstance(size, int) else size.value
