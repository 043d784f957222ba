"""Projections whose matrix is gathered for each slot: ``y[s] = W[index[s]] x[s] + b[index[s]]``.

A slot is one token with one of its experts. Slots are counted in row-major order of the index, whatever its shape.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import onnx_ir as ir

from sparse_onnx.matching.einsum import two_operands
from sparse_onnx.matching.layout import flat, gathered
from sparse_onnx.matching.linear import MICROSOFT, Linear, Matrix, matrix
from sparse_onnx.matching.values import attribute, axis, ints, pairs, producer, rank, size


@dataclasses.dataclass(frozen=True)
class Projection:
    """One projection of slots.

    Attributes:
        layer: as `read_expert` takes it; its matrix is packed ``[E, ...]``.
        indices: of the matrix and, where there is one, of the bias: flattened, one element a slot.
        fan: 1: x has one row a slot. K: one row for K slots in succession, by broadcasting.
        inputs, outputs: of the matrix.
    """

    layer: Linear
    indices: tuple[ir.Value, ...]
    fan: int
    inputs: int
    outputs: int


@dataclasses.dataclass(frozen=True)
class _Gathered:
    """``stored[index]``: packed matrices or biases, one a slot, on the way turned or cut in half."""

    stored: Matrix
    index: ir.Value
    turned: bool = False
    split: tuple[int, int] | None = None
    """(axis of what is gathered, from the end; half of it) where only a half is used."""


def row_width(value: ir.Value) -> int | None:
    """Length of a row where it may lie along the last axis or, with a 1 behind it, along the last but one."""
    last = size(value, -1)
    return size(value, -2) if last == 1 and (rank(value) or 0) > 1 else last


def rows_behind(value: ir.Value) -> ir.Value:
    """The value behind reshapes that keep rows whole: ``[.., D]``, ``[.., 1, D]`` and ``[.., D, 1]`` are the same."""
    while True:
        node = producer(value, "Squeeze", "Unsqueeze", "Identity", "Reshape", "Flatten", "Transpose", "Cast")
        source = None if node is None or not node.inputs else node.inputs[0]
        if node is None or source is None:
            return value
        if node.op_type in ("Reshape", "Flatten", "Transpose"):
            width = row_width(value)
            if width is None or width != row_width(source):
                return value
        if node.op_type == "Cast" and (source.dtype is None or source.dtype != value.dtype):
            return value
        if node.op_type == "Transpose" and not _moves_ones(node, source):
            return value
        value = source


def _moves_ones(node: ir.Node, source: ir.Value) -> bool:
    order = attribute(node, "perm") or list(range(rank(source) or 0))[::-1]
    long = [at for at in order if size(source, at) != 1]
    return rank(source) is not None and long == sorted(long)


class SlotReader:
    """The `reader` of `read_expert` for gathered matrices; keeps what it found by multiplying node."""

    def __init__(self) -> None:
        self.found: dict[ir.Node, Projection] = {}
        self._known: dict[ir.Value, Projection | None] = {}

    def __call__(self, value: ir.Value) -> Linear | None:
        projection = self.read(value)
        return None if projection is None else projection.layer

    def read(self, value: ir.Value) -> Projection | None:
        """The projection that computes the value, its bias included."""
        value = rows_behind(value)
        if value not in self._known:
            result = self._half(value) or self._biased(value) or self.product(value)
            self._known[value] = result
            if result is not None:
                self.found[result.layer.node] = result
        return self._known[value]

    def _half(self, value: ir.Value) -> Projection | None:
        """One half of a packed projection in column form ``[.., 2 I, 1]``, which no reader of rows would see."""
        node = producer(value, "Split")
        source = None if node is None else node.inputs[0]
        if node is None or source is None or size(source, -1) != 1 or len(node.outputs) != 2:
            return None
        dimensions, width = rank(source), size(source, -2)
        lengths = ints(node.inputs[1]) if len(node.inputs) > 1 and node.inputs[1] is not None else None
        if dimensions is None or axis(node) != dimensions - 2 or width is None or width % 2:
            return None
        if lengths is not None and lengths != [width // 2] * 2:
            return None
        whole = self.read(source)
        if whole is None or whole.layer.weight.half is not None:
            return None
        half, layer = value.index() or 0, whole.layer
        bias = None if layer.bias is None else dataclasses.replace(layer.bias, half=half)
        weight = dataclasses.replace(layer.weight, half=half)
        layer = dataclasses.replace(layer, weight=weight, bias=bias)
        return dataclasses.replace(whole, layer=layer, outputs=whole.outputs // 2)

    def _biased(self, value: ir.Value) -> Projection | None:
        node = producer(value, "Add")
        for product, added in pairs(node) if node is not None else ():
            inner = self.read(product)
            bias = _read(added, 1)
            if inner is None or bias is None or inner.layer.bias is not None or bias.split is not None:
                continue
            if inner.layer.weight.half is not None or not _same_axes(product, added):
                continue
            layer = dataclasses.replace(inner.layer, bias=bias.stored)
            return dataclasses.replace(inner, layer=layer, indices=(*inner.indices, flat(bias.index)))
        return None

    def product(self, value: ir.Value) -> Projection | None:
        """The projection without bias that computes the value."""
        node = value.producer()
        if node is None or node.op_type not in ("MatMul", "FusedMatMul", "Einsum"):
            return None
        if node.op_type == "Einsum":
            return _einsum(value)
        if node.domain != (MICROSOFT if node.op_type == "FusedMatMul" else ""):
            return None
        return _matmul(node)


def _matmul(node: ir.Node) -> Projection | None:
    a, b = node.inputs[0], node.inputs[1]
    flip_a, flip_b = bool(attribute(node, "transA", 0)), bool(attribute(node, "transB", 0))
    if node.op_type == "FusedMatMul" and (
        attribute(node, "alpha", 1.0) != 1.0
        or attribute(node, "transBatchA", 0)
        or attribute(node, "transBatchB", 0)
    ):
        return None
    if a is None or b is None:
        return None
    for x, w, flip_x, flip_w, ahead in ((a, b, flip_a, flip_b, False), (b, a, flip_b, flip_a, True)):
        weight = _read(w, 2)
        # The row as [1, in] before the matrix, as [in, 1] behind it.
        if weight is None or size(x, -1 if ahead != flip_x else -2) != 1:
            continue
        fan = _fan(list(x.shape or ())[:-2], w)
        if rank(x) != rank(w) or fan is None:
            continue
        out_in = (weight.turned != flip_w) != ahead
        return _projection(node, x, weight, out_in, fan)
    return None


def _einsum(value: ir.Value) -> Projection | None:
    for x_term, x, w_term, w, result in two_operands(value):
        weight = _read(w, 2)
        lead, last = w_term[:-2], w_term[-2:]
        if weight is None or not lead or result[:-1] != lead or x_term[-1:] not in last or not x_term:
            continue
        inner, outer = x_term[-1], result[-1]
        if {inner, outer} != set(last) or outer in x_term or x_term[:-1] not in (lead, lead[:-1]):
            continue
        dims = list(x.shape or ())[:-1]
        if x_term[:-1] != lead:
            dims = [*dims, 1]
        fan = _fan(dims, w) if x.shape is not None else None
        if fan is None:
            continue
        node = value.producer()
        assert node is not None
        return _projection(node, x, weight, (last[0] == outer) != weight.turned, fan)
    return None


def _projection(node: ir.Node, x: ir.Value, weight: _Gathered, out_in: bool, fan: int) -> Projection | None:
    """`out_in`: whether what is gathered, before it is turned, has the outputs before the inputs."""
    stored = weight.stored
    if weight.split is not None:
        if weight.split[0] != (-2 if out_in else -1):
            return None
        stored = dataclasses.replace(stored, half=weight.split[1])
    layer = Linear(rows_behind(x), stored, None, out_in != stored.transposed, node)
    inputs, outputs = (size(stored.source, at) for at in ((-1, -2) if layer.out_in else (-2, -1)))
    if inputs is None or outputs is None:
        return None
    return Projection(layer, (flat(weight.index),), fan, inputs, outputs // (1 if stored.half is None else 2))


def _fan(lead: list[int | ir.SymbolicDim], w: ir.Value) -> int | None:
    """How many slots in succession each row of x feeds; None where its leading axes are not those of the matrices.

    One axis whose sizes cannot be compared is let through: all the others being equal, a difference there is a
    difference in the number of rows, which is asked once for the block.
    """
    if w.shape is None or len(lead) != len(w.shape) - 2:
        return None
    fan, unknown = 1, 0
    for at, (have, want) in enumerate(zip(lead, w.shape, strict=False)):
        if _equal(have, want):
            continue
        if have == 1 and at == len(lead) - 1 and at > 0 and isinstance(want, int):
            fan = want
        elif isinstance(have, int) and isinstance(want, int):
            return None
        else:
            unknown += 1
    return fan if unknown <= 1 else None


def _equal(a: int | ir.SymbolicDim, b: int | ir.SymbolicDim) -> bool:
    return a == b and (isinstance(a, int) or a.value is not None)


def _same_axes(a: ir.Value, b: ir.Value) -> bool:
    return a.shape is not None and b.shape is not None and aligned_axes(list(a.shape), list(b.shape))


def aligned_axes(a: Sequence[int | ir.SymbolicDim], b: Sequence[int | ir.SymbolicDim]) -> bool:
    """Whether the axes pair off, given that they count equally many elements: one pair at most cannot be compared."""
    if len(a) != len(b):
        return False
    different = [(x, y) for x, y in zip(a, b, strict=True) if not _equal(x, y)]
    return len(different) <= 1 and not any(isinstance(x, int) and isinstance(y, int) for x, y in different)


def _read(value: ir.Value, tail: int) -> _Gathered | None:
    """Packed tensors with `tail` axes behind the experts', gathered by an index, turned or cut in half on the way."""
    turned, split = False, None
    while True:
        node = producer(value, "Transpose", "Reshape", "Squeeze", "Unsqueeze", "Identity", "Split")
        source = None if node is None else node.inputs[0]
        if node is None or source is None:
            break
        if node.op_type == "Transpose":
            if tail != 2 or not turns_matrices(node, source):
                return None
            turned = not turned
            if split is not None:
                split = (-3 - split[0], split[1])
        elif node.op_type == "Split":
            dimensions, along = rank(source), axis(node)
            if len(node.outputs) != 2 or split is not None or dimensions is None or along is None:
                return None
            if along < dimensions - 2 or size(node.outputs[0], along) != size(node.outputs[1], along):
                return None
            if size(node.outputs[0], along) is None or tail != 2:
                return None
            split = (along - dimensions, value.index() or 0)
        elif not _keeps_tail(source, value, tail):
            return None
        value = source
    read = gathered(value)
    if read is None or rank(read[0]) != tail + 1:
        return None
    stored = matrix(read[0]) or Matrix(read[0])
    if stored.index is not None or stored.half is not None:
        return None
    return _Gathered(stored, read[1], turned, split)


def _keeps_tail(source: ir.Value, value: ir.Value, tail: int) -> bool:
    if tail == 1:
        return row_width(source) is not None and row_width(source) == row_width(value)
    return all(size(source, at) is not None and size(source, at) == size(value, at) for at in (-1, -2))


def turns_matrices(node: ir.Node, source: ir.Value) -> bool:
    dimensions = rank(source)
    order = attribute(node, "perm")
    if dimensions is None or order is None:
        return False
    return list(order) == [*range(dimensions - 2), dimensions - 1, dimensions - 2]


__all__ = [
    "Projection",
    "SlotReader",
    "aligned_axes",
    "row_width",
    "rows_behind",
    "turns_matrices",
]
