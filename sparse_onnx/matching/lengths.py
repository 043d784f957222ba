"""Lengths of axes as products, and what an operator makes of them."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Hashable, Sequence
from typing import Any

import onnx_ir as ir

from sparse_onnx.matching.einsum import equation
from sparse_onnx.matching.values import attribute, axes, ints, scalar, size

LIKE_FIRST = frozenset(
    """
    Abs BatchNormalization Cast CastLike Clip CumSum Dropout Elu Erf Exp FastGelu Floor Gelu
    GroupNormalization HardSigmoid HardSwish Identity InstanceNormalization IsInf IsNaN
    LayerNormalization LeakyRelu Log LogSoftmax Mish Neg Not QuickGelu RMSNormalization RandomNormalLike
    RandomUniformLike Reciprocal Relu Round ScatterElements ScatterND Sigmoid Sign SimplifiedLayerNormalization
    SkipLayerNormalization SkipSimplifiedLayerNormalization Softmax Softplus Sqrt Swish Tanh
    """.split()  # noqa: SIM905
)
BROADCAST = frozenset(
    """
    Add And BiasGelu Div Equal Greater GreaterOrEqual Less LessOrEqual Max Min Mod Mul Or Pow Sub Sum Where Xor
    """.split()  # noqa: SIM905
)
REDUCTIONS = frozenset({"ReduceMax", "ReduceMean", "ReduceMin", "ReduceSum"})
PRODUCTS = frozenset({"MatMul", "FusedMatMul", "Gemm", "FusedGemm"})
#: Windows that slide along the axes from the third on.
WINDOWS = frozenset({"AveragePool", "Conv", "GlobalAveragePool", "GlobalMaxPool", "MaxPool"})
#: An end that Slice is given for "all the rest".
_FAR = 2**31 - 1


@dataclasses.dataclass(frozen=True)
class Length:
    """``number`` times the unknowns ``atoms`` (sorted): named dimensions, and axes that nothing is known of."""

    number: int
    atoms: tuple[Hashable, ...] = ()

    def __mul__(self, other: Length) -> Length:
        if not self.atoms or not other.atoms:
            return Length(self.number * other.number, self.atoms or other.atoms)
        return Length(self.number * other.number, tuple(sorted(self.atoms + other.atoms, key=repr)))

    def over(self, part: Length) -> Length | None:
        """The quotient, where it is a length."""
        left = list(self.atoms)
        for atom in part.atoms:
            if atom not in left:
                return None
            left.remove(atom)
        if not part.number or self.number % part.number:
            return None
        return Length(self.number // part.number, tuple(left))


Lengths = tuple[Length, ...]
#: None for an axis that nothing is known of.
Known = tuple[Length | None, ...]

ONE = Length(1)
#: What a target of Reshape says of an axis that is left open.
OPEN = Length(-1)


def product(lengths: Sequence[Length]) -> Length:
    number, atoms = 1, list[Hashable]()
    for length in lengths:
        number *= length.number
        atoms += length.atoms
    return Length(number, tuple(sorted(atoms, key=repr) if len(atoms) > 1 else atoms))


@functools.lru_cache(4096)
def named(symbol: str) -> Length:
    """``4*s30*s49`` of torch's exporter is a product; every other name is one unknown."""
    parts = symbol.replace(" ", "").split("*")
    if not all(part.replace("_", "").isalnum() for part in parts):
        return Length(1, (symbol,))
    return product([Length(int(part)) if part.isdigit() else Length(1, (part,)) for part in parts])


def broadcast(shapes: Sequence[Lengths]) -> Known:
    """An axis of two different unknowns stays unknown: either may be 1."""
    result: list[Length | None] = []
    for at in range(1, max(map(len, shapes), default=0) + 1):
        lengths = {shape[-at] for shape in shapes if len(shape) >= at} - {ONE}
        lengths = {length for length in lengths if not length.atoms and length.number > 1} or lengths
        result.insert(0, ONE if not lengths else lengths.pop() if len(lengths) == 1 else None)
    return tuple(result)


def reshaped(node: ir.Node, first: Lengths | None, total: Length, target: Lengths) -> Known | None:
    lengths: list[Length | None] = []
    for at, length in enumerate(target):
        if length == Length(0) and not attribute(node, "allowzero", 0):
            if first is None or at >= len(first):
                return None
            lengths.append(first[at])
        else:
            lengths.append(None if length == OPEN else length)
    if lengths.count(None) == 1:
        rest = product([length for length in lengths if length is not None])
        lengths[lengths.index(None)] = total.over(rest)
    return tuple(lengths)


def through(node: ir.Node, inputs: Sequence[Lengths | None], taken: Length | None) -> Known | None:
    """Axes of the node's (first) output by those of its inputs; None where this does not tell their number.

    Operators that are given a shape are not among them; `taken` is what TopK is told to take.
    """
    op, first = node.op_type, inputs[0] if inputs else None
    if op == "GatherElements":
        return inputs[1]
    if first is None:
        return None
    if op in LIKE_FIRST:
        return first
    if op in WINDOWS:
        return _windowed(node, first)
    if op in BROADCAST:
        return None if None in inputs else broadcast([item for item in inputs if item is not None])
    if op == "TopK":
        return _changed(first, attribute(node, "axis", -1), taken)
    if op in REDUCTIONS:
        return _reduced(node, first, axes(node))
    if op in ("ArgMax", "ArgMin"):
        return _reduced(node, first, [attribute(node, "axis", 0)])
    if op == "OneHot":
        at, depth = attribute(node, "axis", -1) % (len(first) + 1), scalar(node.inputs[1])
        return (*first[:at], None if depth is None else Length(int(depth)), *first[at:])
    if op == "Transpose":
        order = attribute(node, "perm") or list(range(len(first)))[::-1]
        return tuple(first[at] for at in order) if len(order) == len(first) else None
    if op in ("Unsqueeze", "Squeeze"):
        return _squeezed(node, first)
    if op == "Flatten":
        at = attribute(node, "axis", 1)
        at = at + len(first) if at < 0 else at
        return product(first[:at]), product(first[at:])
    if op in ("Slice", "Split", "Concat"):
        return _sliced(node, first) if op == "Slice" else _cut(node, first, inputs)
    if op in PRODUCTS:
        return _multiplied(node, first, inputs[1])
    if op == "Einsum":
        return _contracted(node, inputs)
    if op == "Gather" and first and inputs[1] is not None:
        at = attribute(node, "axis", 0) % len(first)
        return (*first[:at], *inputs[1], *first[at + 1 :])
    return None


