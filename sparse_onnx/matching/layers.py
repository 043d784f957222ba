"""Linear layers that multiply by a constant matrix, however a graph spells them, and what they are called.

| spelling | weight |
| --- | --- |
| MatMul, Gemm, Einsum, ORT's FusedMatMul | numbers, or the output of DequantizeLinear, either way round |
| MatMulNBits | 2, 4 or 8 bits in blocks of inputs |
| DynamicQuantizeLinear, MatMulInteger, Cast, Mul | 8 bits, one scale or one a column (ORT's `quantize_dynamic`) |
| ORT's DynamicQuantizeMatMul, MatMulIntegerToFloat | the same |

Enters If, Loop and Scan bodies; functions are inlined before.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import onnx_ir as ir

from sparse_onnx.matching.layer_weights import (
    LayerWeight,
    float_weight,
    integer_weight,
    nbits_weight,
    plain_weight,
)
from sparse_onnx.matching.linear import MICROSOFT, linear, stored_bias, stored_shape, turns_weight
from sparse_onnx.matching.values import attribute, pairs, producer, sole_use

_PRODUCTS = ("MatMul", "Gemm", "FusedMatMul", "Einsum")


@dataclasses.dataclass(frozen=True, eq=False)
class Layer:
    """``output = input weight + bias``, row by row.

    Attributes:
        node: that multiplies.
        input: ``[..., K]`` of a floating-point type.
        weight: ``[K, N]``.
        bias: that the nodes add themselves, stored; a bias that is added by a node of its own is none of the layer's.
        output: ``[..., N]`` of a floating-point type.
        nodes: all that compute the output from the input and that nothing else reads.
    """

    node: ir.Node
    input: ir.Value
    weight: LayerWeight
    bias: ir.Value | None
    output: ir.Value
    nodes: tuple[ir.Node, ...]


def layers(model: ir.Model) -> Iterator[Layer]:
    """All layers, in graph order."""
    for graph in model.graphs():
        for node in graph:
            found = layer(node)
            if found is not None:
                yield found


def layer(node: ir.Node) -> Layer | None:
    """The layer of which this node is the product."""
    if node.op_type in _PRODUCTS and node.domain in ("", MICROSOFT):
        return _plain(node)
    if node.op_type == "MatMulNBits" and node.domain == MICROSOFT:
        weight = nbits_weight(node)
        bias = node.inputs[5] if len(node.inputs) > 5 else None
        return None if isinstance(weight, str) else _made(node, node.inputs[0], weight, bias)
    if node.op_type in ("DynamicQuantizeMatMul", "MatMulIntegerToFloat") and node.domain == MICROSOFT:
        return _fused_integers(node)
    return _integers(node) if node.op_type == "MatMulInteger" and node.domain == "" else None


def _made(
    node: ir.Node,
    x: ir.Value | None,
    weight: LayerWeight | None,
    bias: ir.Value | None = None,
    output: ir.Value | None = None,
    nodes: tuple[ir.Node, ...] = (),
) -> Layer | None:
    if x is None or weight is None or (x.dtype is not None and not x.dtype.is_floating_point()):
        return None
    if bias is not None and not bias.name:
        bias = None
    if bias is not None and not _is_bias(bias, weight.outputs):
        return None
    return Layer(node, x, weight, bias, output or node.outputs[0], nodes or (node,))


def _is_bias(value: ir.Value, outputs: int) -> bool:
    found = stored_bias(value)
    shape = None if found is None else stored_shape(found)
    return bool(shape) and shape is not None and shape[-1] == outputs


def _plain(node: ir.Node) -> Layer | None:
    known = linear(node.outputs[0])
    if known is not None and known.activation is None:
        bias = node.inputs[2] if node.op_type == "Gemm" and len(node.inputs) > 2 else None
        return _made(node, known.x, plain_weight(known.weight, known.out_in), bias)
    if node.op_type == "Gemm" and node.domain == "":
        if attribute(node, "transA", 0) or attribute(node, "alpha", 1.0) != 1.0:
            return None
        bias = node.inputs[2] if len(node.inputs) > 2 else None
        if bias is not None and attribute(node, "beta", 1.0) != 1.0:
            return None
        turned = bool(attribute(node, "transB", 0))
        return _made(node, node.inputs[0], float_weight(node.inputs[1], turned), bias)
    if node.op_type in ("MatMul", "FusedMatMul"):
        turns = turns_weight(node)
        return None if turns is None else _made(node, node.inputs[0], float_weight(node.inputs[1], turns))
    return None


def _integers(node: ir.Node) -> Layer | None:
    """``Mul(Cast(MatMulInteger(q, W, zero, points)), Mul(scale, scales))`` behind ``q = DynamicQuantizeLinear(x)``."""
    rounded = producer(node.inputs[0], "DynamicQuantizeLinear")
    zero = node.inputs[2] if len(node.inputs) > 2 else None
    points = node.inputs[3] if len(node.inputs) > 3 else None
    if rounded is None or zero is not rounded.outputs[2]:
        return None
    cast = sole_use(node.outputs[0])
    scaled = None if cast is None or cast.op_type != "Cast" else sole_use(cast.outputs[0])
    if cast is None or scaled is None or scaled.op_type != "Mul":
        return None
    for product, factor in pairs(scaled):
        factors = producer(factor, "Mul") if product is cast.outputs[0] else None
        for scale, scales in pairs(factors) if factors is not None else ():
            if scale is rounded.outputs[1]:
                weight = integer_weight(node.inputs[1], scales, points)
                nodes = (node, cast, scaled)
                return _made(node, rounded.inputs[0], weight, None, scaled.outputs[0], nodes)
    return None


def _fused_integers(node: ir.Node) -> Layer | None:
    given = [*node.inputs, *[None] * 7]
    if node.op_type == "DynamicQuantizeMatMul":
        weight = integer_weight(given[1], given[2], given[3])
        return _made(node, given[0], weight, given[4])
    rounded = producer(given[0], "DynamicQuantizeLinear")
    if rounded is None or given[2] is not rounded.outputs[1] or given[4] is not rounded.outputs[2]:
        return None
    return _made(node, rounded.inputs[0], integer_weight(given[1], given[3], given[5]), given[6])
