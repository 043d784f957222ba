"""Dense gates ``[..., E]``: values of which it is proved what they hold where a token did not choose an expert.

Routers write their choice into dense tensors in many ways: ScatterElements into zeros, a comparison of the chosen
indices with each expert's number, a one-hot, a masked softmax. Here one fact is followed through the operators: the
constant that stands at ``[t, e]`` where e is not among the experts `ids[t]`. Gates are sparse where it is exactly 0.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir

from sparse_onnx.matching.dims import Dims
from sparse_onnx.matching.elementwise import evaluate, known
from sparse_onnx.matching.gate import Gate
from sparse_onnx.matching.gate_products import contracted
from sparse_onnx.matching.gate_sources import SOFT_MIXTURE, arange, from_top_values, not_zero, uniform
from sparse_onnx.matching.gate_views import unproved_column, viewed
from sparse_onnx.matching.lengths import ONE
from sparse_onnx.matching.values import attribute, axes, constant, pairs, scalar

#: Fills of a mask from which on a softmax is exactly zero, whatever a router's scores are.
_LOW = -1e30
#: From here on a sigmoid is exactly zero in every floating-point type.
_NO_SIGMOID = -1000.0
_TIES = "experts are chosen by comparison with the k-th largest score: ties would choose more than k"

_COMPARE: dict[str, Callable[..., Any]] = {
    "Equal": np.equal,
    "Greater": np.greater,
    "GreaterOrEqual": np.greater_equal,
    "Less": np.less,
    "LessOrEqual": np.less_equal,
    "And": np.logical_and,
    "Or": np.logical_or,
    "Xor": np.logical_xor,
    "Not": np.logical_not,
    "Where": lambda c, a, b: a if c else b,
}


class Gates:
    """Reads gates, each value once."""

    def __init__(self, dims: Dims) -> None:
        self.dims = dims
        self._known: dict[ir.Value, Gate | None] = {}

    def read(self, value: ir.Value | None) -> Gate | None:
        if value is None:
            return None
        work = [value]
        while work:
            at = work[-1]
            if at in self._known:
                work.pop()
                continue
            node = at.producer()
            waiting = [item for item in _followed(node) if item not in self._known]
            if waiting:
                work.extend(waiting)
                continue
            work.pop()
            found = None if node is None else self._node(at, node)
            if found is not None and found.expert is not None:
                found = dataclasses.replace(found, experts=self.dims.size(at, found.expert))
            self._known[at] = found
        return self._known[value]

    def _of(self, value: ir.Value | None) -> Gate | None:
        return None if value is None else self._known.get(value)

    def _node(self, value: ir.Value, node: ir.Node) -> Gate | None:
        op = node.op_type
        first = self._of(node.inputs[0]) if node.inputs else None
        if op == "ScatterElements":
            return self._scattered(value, node)
        if op == "OneHot":
            return _one_hot(value, node, self.dims)
        if op in ("ReduceSum", "ReduceMax"):
            return None if first is None else _reduced(node, first, self.dims)
        if op in ("Softmax", "Sigmoid") and first is None:
            return _mixture(value, node, self.dims)
        if op == "Softmax":
            return None if first is None else _softmax(node, first, self.dims)
        if op in ("Einsum", "MatMul"):
            return contracted(node, self.dims, self._of)
        if op in _VIEWS:
            return self._view(value, node, first)
        if op == "Equal" and not any(self._of(item) for item in node.inputs):
            return _equal(value, node, self.dims)
        found = self._elementwise(value, node)
        return self._threshold(value, node) if found is None else found

    def _view(self, value: ir.Value, node: ir.Node, first: Gate | None) -> Gate | None:
        if first is None:
            return unproved_column(value, node, self.dims)
        found = viewed(value, node, first, self.dims)
        if found is None and first.column is not None:
            flaw = first.flaw or f"'{value.name}' holds the gates of some tokens only, or in another order"
            return dataclasses.replace(first, inside=None, flaw=flaw)
        return found

    def _scattered(self, value: ir.Value, node: ir.Node) -> Gate | None:
        base, ids, updates = node.inputs[:3]
        fill, dimensions = uniform(base), self.dims.rank(value)
        at = self.dims.axis(node)
        if fill is None or ids is None or dimensions is None or at is None:
            return None
        slots = self.dims.size(ids, at)
        behind = [self.dims.size(item, other) for item in (value, ids) for other in range(at + 1, dimensions)]
        if slots is None or any(length != 1 for length in behind):
            return None
        reduction = attribute(node, "reduction", "none")
        if reduction not in ("none", "add") or (fill != 0 and reduction == "add"):
            return None
        inside = updates if uniform(updates) is None else uniform(updates)
        if inside is not updates and (inside != 1.0 or fill != 0):
            inside = None
        if fill != 0 and inside is updates:
            inside = None
        flaw = ""
        if not self.dims.same_rows(value, ids, drop=dimensions - at):
            flaw = f"the mask '{value.name}' may have other tokens than the chosen experts '{ids.name}'"
        return Gate(ids, slots, at, None, fill, inside, distinct=reduction == "none", flaw=flaw)

    def _elementwise(self, value: ir.Value, node: ir.Node) -> Gate | None:
        op = node.op_type
        if node.domain != "" or not (known("", op) or op in _COMPARE or op == "CastLike"):
            return None
        operands = node.inputs[:1] if op == "CastLike" else node.inputs
        found = [(self._of(item), item) for item in operands if item is not None]
        gates = [(gate, item) for gate, item in found if gate is not None]
        if not gates or (any(item is None for item in node.inputs) and op != "Clip"):
            return None
        # A mask goes before what it masks, which may be a softmax over all experts.
        gate, own = min(gates, key=lambda pair: (bool(pair[0].flaw), pair[0].flaw == SOFT_MIXTURE))
        for item in operands:
            if item is not None and item is not own and not self.dims.covers(own, item):
                return None
        if gate.flaw:
            return dataclasses.replace(gate, inside=None)
        outside = _outcome(node, [self._sample(item, gate, own, False) for item in operands])
        if outside is None:
            return dataclasses.replace(gate, inside=None, flaw=not_zero(value))
        inside: ir.Value | float | None = None
        if gate.inside == 1.0 and not isinstance(gate.inside, ir.Value):
            inside = _outcome(node, [self._sample(item, gate, own, True) for item in operands])
            inside = 1.0 if inside == 1.0 else self._weights(node, gate, own)
        elif op in ("Cast", "CastLike") and own.dtype == value.dtype:
            inside = gate.inside
        return dataclasses.replace(
            gate, outside=outside, inside=inside, plain=gate.plain and inside is not None
        )

    def _sample(self, item: ir.Value | None, gate: Gate, own: ir.Value, inside: bool) -> float | None:
        """What the operand holds everywhere outside (inside) of the chosen experts; None where that varies."""
        if item is None:
            return None
        other = gate if item is own else self._of(item)
        if other is not None:
            same = other.ids is gate.ids and (other.expert, other.column) == (gate.expert, gate.column)
            if not same or other.flaw or other.slots != gate.slots or not self.dims.same(own, item):
                return None
            return (other.inside if isinstance(other.inside, float) else None) if inside else other.outside
        return uniform(item)

    def _weights(self, node: ir.Node, gate: Gate, own: ir.Value) -> ir.Value | None:
        """The other operand of a product with the mask, where it has one weight for each element of `ids`."""
        others = [item for item in node.inputs if item is not None and item is not own]
        if node.op_type == "Where" and node.inputs[0] is own and uniform(node.inputs[2]) == 0:
            others = [item for item in others if item is not node.inputs[2]]
        elif node.op_type != "Mul":
            return None
        if len(others) != 1 or not gate.plain or gate.slots is not None:
            return None
        mask, weights = self.dims.of(own), self.dims.of(others[0])
        if mask is None or weights is None:
            return None
        weights = (ONE,) * (len(mask) - len(weights)) + weights
        for at, (length, weight) in enumerate(zip(mask, weights, strict=True)):
            if weight != (ONE if at == gate.expert else length):
                return None
        return others[0]

    def _threshold(self, value: ir.Value, node: ir.Node) -> Gate | None:
        if node.op_type not in ("Greater", "GreaterOrEqual", "Less", "LessOrEqual"):
            return None
        for scores, bound in pairs(node):
            if from_top_values(bound, scores) and self.dims.covers(scores, bound):
                return Gate(None, None, (self.dims.rank(value) or 1) - 1, None, math.nan, None, flaw=_TIES)
        return None


_VIEWS = frozenset(
    {"Reshape", "Squeeze", "Unsqueeze", "Flatten", "Transpose", "Identity", "Gather", "Slice", "Split"}
)
_SOURCES = frozenset({"ScatterElements", "OneHot"})


def _followed(node: ir.Node | None) -> list[ir.Value]:
    """The inputs of which a fact about the result may follow."""
    if node is None or node.domain != "" or node.op_type in _SOURCES:
        return []
    if node.op_type in _VIEWS or node.op_type in ("ReduceSum", "ReduceMax", "Softmax"):
        return [item for item in node.inputs[:1] if item is not None]
    if node.op_type in ("Einsum", "MatMul") and len(node.inputs) == 2:
        constants = [item for item in node.inputs if item is not None and item.is_initializer()]
        return [] if constants else [item for item in node.inputs if item is not None]
    if known("", node.op_type) or node.op_type in _COMPARE or node.op_type == "CastLike":
        return [item for item in node.inputs if item is not None and not item.is_initializer()]
    return []


def _equal(value: ir.Value, node: ir.Node, dims: Dims) -> Gate | None:
    for ids, other in pairs(node):
        if constant(ids) is not None or ids.dtype is None or not ids.dtype.is_integer():
            continue
        number, dimensions = scalar(other), dims.rank(value)
        if (
            number is not None
            and dims.rank(other) is not None
            and (dims.rank(other) or 0) <= (dims.rank(ids) or 0)
        ):
            return Gate(ids, None, None, int(number), 0.0, 1.0, plain=True)
        counted = arange(other)
        if counted is None or dimensions is None or dims.rank(ids) is None:
            continue
        from_right = counted[1]
        if from_right > (dims.rank(ids) or 0) or dims.size(ids, -from_right) == 1:
            return Gate(ids, None, dimensions - from_right, None, 0.0, 1.0, plain=True)
    return None


def _one_hot(value: ir.Value, node: ir.Node, dims: Dims) -> Gate | None:
    ids, values, dimensions = node.inputs[0], constant(node.inputs[2]), dims.rank(value)
    at = attribute(node, "axis", -1)
    if ids is None or values is None or values.size != 2 or dimensions is None:
        return None
    off, on = (float(item) for item in values.ravel())
    inside = 1.0 if on == 1 else None
    return Gate(ids, None, at % dimensions, None, off, inside, plain=True)


def _reduced(node: ir.Node, gate: Gate, dims: Dims) -> Gate | None:
    """The slots' axis summed away."""
    along, dimensions = axes(node), dims.rank(node.inputs[0])
    if along is None or len(along) != 1 or dimensions is None:
        return None
    at = along[0] % dimensions
    if at == gate.expert:
        return None
    behind = [axis_ for axis_ in range(at + 1, dimensions) if axis_ != gate.expert]
    slots = dims.size(node.inputs[0], at)
    if gate.expert is not None and at < gate.expert and not attribute(node, "keepdims", 1):
        gate = dataclasses.replace(gate, expert=gate.expert - 1)
    if gate.flaw:
        return gate
    last = slots is not None and all(dims.size(node.inputs[0], axis_) == 1 for axis_ in behind)
    if not last or not gate.plain or gate.slots is not None or dims.size(gate.ids, -1) not in (slots, 1):
        flaw = f"the sum '{node.name}' of a mask does not run over the experts of one token, its slots, alone"
        return dataclasses.replace(gate, inside=None, flaw=flaw)
    total = node.op_type == "ReduceSum"
    if total and gate.outside != 0:
        return dataclasses.replace(gate, inside=None, flaw=not_zero(node.outputs[0]))
    inside, distinct = gate.inside, gate.distinct
    if not total:
        inside, distinct = (1.0 if inside == 1.0 and isinstance(inside, float) else None), True
    return dataclasses.replace(gate, slots=slots, inside=inside, plain=False, distinct=distinct)


