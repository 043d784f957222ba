"""Sums over all experts, each times its gate, however they are spelled: read from the node that sums."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import onnx_ir as ir

from sparse_onnx.matching.dims import Dims
from sparse_onnx.matching.einsum import two_operands
from sparse_onnx.matching.expert import Expert, read_expert
from sparse_onnx.matching.gate import Gate
from sparse_onnx.matching.gate_sources import not_zero, uniform
from sparse_onnx.matching.gates import Gates
from sparse_onnx.matching.layout import flat
from sparse_onnx.matching.leading import leading as leading_axes
from sparse_onnx.matching.lengths import ONE
from sparse_onnx.matching.linear import matrix
from sparse_onnx.matching.packed import Packed
from sparse_onnx.matching.stacks import stacked
from sparse_onnx.matching.sums import is_root, smallest, terms
from sparse_onnx.matching.values import axes, pairs, producer, sole_use
from sparse_onnx.matching.weighted import Factors, Weighted

_THREE = (
    "gates, hidden values and the experts' last weights are multiplied by one einsum of three operands, "
    "which is not taken apart"
)


@dataclasses.dataclass(frozen=True, eq=False)
class DenseSum:
    """A sum over experts.

    Attributes:
        output: the sum, ``[.., D]``.
        exits: of each expert apart, with its factors and gate; or
        packed: all experts' results, weighted by one gate ``[.., E, .., 1]`` (None for `weights`: by none).
        weights: that gate with its factors.
        others: terms of the sum that are no expert's.
        leading: of experts that are stacked: how many axes of each one's result count tokens.
        scaled: experts that read weighted tokens; `exits` are these tokens, with their gates, then.
    """

    output: ir.Value
    exits: Sequence[Weighted] = ()
    packed: ir.Value | None = None
    weights: Weighted | None = None
    others: Sequence[ir.Value] = ()
    leading: int | None = None
    scaled: Sequence[Expert] = ()


class DenseSums:
    """Reads sums over experts. A text says what is wrong with one."""

    def __init__(self) -> None:
        self.dims = Dims()
        self.gates = Gates(self.dims)
        self.factors = Factors(self.dims, self.gates)
        self.packed = Packed(self.dims, self.gates)

    def read(self, node: ir.Node) -> DenseSum | str | None:
        if node.domain != "" or not node.outputs:
            return None
        if node.op_type == "ReduceSum":
            return self._reduced(node)
        if node.op_type in ("Add", "Sum"):
            return self._chain(node.outputs[0], terms(node.outputs[0]), True) if is_root(node) else None
        if node.op_type == "MatMul":
            return self._product(node)
        return self._einsum(node) if node.op_type == "Einsum" else None

    def _chain(self, output: ir.Value, values: list[ir.Value], tree: bool) -> DenseSum | str | None:
        if len(values) < 2:
            return None
        found = [(value, self.factors.read(value)) for value in values]
        columns = [
            (value, item) for value, item in found if item.gate is not None and item.gate.column is not None
        ]
        if len(columns) < 2:
            return self._scaled(output, values, tree)
        groups: dict[object, int] = {}
        for _, item in columns:
            groups[_family(item)] = groups.get(_family(item), 0) + 1
        family = max(groups, key=lambda key: groups[key])
        mine = [(value, item) for value, item in columns if _family(item) == family]
        if len(mine) < 2:
            return None
        if not tree:
            if len(mine) != len(values):
                return f"'{output.name}' sums {len(values)} values, of which {len(mine)} are experts' with their gates"
            return DenseSum(output, [item for _, item in mine])
        output = smallest(output, [value for value, _ in mine])
        inner = {id(value) for value in terms(output)}
        own = {id(value) for value, _ in mine}
        others = [value for value, _ in found if id(value) in inner and id(value) not in own]
        others = [value for value in others if uniform(value) != 0 or not self.dims.covers(mine[0][0], value)]
        return DenseSum(output, [item for _, item in mine], others=others)

    def _scaled(self, output: ir.Value, values: list[ir.Value], tree: bool) -> DenseSum | None:
        """``sum_e expert_e(gate[t, e] * x[t])``."""
        mine: list[ir.Value] = []
        exits, experts = [], []
        for value in values:
            expert = read_expert(value)
            if isinstance(expert, str):
                continue
            item = self.factors.read(expert.entry)
            if item.gate is not None and item.gate.column is not None:
                mine.append(value)
                exits.append(item)
                experts.append(dataclasses.replace(expert, entry=item.value))
        if len(mine) < 2 or (not tree and len(mine) < len(values)):
            return None
        output = smallest(output, mine) if tree else output
        others = [value for value in (terms(output) if tree else ()) if value not in mine]
        return DenseSum(output, exits, others=others, scaled=experts)

    def _reduced(self, node: ir.Node) -> DenseSum | str | None:
        along, product = axes(node), node.inputs[0]
        dimensions = self.dims.rank(product)
        if product is None or along is None or len(along) != 1 or dimensions is None or dimensions < 2:
            return None
        at = dimensions - along[0] % dimensions
        output = node.outputs[0]
        pieces = stacked(product, at, self.dims)
        if pieces is not None:
            return self._chain(output, pieces, False)
        weights = self.factors.read(product, -2 if at == 1 else -1, column=False)
        if weights.gate is None:
            if self.packed.axis(product) == at:
                return DenseSum(output, packed=product)
            if not weights.factors or stacked(weights.value, at, self.dims) is None:
                return self._across(product, at)
            whole = weights.factors[0]
            gate = Gate(
                None, None, (self.dims.rank(whole) or 0) - at, None, math.nan, None, flaw=not_zero(whole)
            )
            weights = dataclasses.replace(weights, gate=gate, whole=whole)
        return self._experts(output, weights, at)

    def _across(self, product: ir.Value, at: int) -> str | None:
        """What is wrong with gates that multiply a stack of experts along another axis than that of the experts."""
        node = producer(product, "Mul")
        for y, whole in () if node is None else pairs(node):
            gate = self.gates.read(whole)
            if gate is None or gate.ids is None or gate.expert is None or not gate.sparse:
                continue
            if (self.dims.rank(whole) or 0) - gate.expert != at and stacked(y, at, self.dims) is not None:
                return (
                    f"the gates '{whole.name}' lie along another axis than that of the experts of '{y.name}'"
                )
        return None

    def _experts(self, output: ir.Value, weights: Weighted, at: int) -> DenseSum | str | None:
        """The stack that the gate weights, if it is one of experts."""
        y, gate, whole = weights.value, weights.gate, weights.whole
        assert gate is not None and whole is not None
        pieces = stacked(y, at, self.dims)
        if pieces is None and self.packed.axis(y) != at:
            return _no_experts(y) if gate.sparse and _is_product(y) else None
        feature = 2 if at == 1 else 1
        if gate.expert is None or (self.dims.rank(whole) or 0) - gate.expert != at:
            return f"the sum '{output.name}' runs over another axis than that of the gates' experts"
        leading = None if pieces is None else leading_axes(self.dims, y, whole, at)
        if leading is None and (pieces is not None or not self._aligned(y, whole, feature)):
            return f"the gates '{whole.name}' are not proved to be of the same tokens as the experts' results"
        return self._weighed(output, y, weights, pieces, leading)

    def _aligned(self, y: ir.Value, gate: ir.Value, feature: int) -> bool:
        """Whether all axes have equal lengths, but for the gate's axis `feature` from the right, which is 1."""
        if self.dims.rank(y) != self.dims.rank(gate) or not self.dims.covers(y, gate):
            return False
        lengths = self.dims.of(gate)
        rows = self.dims.of(y)
        if lengths is None or rows is None or lengths[-feature] != ONE:
            return False
        return all(
            length != ONE or rows[-at] == ONE or at == feature
            for at, length in enumerate(reversed(lengths), 1)
        )

    def _product(self, node: ir.Node) -> DenseSum | str | None:
        """``[.., 1, E] @ [.., E, D]`` or ``[.., D, E] @ [.., E, 1]``."""
        a, b = node.inputs
        if a is None or b is None or (self.dims.rank(a) or 0) < 2 or self.dims.rank(a) != self.dims.rank(b):
            return None
        output = node.outputs[0]
        first, second = self.gates.read(a), self.gates.read(b)
        dimensions = self.dims.rank(a) or 0
        if first is not None and first.expert == dimensions - 1 and self.dims.size(a, -2) == 1:
            y, gate, whole, at = b, first, a, 2
        elif second is not None and second.expert == dimensions - 2 and self.dims.size(b, -1) == 1:
            y, gate, whole, at = a, second, b, 1
            user = sole_use(output)
            if (
                user is None
                or user.op_type not in ("Squeeze", "Reshape")
                or self.dims.size(user.outputs[0], -1) != self.dims.size(a, -2)
            ):
                return None
            output = user.outputs[0]
        else:
            return None
        pieces = stacked(y, at, self.dims)
        if pieces is None and self.packed.axis(y) != at:
            return _no_experts(y) if gate.sparse and _is_product(y) else None
        if not self.dims.same_rows(a, b, drop=2):
            return f"the gates '{whole.name}' are not proved to be of the same tokens as the experts' results"
        return self._weighed(output, y, Weighted(y, (whole,), gate, whole), pieces, dimensions - 2)

    def _einsum(self, node: ir.Node) -> DenseSum | str | None:
        if len(node.inputs) > 2:
            gates = [self.gates.read(item) for item in node.inputs]
            chosen = any(gate is not None and gate.ids is not None and gate.sparse for gate in gates)
            stored = any(self.dims.rank(item) == 3 and matrix(item) is not None for item in node.inputs)
            return _THREE if chosen and stored else None
        for term, whole, y_term, y, result in two_operands(node.outputs[0]):
            gate = self.gates.read(whole)
            if gate is None or gate.expert is None or not result or len(term) != self.dims.rank(whole):
                continue
            expert = term[gate.expert]
            tokens = term.replace(expert, "")
            at_stack = (
                expert in y_term and stacked(y, len(y_term) - y_term.index(expert), self.dims) is not None
            )
            last = tokens == result[:-1] or (
                at_stack and tokens and result.startswith(tokens) and tokens != result
            )
            if y_term.replace(expert, "") != result or not last or expert in result:
                if at_stack and gate.ids is not None:
                    return f"the einsum '{node.name}' does not sum the experts' results over the gates' experts alone"
                continue
            at = len(y_term) - y_term.index(expert)
            pieces = stacked(y, at, self.dims)
            if pieces is None and self.packed.axis(y) != at:
                continue
            lengths, rows = self.dims.of(whole), self.dims.of(y)
            by_letter = {} if rows is None else dict(zip(y_term, rows, strict=True))
            if lengths is None or any(
                by_letter[a] != length for a, length in zip(term, lengths, strict=True)
            ):
                return f"the gates '{whole.name}' are not proved to be of the same tokens as the experts' results"
            weights = Weighted(y, (whole,), gate, whole)
            return self._weighed(node.outputs[0], y, weights, pieces, len(tokens))
        return None

    def _weighed(
        self,
        output: ir.Value,
        y: ir.Value,
        weights: Weighted,
        pieces: Sequence[ir.Value] | None,
        leading: int | None,
    ) -> DenseSum:
        if pieces is None:
            return DenseSum(output, packed=y, weights=weights)
        exits = [Weighted(piece, (), None, None) for piece in pieces]
        return DenseSum(output, exits, weights=weights, leading=leading)


def _is_product(value: ir.Value) -> bool:
    node = producer(value, "MatMul", "Einsum", "Add")
    if node is not None and node.op_type == "Add":
        return any(producer(item, "MatMul", "Einsum") is not None for item in node.inputs)
    return node is not None


def _no_experts(value: ir.Value) -> str:
    return f"'{value.name}', which the gates weight, is not proved to be made with constant weights of each expert"


def _family(item: Weighted) -> object:
    """Terms of one block have gates of the same choice."""
    gate = item.gate
    assert gate is not None
    return gate.flaw if gate.ids is None else flat(gate.ids)
