"""How the rows of a token's K slots become one: from where they left the sorted order to their weighted sum."""

from __future__ import annotations

import dataclasses

import onnx_ir as ir

from sparse_onnx.matching.dims import Dims
from sparse_onnx.matching.grouped import LAYOUT, Exit, Mismatch, behind_casts, keeps_real
from sparse_onnx.matching.layout import rows_of
from sparse_onnx.matching.values import attribute, axes, ints, pairs, rank, size

#: What may follow the sum, until its rows are shaped as those of the tokens.
_SETTLING = LAYOUT | {"Cast", "ReduceSum"}


@dataclasses.dataclass(frozen=True)
class Combine:
    """Weighted sum of each token's K rows: the value that holds it, its shape as far as known, and the weights."""

    output: ir.Value
    weight: ir.Value
    shape: tuple[int | None, ...]


class Combining:
    """Follows the rows of slots to the weighted sum over each token's.

    Args:
        way: how the rows left the sorted order.
        top_k: K.
        width: D_out.
        weight: ``[T, K]`` in any shape, where it was applied before; else None.
        tokens: ``[..., D]``.
        dims: compares numbers of rows.
    """

    def __init__(
        self,
        way: Exit,
        top_k: int,
        width: int,
        weight: ir.Value | None,
        tokens: ir.Value,
        dims: Dims,
    ) -> None:
        self.way, self.top_k, self.weight, self.tokens, self.dims = way, top_k, weight, tokens, dims
        self.value = way.result
        #: Sizes of the value's axes; None for what only the number of tokens tells.
        self.shape: list[int | None] = [None, width]
        self.summed = False

    def result(self) -> Combine:
        """The sum.

        Raises:
            Mismatch: something else happens to the rows.
        """
        way, top_k = self.way, self.top_k
        if way.problem:
            raise Mismatch(way.problem, way.node)
        if way.top_k is not None and way.top_k not in (1, top_k):
            raise Mismatch(
                f"rows return to token (slot // {way.top_k}), but were taken from (slot // {top_k})", way.node
            )
        if way.top_k is not None:
            self._check_height(way)
        self.summed = top_k == 1 or way.top_k == top_k
        if self.summed and top_k > 1 and self.weight is None:
            raise Mismatch("no routing weight is applied before the rows of a token are added", way.node)
        while not (self.summed and self.weight is not None):
            node = _next(self.value)
            if node is None:
                missing = "their weights are" if self.weight is None else "their sum is"
                name = self.value.name
                raise Mismatch(f"the experts' rows '{name}' are used before {missing} taken", way.node)
            self._step(node)
        return Combine(self._settled(), self.weight, tuple(self.shape))

    def _check_height(self, way: Exit) -> None:
        """The rows that a scatter writes into are no more than those that it brings back."""
        data = way.node.inputs[0]
        assert data is not None
        if way.node.op_type == "ScatterElements" and self.dims.size(data, -1) != self.shape[-1]:
            raise Mismatch(
                f"the rows are not proved to be as wide as '{data.name}', to which they return", way.node
            )
        per_slot = way.top_k == 1
        if per_slot and self.dims.as_many_rows(data, way.rows):
            return
        if (not per_slot or self.top_k == 1) and self.dims.as_many_rows(data, self.tokens):
            return
        raise Mismatch(f"'{data.name}' is not proved to have as many rows as return to it", way.node)

    def _step(self, node: ir.Node) -> None:
        """Looks through one operator that reads the value."""
        if node.op_type in LAYOUT:
            self._reshape(node)
        elif node.op_type == "Mul" and self.weight is None:
            self.weight = self._row_weight(node)
        elif node.op_type == "ReduceSum":
            self._sum(node)
        elif node.op_type in ("MatMul", "Einsum") and self.weight is None:
            self.weight, self.summed = self._product(node), True
        elif node.op_type != "Cast" or not keeps_real(node):
            if self.summed and self.weight is None:
                raise Mismatch("no routing weight is applied to the experts' rows", node)
            raise Mismatch(
                f"operator {node.op_type} stands between the experts and the sum over a token's", node
            )
        self.value = node.outputs[0]

    def _reshape(self, node: ir.Node) -> None:
        """Rows stay rows; those of one token may get an axis of their own."""
        shape = self._reshaped(node)
        width = self.shape[-1]
        if shape is None or shape[-1] != width:
            raise Mismatch(f"the rows '{self.value.name}' are cut or joined before they are added", node)
        self.shape = shape

    def _reshaped(self, node: ir.Node) -> list[int | None] | None:
        result = node.outputs[0]
        if result.shape is not None:
            return [self.dims.size(result, at) for at in range(len(result.shape))]
        if node.op_type == "Identity":
            return self.shape
        if node.op_type == "Reshape":
            target = ints(node.inputs[1])
            return None if target is None or 0 in target else [item if item > 0 else None for item in target]
        found = axes(node)
        if found is None or node.op_type not in ("Squeeze", "Unsqueeze"):
            return None
        if node.op_type == "Squeeze":
            gone = {item % len(self.shape) for item in found}
            return [item for at, item in enumerate(self.shape) if at not in gone]
        total = len(self.shape) + len(found)
        new, rest = {item % total for item in found}, iter(self.shape)
        return [1 if at in new else next(rest) for at in range(total)]

    def _row_weight(self, node: ir.Node) -> ir.Value:
        """One number for each row, by which it is multiplied."""
        for rows, factor in pairs(node):
            if rows is not self.value or size(factor, -1) != 1 or rank(factor) != len(self.shape):
                continue
            if len(self.shape) == 2 or self.shape[-2] == self.top_k == size(factor, -2):
                return behind_casts(factor)
        raise Mismatch("the experts' rows are multiplied with something else than one weight a row", node)

    def _sum(self, node: ir.Node) -> None:
        found, dimensions = axes(node), len(self.shape)
        inner = None if found is None else [item % dimensions - dimensions for item in found]
        if inner != [-2] or self.shape[-2] != self.top_k or dimensions < 3:
            raise Mismatch(f"what is added is not proved to be the {self.top_k} rows of each token", node)
        self.shape[-2:-1] = [1] if attribute(node, "keepdims", 1) else []
        self.summed = True

    def _product(self, node: ir.Node) -> ir.Value:
        """The weights of ``weight [T, 1, K] @ rows [T, K, D]`` or an Einsum that says the same."""
        first, second = node.inputs[:2]
        dimensions, top_k = len(self.shape), self.top_k
        if node.op_type == "MatMul" and first is not None and second is self.value and dimensions > 2:
            one_row = size(first, -2) == 1 and size(first, -1) == top_k == self.shape[-2]
            if one_row and rank(first) == dimensions:
                self.shape[-2] = 1
                return behind_casts(first)
        if node.op_type == "Einsum" and len(node.inputs) == 2:
            equation = str(attribute(node, "equation", "")).replace(" ", "")
            terms, _, result = equation.partition("->")
            for at, (rows, factor) in enumerate(zip(node.inputs, node.inputs[::-1], strict=True)):
                term, weights = terms.split(",")[at], terms.split(",")[1 - at]
                plain = len(set(term)) == len(term) == dimensions > 2 and term.isalpha()
                sums = plain and weights == term[:-1] and result == term[:-2] + term[-1]
                if (
                    factor is not None
                    and rows is self.value
                    and sums
                    and size(factor, -1) == top_k == self.shape[-2]
                ):
                    del self.shape[-2]
                    return behind_casts(factor)
        raise Mismatch(
            f"the product {node.op_type} is not proved to be the weighted sum over a token's rows", node
        )

    def _settled(self) -> ir.Value:
        """The first value from here on that is ``[T, D_out]``, or shaped as the tokens are, of the tokens' type."""
        while True:
            value, like = self.value, rows_of(self.tokens)
            typed = value.dtype is None or self.tokens.dtype is None or value.dtype == self.tokens.dtype
            flat_rows = len(self.shape) == 2
            if typed and (flat_rows or (rank(value) == rank(like) and self.dims.same_rows(value, like))):
                return value
            node = _next(value)
            if node is None or node.op_type not in _SETTLING:
                raise Mismatch(
                    f"the result '{value.name}' is not proved to have the rows of the tokens", self.way.node
                )
            if node.op_type == "ReduceSum" and self.top_k != 1:
                raise Mismatch(f"the result '{value.name}' is added up once more", node)
            self._step(node)


def _next(value: ir.Value) -> ir.Node | None:
    """The only node that reads the value's elements."""
    nodes = [use.node for use in value.uses() if use.node.op_type not in ("Shape", "Size")]
    return nodes[0] if len(nodes) == 1 and not value.is_graph_output() else None