def _mixture(value: ir.Value, node: ir.Node, dims: Dims) -> Gate | None:
    count, dimensions = dims.size(value, -1), dims.rank(value)
    if count is None or count < 2 or dimensions is None:
        return None
    if node.op_type == "Softmax" and axis_from_front(node, dimensions) != dimensions - 1:
        return None
    return Gate(None, None, dimensions - 1, None, math.nan, None, flaw=SOFT_MIXTURE)


def axis_from_front(node: ir.Node, dimensions: int) -> int:
    found: int = attribute(node, "axis", -1)
    return found % dimensions


def _softmax(node: ir.Node, gate: Gate, dims: Dims) -> Gate | None:
    dimensions = dims.rank(node.inputs[0])
    if gate.expert is None or dimensions is None or axis_from_front(node, dimensions) != gate.expert:
        return None
    if gate.flaw:
        return gate
    dtype = node.inputs[0].dtype if node.inputs[0] is not None else None
    lowest = float(ir.DataType.FLOAT.numpy().type(_LOW)) if dtype is None else max(_LOW, _lowest(dtype))
    if gate.outside <= lowest:
        return dataclasses.replace(gate, outside=0.0, inside=None)
    flaw = (
        f"soft mask: {gate.outside:g} stands in the place of minus infinity before the softmax at '{node.name}', so "
        "that a weight that should be 0 is not proved to be"
    )
    return dataclasses.replace(gate, outside=math.nan, inside=None, flaw=flaw)


