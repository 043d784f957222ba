"""Weights times one-hots, summed over a token's slots by a matrix product."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import onnx_ir as ir

from sparse_onnx.matching.dims import Dims
from sparse_onnx.matching.einsum import two_operands
from sparse_onnx.matching.gate import Gate


def contracted(node: ir.Node, dims: Dims, read: Callable[[ir.Value | None], Gate | None]) -> Gate | None:
    """``tk,tke->te`` as an Einsum, or as a MatMul of ``[.., 1, K]`` with ``[.., K, E]``."""
    if node.op_type == "MatMul":
        weights, mask = node.inputs
        gate = _mask(mask, read)
        dimensions = dims.rank(mask)
        if gate is None or weights is None or mask is None or dimensions is None or dimensions < 3:
            return None
        slots = dims.size(mask, -2)
        if gate.expert != dimensions - 1 or slots is None or dims.size(weights, -2) != 1:
            return None
        if not dims.same_rows(weights, mask, drop=2) or dims.size(weights, -1) != slots:
            return None
        return dataclasses.replace(gate, slots=slots, inside=weights, plain=False)
    for weight_term, weights, mask_term, mask, result in two_operands(node.outputs[0]):
        gate = _mask(mask, read)
        if gate is None or gate.expert is None or dims.rank(mask) != len(mask_term):
            continue
        expert = mask_term[gate.expert]
        rest = mask_term.replace(expert, "")
        slots = dims.size(mask, mask_term.index(rest[-1])) if rest else None
        kept = mask_term.replace(rest[-1:], "")
        if (
            weight_term != rest
            or result != kept
            or slots is None
            or not _same(dims, weights, mask, gate.expert)
        ):
            continue
        return dataclasses.replace(
            gate, slots=slots, expert=result.index(expert), inside=weights, plain=False
        )
    return None


def _mask(value: ir.Value | None, read: Callable[[ir.Value | None], Gate | None]) -> Gate | None:
    """A sparse one-hot, still with the slots' axis."""
    gate = read(value)
    if gate is None or not gate.sparse or not gate.plain or gate.slots is not None or gate.inside != 1.0:
        return None
    return gate


def _same(dims: Dims, weights: ir.Value, mask: ir.Value, expert: int) -> bool:
    """Whether the weights have the mask's shape but for its axis of experts. Einsum broadcasts axes of length 1."""
    a, b = dims.of(weights), dims.of(mask)
    return a is not None and b is not None and a == b[:expert] + b[expert + 1 :]
