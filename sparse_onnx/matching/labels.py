"""What each axis of a value stands for, followed through operators that only move elements."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import onnx_ir as ir

from sparse_onnx.matching.values import attribute, axes, ints, producer, rank, size

Labels = tuple[str, ...]
Merge = Callable[[Labels], str | None]

MOVES = ("Identity", "Cast", "Transpose", "Squeeze", "Unsqueeze", "Flatten", "Reshape")


def moved(value: ir.Value, labels: Labels, merge: Merge) -> Labels | None:
    """Labels of the result of one of `MOVES`, given those of its input; None where they cannot be told.

    ``"1"`` is the label of an axis of length 1. `merge` names the axis into which some are flattened.
    """
    node = producer(value, *MOVES)
    if node is None:
        return None
    if node.op_type in ("Identity", "Cast"):
        return labels
    if node.op_type == "Transpose":
        order = attribute(node, "perm") or range(len(labels))[::-1]
        return tuple(labels[at] for at in order) if len(order) == len(labels) else None
    if node.op_type == "Unsqueeze":
        return _unsqueezed(node, labels)
    if node.op_type == "Squeeze":
        return _squeezed(node, labels)
    if node.op_type == "Flatten":
        at = attribute(node, "axis", 1)
        halves = (labels[:at], labels[at:])
        return _named([_merged(half, merge) for half in halves])
    return _reshaped(value, node, labels, merge)


def _unsqueezed(node: ir.Node, labels: Labels) -> Labels | None:
    found = axes(node)
    if found is None:
        return None
    width = len(labels) + len(found)
    new = {at % width for at in found}
    rest = iter(labels)
    return tuple("1" if at in new else next(rest) for at in range(width)) if len(new) == len(found) else None


def _squeezed(node: ir.Node, labels: Labels) -> Labels | None:
    found = axes(node)
    if found is None:
        return None
    gone = {at % len(labels) for at in found} if labels else set()
    if any(labels[at] != "1" and size(node.inputs[0], at) != 1 for at in gone):
        return None
    return tuple(label for at, label in enumerate(labels) if at not in gone)


def _merged(labels: Labels, merge: Merge) -> str | None:
    long = tuple(label for label in labels if label != "1")
    if len(long) <= 1:
        return long[0] if long else "1"
    return merge(long)


def _named(found: list[str | None]) -> Labels | None:
    labels = tuple(label for label in found if label is not None)
    return labels if len(labels) == len(found) else None


def _reshaped(value: ir.Value, node: ir.Node, labels: Labels, merge: Merge) -> Labels | None:
    target = ints(node.inputs[1])
    known: list[int | None] = [None if item < 1 else item for item in target] if target is not None else []
    if target is None:
        if value.shape is None:
            return None
        known = [dimension if isinstance(dimension, int) else None for dimension in value.shape]
    elif value.shape is not None and len(value.shape) == len(known):
        told = [dimension if isinstance(dimension, int) else None for dimension in value.shape]
        known = [a if a is not None else b for a, b in zip(known, told, strict=True)]
    long = [(label, at) for at, label in enumerate(labels) if label != "1"]
    wide = [at for at, length in enumerate(known) if length != 1]
    names: list[str | None]
    if len(wide) == 1:
        names = [_merged(labels, merge)]
    elif len(wide) == len(long):
        names = [label for label, _ in long]
        open_ended = 0
        for (_, old), new in zip(long, wide, strict=True):
            before = size(node.inputs[0], old)
            open_ended += before is None or known[new] is None
            if before is not None and known[new] is not None and before != known[new]:
                return None
        if open_ended > 1 and not _copies(target, labels):
            return None
    elif len(wide) == 2 and len(long) > 2:
        last, at = long[-1]
        if size(node.inputs[0], at) is None or size(node.inputs[0], at) != known[wide[1]]:
            return None
        names = [_merged(tuple(label for label, _ in long[:-1]), merge), last]
    elif not wide and not long:
        names = []
    else:
        return None
    result: list[str | None] = ["1"] * len(known)
    for at, name in zip(wide, names, strict=True):
        result[at] = name
    return _named(result)


def _copies(target: list[int] | None, labels: Labels) -> bool:
    """Whether all axes but one of the target are copies (0) of the input's."""
    return target is not None and len(target) == len(labels) and sum(item != 0 for item in target) <= 1


def tiled(node: ir.Node, labels: Labels) -> Labels | None:
    """Labels of a Tile's result: ``*`` for an axis of length 1 that is repeated; no other may be."""
    times = ints(node.inputs[1])
    if times is None or len(times) != len(labels):
        return None
    if any(count != 1 and label not in ("1", "*") for count, label in zip(times, labels, strict=True)):
        return None
    return tuple(label if count == 1 else "*" for count, label in zip(times, labels, strict=True))


@dataclasses.dataclass(frozen=True)
class Picked:
    """Some indices of one axis of a value: Gather by constants, Slice, or an output of Split.

    Attributes:
        source: what is picked from.
        axis: counted from the front.
        indices: constant, not negative.
        keeps: whether the axis is kept (a Gather by a scalar drops it).
    """

    source: ir.Value
    axis: int
    indices: tuple[int, ...]
    keeps: bool


def picked(
    value: ir.Value, lengths: Callable[[int], int | None], dimensions: int | None = None
) -> Picked | None:
    """The value as picked indices of one axis.

    Args:
        value: the result.
        lengths: length of an axis of the input, where it is known.
        dimensions: rank of the input, where the graph may not tell it.
    """
    node = producer(value, "Gather", "Slice", "Split")
    if node is None or node.inputs[0] is None:
        return None
    source = node.inputs[0]
    dimensions = rank(source) if dimensions is None else dimensions
    if node.op_type == "Slice":
        return _slice(node, source, lengths, dimensions)
    at = attribute(node, "axis", 0)
    if at < 0:
        if dimensions is None:
            return None
        at += dimensions
    if node.op_type == "Gather":
        found, shape = ints(node.inputs[1]), rank(node.inputs[1])
        if found is None or shape is None or shape > 1:
            return None
        length = lengths(at)
        if length is None and min(found, default=0) < 0:
            return None
        indices = tuple(item if item >= 0 else item + (length or 0) for item in found)
        return Picked(source, at, indices, shape == 1)
    return _piece(node, source, value, at, lengths(at))


def _slice(
    node: ir.Node, source: ir.Value, lengths: Callable[[int], int | None], dimensions: int | None
) -> Picked | None:
    bounds = [ints(item) if item is not None else None for item in node.inputs[1:5]]
    bounds += [None] * (4 - len(bounds))
    start, end, along, step = bounds
    along = [0] if along is None and start is not None and len(start) == 1 else along
    if start is None or end is None or along is None or not len(start) == len(end) == len(along) == 1:
        return None
    if step not in (None, [1]):
        return None
    at = along[0] if along[0] >= 0 else along[0] + (dimensions or 0)
    length = lengths(at)
    if at < 0 or length is None:
        return None
    return Picked(source, at, tuple(range(length)[start[0] : end[0]]), True)


def _piece(node: ir.Node, source: ir.Value, value: ir.Value, at: int, length: int | None) -> Picked | None:
    parts = (
        ints(node.inputs[1])
        if len(node.inputs) > 1 and node.inputs[1] is not None
        else attribute(node, "split")
    )
    if parts is None:
        count = len(node.outputs)
        if length is None or length % count:
            return None
        parts = [length // count] * count
    number = value.index()
    if number is None or len(parts) != len(node.outputs):
        return None
    first = sum(parts[:number])
    return Picked(source, at, tuple(range(first, first + parts[number])), True)
