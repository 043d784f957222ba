"""All experts at once: products with weights ``[E, in, out]``, and copies of the tokens, one an expert.

Every value of such a block has an axis of experts. It is found from the products, and followed through reshapes, so
that no reshape that mixes tokens and experts goes unnoticed.
"""

from __future__ import annotations

import dataclasses

import onnx_ir as ir

from sparse_onnx.matching.dims import Dims
from sparse_onnx.matching.elementwise import known as is_elementwise
from sparse_onnx.matching.gate import Gate
from sparse_onnx.matching.gate_sources import uniform
from sparse_onnx.matching.gates import Gates
from sparse_onnx.matching.layout import keeps_last_axis
from sparse_onnx.matching.lengths import ONE, Length
from sparse_onnx.matching.linear import Linear, Matrix, matrix
from sparse_onnx.matching.packed_products import packed_product
from sparse_onnx.matching.values import attribute, axes, ints, pairs, producer, tensor

_KEPT = ("Slice", "Split", "Gather", "Squeeze", "Unsqueeze", "Reshape", "Transpose", "Identity", "Cast")
#: Operators between a block's result and its first product, at most.
_DEEPEST = 64


class Packed:
    """Reads projections of all experts at once.

    Attributes:
        scales: by the node of a first product: the gate that its copies of the tokens were multiplied with.
    """

    def __init__(self, dims: Dims, gates: Gates) -> None:
        self.dims, self.gates = dims, gates
        self.scales: dict[ir.Node, tuple[Gate, ir.Value]] = {}
        self._scale: tuple[Gate, ir.Value] | None = None
        self._axes: dict[ir.Value, int | None] = {}

    def axis(self, value: ir.Value | None, left: int = _DEEPEST) -> int | None:
        """The experts' axis, counted from the right (1 is the last); None where the value has none."""
        if value is None or left == 0 or tensor(value) is not None:
            return None
        if value not in self._axes:
            self._axes[value] = None
            self._axes[value] = self._axis(value, left - 1)
        return self._axes[value]

    def _axis(self, value: ir.Value, left: int) -> int | None:
        node = value.producer()
        if node is None:
            return None
        product = packed_product(value, self.dims)
        if product is not None:
            return product.at
        if node.domain == "" and node.op_type in _KEPT:
            return self._kept(value, node, left)
        if not is_elementwise(node.domain, node.op_type):
            return None
        found = {self.axis(item, left) for item in node.inputs if item is not None} - {None}
        return found.pop() if len(found) == 1 else None

    def _kept(self, value: ir.Value, node: ir.Node, left: int) -> int | None:
        source = node.inputs[0]
        while node.op_type == "Reshape" and source is not None and self.axis(source, left) is None:
            below = producer(source, "Reshape", "Flatten")
            if below is None or not self._keeps_last(source):
                return None
            source = below.inputs[0]
        at, before, after = self.axis(source, left), self.dims.rank(source), self.dims.rank(value)
        if source is None or at is None or before is None or after is None:
            return None
        op, front = node.op_type, before - at
        if op in ("Identity", "Cast"):
            return at
        if op in ("Split", "Gather"):
            return (
                at - (before - after) if attribute(node, "axis", 0) in (-1, before - 1) and at > 1 else None
            )
        if op == "Slice":
            along = ints(node.inputs[3]) if len(node.inputs) > 3 else None
            return (
                at
                if along is not None and [item % before for item in along] == [before - 1] and at > 1
                else None
            )
        if op == "Transpose":
            order = list(attribute(node, "perm") or range(before)[::-1])
            moved = [item for item in order if item != front and self.dims.size(source, item) != 1]
            return after - order.index(front) if moved == sorted(moved) else None
        if op in ("Squeeze", "Unsqueeze"):
            return _squeezed(node, before, after, front)
        return self._reshaped(source, value, front)

    def _reshaped(self, source: ir.Value, value: ir.Value, front: int) -> int | None:
        """Through a Reshape that leaves the axes before the experts', theirs, and the last as they are."""
        old, new = self.dims.of(source), self.dims.of(value)
        if old is None or new is None or old[front].atoms:
            return None
        if new[: len(old) - 1] == old[:-1] and front < len(old) - 1:
            return len(new) - front  # only the last axis is split up
        if not self._keeps_last(value):
            return None
        lead = [length for length in old[:front] if length != ONE]
        for at in range(len(new) - 1):
            if new[at] == old[front] and [length for length in new[:at] if length != ONE] == lead:
                return len(new) - at
        return None

    def _keeps_last(self, value: ir.Value) -> bool:
        """Whether the reshape that computes the value leaves the last axis as it was."""
        node = value.producer()
        source = None if node is None else node.inputs[0]
        return keeps_last_axis(value) or (source is not None and self.dims.same_last(source, value))

    def skip(self, value: ir.Value) -> ir.Value:
        """Behind reshapes that keep the last axis, as far as experts stay apart (or there are none)."""
        best, has_experts = value, self.axis(value) is not None
        while True:
            node = producer(value, "Reshape", "Squeeze", "Unsqueeze", "Flatten", "Identity", "Cast")
            if node is None or node.inputs[0] is None or not self._keeps_last(value):
                return best
            source = node.inputs[0]
            if node.op_type == "Cast" and (source.dtype is None or source.dtype != value.dtype):
                return best
            value = source
            if (self.axis(value) is not None) == has_experts:
                best = value

    def read(self, value: ir.Value) -> Linear | None:
        """One projection of all experts, with its bias ``[E, .., out]``."""
        node = producer(value, "Add")
        if node is not None:
            for product, added in pairs(node):
                inner = self.read(product)
                if inner is None or inner.bias is not None:
                    continue
                bias = self._bias(added, product, inner)
                if bias is not None:
                    return dataclasses.replace(inner, bias=bias)
            return None
        below = self.skip(value)
        if below is not value:
            return self.read(below)
        product_ = packed_product(value, self.dims)
        if product_ is None:
            return None
        x = product_.x
        if self.axis(x) is not None:
            if self.axis(x) != product_.x_at or not product_.x_has_experts:
                return None
        else:
            self._scale = None
            rows = self._shared(x, product_.x_at, self.dims.size(product_.weight.source, 0) or 0)
            if rows is None:
                return None
            x = rows
            if self._scale is not None:
                self.scales[product_.node] = self._scale
        return Linear(x, product_.weight, None, product_.out_in, product_.node)

    def _bias(self, value: ir.Value, product: ir.Value, layer: Linear) -> Matrix | None:
        """A stored ``[E, out]`` with the experts' axis where the product has it; axes of length 1 between."""
        source, at = value, self.axis(product)
        while (node := producer(source, "Unsqueeze", "Reshape", "Identity")) is not None and node.inputs[
            0
        ] is not None:
            source = node.inputs[0]
        stored, count, width = (
            matrix(source),
            self.dims.size(layer.weight.source, 0),
            self.dims.size(product, -1),
        )
        if (
            stored is None
            or stored.index is not None
            or stored.transposed
            or at is None
            or value.shape is None
        ):
            return None
        if not value.shape.is_static() or source.shape is None or not source.shape.is_static():
            return None
        shape = value.shape.numpy()
        wanted = [1] * len(shape)
        if len(shape) < at or count is None:
            return None
        wanted[-at], wanted[-1] = count, width or shape[-1]
        long = [length for length in source.shape.numpy() if length != 1]
        fits = (
            long == [length for length in (count, wanted[-1]) if length != 1]
            and source.shape.numpy()[0] == count
        )
        return stored if list(shape) == wanted and fits else None

    def _shared(self, value: ir.Value, at: int, count: int) -> ir.Value | None:
        """The rows of which the value holds one copy an expert along its axis `at` from the right."""
        dimensions = self.dims.rank(value)
        if dimensions is None:
            return None
        if dimensions < at or self.dims.size(value, -at) == 1:
            return value
        node = value.producer()
        if node is None or self.dims.size(value, -at) != count:
            return None
        source = node.inputs[0]
        if node.op_type in ("Expand", "Tile") and source is not None:
            if uniform(node.inputs[1]) == 1 and node.op_type == "Tile":
                return self._shared(source, at, count)
            if self._only_copies(value, source, at):
                return source
            return None
        if node.op_type == "Mul":
            return self._scaled(node, at, count)
        if node.op_type == "Concat" and self.dims.axis(node) == dimensions - at and len({*node.inputs}) == 1:
            return source if self.dims.size(source, -at) == 1 and len(node.inputs) == count else None
        if node.op_type == "Reshape" and source is not None and at == dimensions and self._keeps_last(value):
            return self._stretched(source, count)
        return None

    def _only_copies(self, value: ir.Value, source: ir.Value, at: int) -> bool:
        result, before = self.dims.of(value), self.dims.of(source)
        if result is None or before is None or len(before) > len(result):
            return False
        before = (ONE,) * (len(result) - len(before)) + before
        for from_right in range(1, len(result) + 1):
            if before[-from_right] != (ONE if from_right == at else result[-from_right]):
                return False
        return True

    def _stretched(self, value: ir.Value, count: int) -> ir.Value | None:
        """The rows of which ``[E T, D]`` holds all, E times in succession."""
        node = producer(value, "Tile", "Mul", "Reshape", "Concat")
        if node is None or node.inputs[0] is None:
            return None
        source = node.inputs[0]
        if node.op_type == "Tile":
            times = self.dims.vector(node.inputs[1])
            if times is None or len(times) < 2 or self.dims.rank(source) != len(times):
                return None
            if times != (Length(count), *(ONE,) * (len(times) - 1)):
                return None
            below = producer(source, "Expand")
            return below.inputs[0] if below is not None and uniform(below.inputs[1]) == 1 else source
        if node.op_type == "Mul":
            return self._scaled(node, None, count)
        if node.op_type == "Concat":
            return (
                source
                if self.dims.axis(node) == 0 and len({*node.inputs}) == 1 and len(node.inputs) == count
                else None
            )
        return (
            self._shared(source, self.dims.rank(source) or 0, count)
            if self.dims.size(source, 0) == count
            else None
        )

    def _scaled(self, node: ir.Node, at: int | None, count: int) -> ir.Value | None:
        """Copies of rows times a gate for each: ``[E, T, D] * [E, T, 1]``, or both flattened to ``E T`` rows."""
        for copies, factor in pairs(node):
            if self.dims.size(factor, -1) != 1:
                continue
            below, dimensions = factor, self.dims.rank(factor)
            if at is None:
                reshape = producer(factor, "Reshape")
                if reshape is None or reshape.inputs[0] is None:
                    continue
                below = reshape.inputs[0]
            gate = self.gates.read(below)
            wanted = 0 if at is None or dimensions is None else dimensions - at
            if gate is None or gate.expert != wanted or self.dims.size(below, wanted) != count:
                continue
            if self._scale is not None or not self.dims.same_rows(node.outputs[0], factor):
                continue
            rows = self._stretched(copies, count) if at is None else self._shared(copies, at, count)
            if rows is not None:
                self._scale = (gate, below)
                return rows
        return None


def _squeezed(node: ir.Node, before: int, after: int, front: int) -> int | None:
    along = axes(node)
    if along is None:
        return None
    if node.op_type == "Squeeze":
        gone = {at % before for at in along}
        return None if front in gone else after - (front - sum(at < front for at in gone))
    new = {at % after for at in along}
    old = [at for at in range(after) if at not in new]
    return after - old[front]