def _changed(first: Lengths, at: int, length: Length | None) -> Known | None:
    if not first:
        return None
    at %= len(first)
    return (*first[:at], length, *first[at + 1 :])


def _reduced(node: ir.Node, first: Lengths, along: list[int] | None) -> Lengths | None:
    if along is None or not first:
        return None
    along = [at % len(first) for at in along]
    if attribute(node, "keepdims", 1):
        return tuple(ONE if at in along else length for at, length in enumerate(first))
    return tuple(length for at, length in enumerate(first) if at not in along)


def _squeezed(node: ir.Node, first: Lengths) -> Lengths | None:
    along = axes(node)
    if along is None:
        return None
    if node.op_type == "Squeeze":
        along = [at % max(1, len(first)) for at in along]
        return tuple(length for at, length in enumerate(first) if at not in along)
    total = len(first) + len(along)
    along = [at % total for at in along]
    rest = iter(first)
    return tuple(ONE if at in along else next(rest) for at in range(total))


def _windowed(node: ir.Node, first: Lengths) -> Known | None:
    """Equal lengths for equal windows along axes of one length."""
    count, weight = len(first) - 2, node.inputs[1] if node.op_type == "Conv" else None
    if count < 1:
        return None
    if node.op_type.startswith("Global"):
        return (*first[:2], *(ONE,) * count)
    stored = [size(weight, at + 2) for at in range(count)]
    kernel: list[Any] | None = attribute(node, "kernel_shape") if weight is None else stored
    channels = size(weight, 0)
    made = first[1] if weight is None else None if channels is None else Length(channels)
    if kernel is None or len(kernel) != count or None in kernel:
        return (first[0], made, *(None,) * count)
    ones: list[int] = [1] * count
    strides, dilations = attribute(node, "strides", ones), attribute(node, "dilations", ones)
    pads, rest = (
        attribute(node, "pads", [0] * 2 * count),
        (attribute(node, "auto_pad", "NOTSET"), attribute(node, "ceil_mode", 0)),
    )
    lengths: list[Length | None] = []
    for at, length in enumerate(first[2:]):
        padded = pads[at] + pads[at + count]
        kept = rest[0] == "NOTSET" and strides[at] == 1 and padded == dilations[at] * (kernel[at] - 1)
        window = repr((length, kernel[at], strides[at], dilations[at], padded, rest))
        # A digest, since windows behind windows would nest without end.
        lengths.append(length if kept else Length(1, (hashlib.sha256(window.encode()).hexdigest(),)))
    return (first[0], made, *lengths)


def _multiplied(node: ir.Node, a: Lengths, b: Lengths | None) -> Known | None:
    turned = [attribute(node, name, 0) for name in ("transA", "transBatchA", "transBatchB")]
    if b is None or len(a) < 2 or len(b) < 2 or any(turned):
        return None
    last = b[-2] if attribute(node, "transB", 0) else b[-1]
    return (*broadcast([a[:-2], b[:-2]]), a[-2], last)


def _cut(node: ir.Node, first: Lengths, inputs: Sequence[Lengths | None]) -> Known | None:
    """Only the axis along which it cuts, or joins, changes its length."""
    if not first:
        return None
    at = attribute(node, "axis", 0) % len(first)
    total: Length | None = None
    parts = [item for item in inputs if item is not None and len(item) == len(first)]
    if node.op_type == "Concat" and len(parts) == len(inputs) and not any(item[at].atoms for item in parts):
        total = Length(sum(item[at].number for item in parts))
    return _changed(first, at, total)


def _sliced(node: ir.Node, first: Lengths) -> Known | None:
    given = node.inputs[3] if len(node.inputs) > 3 else None
    along = list(range(len(first))) if given is None else ints(given)
    if along is None:
        return None
    lengths: list[Length | None] = list(first)
    bounds = [ints(item) for item in node.inputs[1:3]]
    forward = len(node.inputs) < 5 or set(ints(node.inputs[4]) or [0]) == {1}
    for at, axis in enumerate(along):
        whole = first[axis]
        lengths[axis] = None
        start, end = (None if found is None or at >= len(found) else found[at] for found in bounds)
        if start is None or end is None or not forward:
            continue
        if start == 0 and end >= _FAR:
            lengths[axis] = whole
        elif not whole.atoms:
            lengths[axis] = Length(len(range(whole.number)[start:end]))
    return tuple(lengths)


def _contracted(node: ir.Node, shapes: Sequence[Lengths | None]) -> Known | None:
    read = equation(node)
    if read is None:
        return None
    lengths: dict[str, Length] = {}
    for term, shape in zip(read[0], shapes, strict=True):
        if shape is None or len(shape) != len(term):
            return None
        lengths.update({letter: length for letter, length in zip(term, shape, strict=True) if length != ONE})
    return tuple(lengths.get(letter, ONE) for letter in read[1])