def _lowest(dtype: ir.DataType) -> float:
    return float(dtype.min) if dtype.is_floating_point() else _LOW


def _outcome(node: ir.Node, samples: list[float | None]) -> float | None:
    """The operator on what its operands hold outside (None: they vary); None where the result is not one constant."""
    op = node.op_type
    if op in ("Mul", "And") and any(item == 0 for item in samples):
        return 0.0
    if op == "Or" and any(item == 1 for item in samples):
        return 1.0
    if op == "Add" and any(item == -math.inf for item in samples):
        return -math.inf
    if op == "Div" and samples[0] == 0:
        return 0.0
    if op == "Where" and samples[0] is None:
        return samples[1] if samples[1] == samples[2] else None
    if op == "Where":
        return samples[1] if samples[0] else samples[2]
    if op == "Sigmoid" and samples[0] is not None and samples[0] <= _NO_SIGMOID:
        return 0.0
    needed = samples[:1] if op == "Clip" else samples
    if any(item is None for item in needed):
        return None
    if op in _COMPARE:
        return float(_COMPARE[op](*samples))
    if op in ("Cast", "CastLike"):
        return float(samples[0] != 0) if node.outputs[0].dtype == ir.DataType.BOOL else samples[0]
    if op == "Clip" and any(
        sample is None and item is not None for sample, item in zip(samples, node.inputs, strict=True)
    ):
        return None
    attributes = {name: item.value for name, item in node.attributes.items()}
    arrays = [None if item is None else np.asarray(item, np.float64) for item in samples]
    result = float(evaluate("", op, arrays, attributes))
    return math.nan if op == "Sigmoid" and result == 0 else result
