"""Elementwise arithmetic on indices, evaluated in the graph's own types to prove what it computes.

Exporters write `slot // K`, `clip(id)` or torch.histc's bins as chains of up to ten operators. What such a chain is,
its values tell: on all ids where they are few, on a dense range and round every constant of the chain where not.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir

from sparse_onnx.matching.layout import flat
from sparse_onnx.matching.values import attribute, constant, producer

Array = np.ndarray
Seed = Callable[[ir.Value], Array | None]

#: Nodes of the longest chain that is followed.
_LONGEST = 64


def _divide(a: Array, b: Array) -> Array:
    if a.dtype.kind in "iu":  # ONNX: integers are rounded towards zero
        quotient = np.abs(a) // np.abs(b)
        return (quotient * np.sign(a) * np.sign(b)).astype(a.dtype)
    return a / b


def _modulo(a: Array, b: Array, fmod: int = 0) -> Array:
    return np.fmod(a, b) if fmod else np.mod(a, b)


def _shift(a: Array, b: Array, direction: str = "") -> Array:
    return np.left_shift(a, b) if direction == "LEFT" else np.right_shift(a, b)


def _clip(x: Array, low: Array | None = None, high: Array | None = None, **bounds: float) -> Array:
    low = np.asarray(bounds["min"], x.dtype) if "min" in bounds else low
    high = np.asarray(bounds["max"], x.dtype) if "max" in bounds else high
    x = x if low is None else np.maximum(x, low)
    return x if high is None else np.minimum(x, high)


_OPERATORS: dict[str, Callable[..., Array]] = {
    "Abs": np.abs,
    "Add": np.add,
    "And": np.logical_and,
    "BitShift": _shift,
    "Ceil": np.ceil,
    "Clip": _clip,
    "Div": _divide,
    "Equal": np.equal,
    "Floor": np.floor,
    "Greater": np.greater,
    "GreaterOrEqual": np.greater_equal,
    "Less": np.less,
    "LessOrEqual": np.less_equal,
    "Max": np.maximum,
    "Min": np.minimum,
    "Mod": _modulo,
    "Mul": np.multiply,
    "Neg": np.negative,
    "Not": np.logical_not,
    "Or": np.logical_or,
    "Round": np.round,
    "Sign": np.sign,
    "Sub": np.subtract,
    "Where": np.where,
    "Xor": np.logical_xor,
}
_ATTRIBUTES = ("fmod", "direction", "min", "max")


@dataclasses.dataclass
class _Run:
    """One evaluation: what is known, whether a value was reshaped on its way, and the types that occurred."""

    seed: Seed
    known: dict[int, tuple[Array, bool] | None] = dataclasses.field(default_factory=dict)
    constants: list[float] = dataclasses.field(default_factory=list)
    dtypes: set[np.dtype[Any]] = dataclasses.field(default_factory=set)

    def value(self, value: ir.Value) -> tuple[Array, bool] | None:
        below = flat(value)
        start = self.seed(below)
        if start is not None:
            return start, below is not value
        if id(below) not in self.known:
            if len(self.known) > _LONGEST:
                return None
            self.known[id(below)] = None
            self.known[id(below)] = self._node(below)
        found = self.known[id(below)]
        return None if found is None else (found[0], found[1] or below is not value)

    def _node(self, value: ir.Value) -> tuple[Array, bool] | None:
        node = producer(value)
        if node is None or (node.op_type != "Cast" and node.op_type not in _OPERATORS):
            return None
        inputs: list[Array | None] = []
        variable: list[tuple[ir.Value, bool]] = []
        for item in node.inputs:
            number = None if item is None else constant(item)
            if item is None:
                inputs.append(None)
            elif number is not None:
                if number.size != 1 or number.dtype.kind not in "iufb":
                    return None
                inputs.append(number.reshape(()))
                self.constants.append(float(number.reshape(())))
            else:
                found = self.value(item)
                if found is None:
                    return None
                inputs.append(found[0])
                variable.append((item, found[1]))
        if not variable or not _aligned(variable):
            return None
        with np.errstate(all="ignore"):
            result = _apply(node, inputs)
        if result is None:
            return None
        self.dtypes.add(result.dtype)
        return result, any(reshaped for _, reshaped in variable)


def _aligned(inputs: list[tuple[ir.Value, bool]]) -> bool:
    """Whether equal positions of the inputs meet: nobody has reshaped any of them, or they have one known shape."""
    if len(inputs) == 1 or not any(reshaped for _, reshaped in inputs):
        return True
    return all(same_shape(item, inputs[0][0]) for item, _ in inputs)


def same_shape(a: ir.Value, b: ir.Value) -> bool:
    """Whether the shapes are proved to be equal: sizes, or symbols with a name."""
    if a.shape is None or b.shape is None or len(a.shape) != len(b.shape):
        return False
    return all(
        x == y and (isinstance(x, int) or x.value is not None) for x, y in zip(a.shape, b.shape, strict=True)
    )


def _apply(node: ir.Node, inputs: list[Array | None]) -> Array | None:
    first = inputs[0]
    if first is None:
        return None
    if node.op_type == "Cast":
        target = ir.DataType(attribute(node, "to"))
        numeric = target.is_integer() or target.is_floating_point() or target == ir.DataType.BOOL
        return first.astype(target.numpy()) if numeric else None
    if node.op_type != "Clip" and any(item is None for item in inputs):
        return None
    attributes = {name: item.value for name, item in node.attributes.items() if name in _ATTRIBUTES}
    try:
        return np.asarray(_OPERATORS[node.op_type](*inputs, **attributes))
    except TypeError:  # a type or a number of inputs that numpy's counterpart does not take
        return None


def evaluated(value: ir.Value, seed: Seed) -> Array | None:
    """The value, elementwise computed from those values for which `seed` has samples; None where it is not."""
    found = _Run(seed).value(value)
    return None if found is None else found[0]


def quotient(value: ir.Value, index: ir.Value) -> int | None:
    """K where the value is proved to be `index // K` for indices from 0 on (K = 1: the indices themselves)."""
    base = flat(index)
    if flat(value) is base:
        return 1
    dtype = np.dtype(np.int64) if base.dtype is None else base.dtype.numpy()

    def run(samples: Array) -> tuple[Array | None, _Run]:
        probe = _Run(lambda item: samples if item is base else None)
        found = probe.value(value)
        return (None if found is None else found[0]), probe

    samples = np.arange(4097).astype(dtype)
    result, probe = run(samples)
    if result is None or result.dtype.kind not in "iu" or result.shape != samples.shape:
        return None
    zeros = int((result == 0).sum())
    if not 1 <= zeros <= 1024:
        return None
    limit = _exact_limit(probe.dtypes | {dtype})
    marks = {
        int(abs(c) * f) + d for c in probe.constants if abs(c) < limit for f in (1, zeros) for d in (-1, 0, 1)
    }
    powers = {(1 << e) + d for e in range(63) for d in (-1, 0, 1)}
    points = np.array(sorted(p for p in {*range(4097), *marks, *powers} if 0 <= p < limit)).astype(dtype)
    result, _ = run(points)
    if result is None or not np.array_equal(result.astype(np.int64), points.astype(np.int64) // zeros):
        return None
    return zeros


def _exact_limit(dtypes: set[np.dtype[Any]]) -> int:
    """Below it every integer is exact in all of the types. Chains in floating point are right up to there."""
    limit = 1 << 40
    for dtype in dtypes - {np.dtype(np.bool_)}:
        if dtype.kind in "iu":
            limit = min(limit, int(np.iinfo(dtype).max) >> 1)
        else:
            limit = min(limit, 2 << ir.DataType.from_numpy(dtype).mantissa_bitwidth)
    return limit
