"""Slots put in the order of their experts: sorts, their inverses, and what is proved of the ids that they sort.

A slot is a pair of a token and one of its K experts; slot ``s`` belongs to token ``s // K``.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import onnx_ir as ir

from sparse_onnx.matching.dims import Dims
from sparse_onnx.matching.integers import evaluated
from sparse_onnx.matching.layout import flat, gathered
from sparse_onnx.matching.values import attribute, axis, constant, ints, producer, rank, scalar, size

#: Operators whose output holds elements of their first input and nothing else.
_PICKS = ("Gather", "GatherND", "GatherElements", "Slice", "Split", "Transpose", "Expand", "Tile", "Compress")


@dataclasses.dataclass(frozen=True, eq=False)
class Order:
    """A sort of all slots.

    Attributes:
        node: the TopK.
        keys: ``[S]`` what is sorted, as the TopK reads it.
        ascending: smallest first.
        permutation: ``[S]`` the slot at each sorted position.
        sorted_keys: ``[S]``.
        told: whether the TopK is asked to give its elements in order.
    """

    node: ir.Node
    keys: ir.Value
    ascending: bool
    permutation: ir.Value
    sorted_keys: ir.Value
    told: bool = True

    def holds_sorted(self, value: ir.Value, data: ir.Value | None = None) -> bool:
        """Whether the value is the sorted keys (or `data`, one element a slot, in the same order)."""
        base = flat(value)
        if data is None and base is self.sorted_keys:
            return True
        read = gathered(base)
        wanted = flat(self.keys if data is None else data)
        if read is None or flat(read[0]) is not wanted or not one_each(read[0]):
            return False
        return flat(read[1]) is self.permutation

    def ids(self, experts: int) -> ir.Value | None:
        """The integer ids in [0, experts) behind the keys, if their order is proved to be that of the keys."""
        at: ir.Value | None = flat(self.keys)
        best: ir.Value | None = None
        while at is not None:
            integral = at.dtype is not None and at.dtype.is_integer()
            if integral and bounded(at, experts):
                best = at
            elif best is not None:
                break
            node = (
                producer(at, "Cast") if best is not None else producer(at, "Cast", "Neg", "Mul", "Sub", "Add")
            )
            inputs = [] if node is None else [item for item in node.inputs if item is not None]
            variable = [item for item in inputs if scalar(item) is None]
            at = flat(variable[0]) if len(variable) == 1 else None
        if best is None:
            return None
        numbers = _numbers(best, experts)
        keys = evaluated(self.keys, lambda item: numbers if item is best else None)
        if keys is None:
            return None
        steps = np.diff(keys.astype(np.float64))
        return best if bool(((steps > 0) if self.ascending else (steps < 0)).all()) else None

    def same_ids(self, value: ir.Value, ids: ir.Value, experts: int, only_sorted: bool = False) -> bool:
        """Whether the value holds the ids, sorted or as they are, perhaps through a chain that maps each to itself."""
        numbers = _numbers(ids, experts)
        keys = evaluated(self.keys, lambda item: numbers if item is ids else None)

        def unsorted(item: ir.Value) -> np.ndarray | None:
            return numbers if item is ids else None

        def in_order(item: ir.Value) -> np.ndarray | None:
            if self.holds_sorted(item):
                return keys
            return numbers if self.holds_sorted(item, ids) else None

        for seed in (in_order,) if only_sorted else (unsorted, in_order):
            result = evaluated(value, seed)
            if result is not None and np.array_equal(result.astype(np.float64), numbers.astype(np.float64)):
                return True
        return False


def one_each(value: ir.Value) -> bool:
    """Whether each entry of the first axis is one element: ``[n]`` or ``[n, 1]``."""
    return rank(value) == 1 or (rank(value) == 2 and size(value, 1) == 1)


def _numbers(ids: ir.Value, experts: int) -> np.ndarray:
    return np.arange(experts).astype(np.int64 if ids.dtype is None else ids.dtype.numpy())


def order_of(node: ir.Node, dims: Dims) -> Order | None:
    """A TopK that takes all elements of a vector is a sort of it. Ties may fall either way."""
    if node.domain != "" or node.op_type != "TopK" or len(node.outputs) != 2:
        return None
    keys, count = node.inputs[0], node.inputs[1]
    if keys is None or count is None or not _is_vector(keys):
        return None
    sorted_keys, permutation = node.outputs
    if not (dims.vector(count) == (dims.total(keys),) or dims.as_many(keys, 1, permutation, 1)):
        return None
    ascending, told = not attribute(node, "largest", 1), bool(attribute(node, "sorted", 1))
    return Order(node, keys, ascending, permutation, sorted_keys, told)


def _is_vector(value: ir.Value) -> bool:
    """Whether the value has one axis; by the target of a Reshape where nothing was inferred."""
    node = producer(value, "Reshape") if value.shape is None else None
    target = None if node is None else ints(node.inputs[1])
    return rank(value) == 1 or (target is not None and len(target) == 1)


def bounded(value: ir.Value | None, limit: int, depth: int = 0) -> bool:
    """Whether the integers are proved to lie in [0, limit)."""
    if value is None or depth > 24:
        return False
    value = flat(value)
    known = constant(value)
    if known is not None:
        return known.dtype.kind in "iu" and bool(((known >= 0) & (known < limit)).all())
    node = producer(value)
    if node is None:
        return False
    if node.op_type in ("ArgMax", "ArgMin"):
        along = axis(node, 0)
        count = None if along is None else size(node.inputs[0], along)
        return count is not None and count <= limit
    if node.op_type == "TopK":
        along = axis(node, -1)
        count = None if along is None else size(node.inputs[0], along)
        if value is node.outputs[0]:
            return bounded(node.inputs[0], limit, depth + 1)
        return count is not None and count <= limit
    if node.op_type == "Mod":
        divisor = scalar(node.inputs[1])
        integral = value.dtype is not None and value.dtype.is_integer()
        return integral and divisor is not None and 0 < divisor <= limit and not attribute(node, "fmod", 0)
    if node.op_type == "Clip":
        return _clipped(node, limit, depth)
    if node.op_type == "Cast":
        narrow = value.dtype is None or value.dtype.itemsize < 4
        return (not narrow or limit <= 128) and bounded(node.inputs[0], limit, depth + 1)
    if node.op_type in _PICKS:
        return bounded(node.inputs[0], limit, depth + 1)
    if node.op_type == "Concat":
        return all(bounded(item, limit, depth + 1) for item in node.inputs)
    if node.op_type == "Where":
        return all(bounded(item, limit, depth + 1) for item in node.inputs[1:])
    return False


def _clipped(node: ir.Node, limit: int, depth: int) -> bool:
    """Whether a Clip stays in [0, limit): each bound does, and what it leaves out is bounded behind the Clip."""
    given = [item for item in node.inputs[1:3] if item is not None]
    bounds = [scalar(item) for item in given]
    if any(bound is None or not 0 <= bound < limit for bound in bounds):
        return False
    return len(bounds) == 2 or bounded(node.inputs[0], limit, depth + 1)


def inverse_of(value: ir.Value, dims: Dims) -> ir.Value | None:
    """The permutation whose inverse the value is: a scatter of 0, 1, 2, ... by it, or a sort of it.

    It holds if that is a permutation at all, and for a scatter if its data is no longer than its indices.
    """
    value = flat(value)
    node = producer(value, "ScatterND", "ScatterElements", "TopK")
    if node is None:
        return None
    if node.op_type == "TopK":
        order = order_of(node, dims)
        return (
            flat(order.keys)
            if order is not None and order.told and order.ascending and value is order.permutation
            else None
        )
    data, indices, updates = node.inputs[:3]
    if data is None or indices is None or attribute(node, "reduction", "none") not in ("none", "add"):
        return None
    if node.op_type == "ScatterElements" and axis(node, 0) != 0:
        return None
    counter = producer(flat(updates), "Range") if updates is not None else None
    if counter is None or scalar(counter.inputs[0]) != 0 or scalar(counter.inputs[2]) != 1:
        return None
    if attribute(node, "reduction", "none") == "add" and not constant_fill(data, 0):
        return None
    return flat(indices) if dims.as_many(data, 1, indices, 1) else None


def constant_fill(value: ir.Value | None, number: float) -> bool:
    """Whether all elements are this number: a constant, or one that Expand or ConstantOfShape repeats."""
    if value is None:
        return False
    value = flat(value)
    known = constant(value)
    if known is not None:
        return known.dtype.kind in "iufb" and bool((known == number).all())
    node = producer(value, "Expand", "Tile", "Cast", "ConstantOfShape")
    if node is None:
        return False
    if node.op_type == "ConstantOfShape":
        fill = attribute(node, "value")
        return float(fill.numpy().ravel()[0]) == number if fill is not None else number == 0
    return constant_fill(node.inputs[0], number)
