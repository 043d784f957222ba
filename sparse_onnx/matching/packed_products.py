"""Products of all experts at once, with weights ``[E, in, out]``."""

from __future__ import annotations

import dataclasses

import onnx_ir as ir

from sparse_onnx.matching.dims import Dims
from sparse_onnx.matching.einsum import two_operands
from sparse_onnx.matching.linear import MICROSOFT, Matrix, matrix, turns_weight


@dataclasses.dataclass(frozen=True)
class Product:
    """``out[.., e, .., o] = sum_i x[.., e, .., i] W[e, i, o]``; `at`, `x_at`: the experts' axes from the right."""

    node: ir.Node
    x: ir.Value
    weight: Matrix
    out_in: bool
    at: int
    x_at: int
    x_has_experts: bool


def packed_product(value: ir.Value, dims: Dims) -> Product | None:
    node = value.producer()
    if node is None:
        return None
    if node.op_type in ("MatMul", "FusedMatMul") and node.domain in ("", MICROSOFT):
        return _matmul(node, value, dims)
    for x_term, x, w_term, w, result in two_operands(value):
        weight = matrix(w) if dims.rank(w) == 3 else None
        if weight is None or weight.index is not None or len(w_term) != 3 or not x_term or not result:
            continue
        summed = [letter for letter in w_term if letter in x_term and letter not in result]
        kept = [
            letter for letter in w_term if letter not in x_term and letter in result and letter == result[-1]
        ]
        experts = [letter for letter in w_term if letter in result and letter not in kept]
        if len(summed) != 1 or len(kept) != 1 or len(experts) != 1 or w_term[0] != experts[0]:
            continue
        expert, has = experts[0], experts[0] in x_term
        tokens = x_term[:-1].replace(expert, "")
        if x_term[-1] != summed[0] or result[:-1].replace(expert, "") != tokens:
            continue
        at = len(result) - result.index(expert)
        x_at = len(x_term) - x_term.index(expert) if has else len(x_term) + 1
        return Product(node, x, weight, (w_term[1] == kept[0]) != weight.transposed, at, x_at, has)
    return None


def _matmul(node: ir.Node, value: ir.Value, dims: Dims) -> Product | None:
    x, w = node.inputs
    weight = matrix(w) if dims.rank(w) == 3 else None
    dimensions = dims.rank(value)
    if (
        x is None
        or weight is None
        or weight.index is not None
        or weight.half is not None
        or dimensions is None
    ):
        return None
    turned = turns_weight(node)
    if turned is None:
        return None
    has = (dims.rank(x) or 0) >= 3 and dims.size(x, -3) == dims.size(weight.source, 0)
    return Product(node, x, weight, weight.transposed != turned, 3, 3, has)
