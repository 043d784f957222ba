"""Projections of all experts at once, each on its own rows: ``y[e, .., o] = W[e] x[e, .., i] + b[e]``."""

from __future__ import annotations

import dataclasses

import onnx_ir as ir

from sparse_onnx.matching.einsum import two_operands
from sparse_onnx.matching.linear import Linear, Matrix, matrix, turns_weight
from sparse_onnx.matching.slots import rows_behind
from sparse_onnx.matching.values import pairs, producer, rank, size, tensor


def batched_linear(value: ir.Value) -> Linear | None:
    """The value as such a projection; the experts' axis is the first of both operands."""
    value = rows_behind(value)
    node = value.producer()
    if node is None:
        return None
    if node.op_type == "Add" and node.domain == "":
        for product, added in pairs(node):
            inner = batched_linear(product)
            if inner is None or inner.bias is not None:
                continue
            bias = _bias(added, product)
            if bias is not None:
                return dataclasses.replace(inner, bias=bias)
        return None
    if node.op_type == "Einsum":
        return _einsum(value)
    return _matmul(node) if node.op_type in ("MatMul", "FusedMatMul") else None


def _stored(value: ir.Value | None) -> Matrix | None:
    found = (matrix(value) or _computed(value)) if rank(value) == 3 else None
    return found if found is not None and found.index is None and found.half is None else None


def _computed(value: ir.Value | None) -> Matrix | None:
    """What is no constant, to be refused when everything else is proved."""
    return None if value is None else Matrix(value)


def _matmul(node: ir.Node) -> Linear | None:
    x, weight = node.inputs[0], _stored(node.inputs[1])
    if x is None or weight is None or rank(x) != 3 or size(x, 0) in (None, 1):
        return None
    turned = turns_weight(node)
    if turned is None:
        return None
    return Linear(x, weight, None, weight.transposed != turned, node)


def _einsum(value: ir.Value) -> Linear | None:
    for x_term, x, w_term, w, result in two_operands(value):
        weight = _stored(w)
        node = value.producer()
        if weight is None or node is None or len(x_term) < 3:
            continue
        expert, inner, outer = x_term[0], x_term[-1], result[-1:]
        if result != x_term[:-1] + outer or outer in x_term or set(w_term) != {expert, inner, outer}:
            continue
        if w_term[0] == expert:
            return Linear(x, weight, None, (w_term[1] == outer) != weight.transposed, node)
    return None


def _bias(value: ir.Value, product: ir.Value) -> Matrix | None:
    """``[E, n]`` with axes of length 1 between, as an initializer or put in behind it."""
    shape = value.shape
    if shape is None or not shape.is_static() or len(shape) != rank(product) or len(shape) < 3:
        return None
    if any(length != 1 for length in shape.numpy()[1:-1]) or shape[0] == 1:
        return None
    while tensor(value) is None:
        node = producer(value, "Unsqueeze", "Reshape", "Identity")
        source = None if node is None else node.inputs[0]
        if source is None or size(source, 0) != shape[0] or size(source, -1) != shape[-1]:
            return None
        value = source
    return Matrix(value)
