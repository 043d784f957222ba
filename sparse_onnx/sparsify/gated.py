"""Gated feed-forward layers whose gate says which units are skipped, in the three modes.

    native    Y = ThresholdedGatedMLP(a, X, up, up_bias, down, tau, bias), a = act(X gate)
    simulate  h' = Where(|a| <= tau, 0, h) in front of down, and all layers as they were
    gather    rows = NonZero(|a| > tau); Y = (a[rows] * (X Gather(up, rows)^T)) Gather(down, rows) + bias, of one token

`up` becomes `[I, K]`, so that the weights of one unit lie together; what lies the other way round is turned while the
model is written.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable

import numpy as np
import onnx_ir as ir

from sparse_onnx.blocks.lowering import Problem
from sparse_onnx.blocks.spec import DOMAIN
from sparse_onnx.blocks.thresholded import LINEAR, N_BITS
from sparse_onnx.blocks.thresholded_gated import GATED, GATED_N_BITS, GATED_OPSET
from sparse_onnx.graph.branches import Branch, emit_if, inside
from sparse_onnx.graph.build import Emitter, Namespace
from sparse_onnx.graph.external import read_array
from sparse_onnx.matching.gated import GatedLayer
from sparse_onnx.matching.layer_weights import LayerWeight
from sparse_onnx.matching.layers import layer as fresh
from sparse_onnx.matching.values import tensor
from sparse_onnx.sparsify.emit import Threshold
from sparse_onnx.sparsify.layers import FLOATS, Product, biased, drop, initializer, integers_outside, obstacle
from sparse_onnx.sparsify.plan import Mode
from sparse_onnx.sparsify.record import Acting, tag
from sparse_onnx.sparsify.weights import Operands, operands

_ZERO = np.zeros(1)


@dataclasses.dataclass(frozen=True, eq=False)
class Gated:
    """What a gated layer multiplies by behind its gate: `up` by unit, ``[I, K]``, and `down` ``[I, N]``."""

    up: Product
    down: Product


def by_unit(weight: LayerWeight) -> LayerWeight:
    """A matrix ``[K, I]`` as ``[I, K]``."""
    return dataclasses.replace(weight, out_in=not weight.out_in, inputs=weight.outputs, outputs=weight.inputs)


def gated_obstacle(layer: GatedLayer, mode: Mode) -> Problem | None:
    """Why a layer of a graph cannot skip units, and what to do about it; None where it can."""
    for each in (layer.up, layer.down):
        problem = obstacle(each, "simulate", _ZERO) or integers_outside(each, mode)
        if problem is not None:
            return problem
    return weights_obstacle(layer.up.weight, layer.down.weight, layer.activated.dtype, mode)


def weights_obstacle(
    up: LayerWeight, down: LayerWeight, dtype: ir.DataType | None, mode: Mode
) -> Problem | None:
    """The same of two matrices ``[K, I]`` and ``[I, N]``, whose inputs are of `dtype`."""
    if dtype not in FLOATS:
        return "the type of its inputs is not known, or none of float32, float16 and bfloat16", ""
    if mode == "simulate":
        return None
    found = [operands(weight, dtype, "") for weight in (by_unit(up), down)]
    for part in found:
        if isinstance(part, str):
            return f"the operator does not take {part}", "the mode 'simulate' takes any"
    first, second = (part for part in found if isinstance(part, Operands))
    if first.op != second.op or first.tensors["W"].dtype != second.tensors["W"].dtype:
        return "up and down are stored as different types", "the mode 'simulate' takes any"
    if mode == "gather" and first.op != LINEAR:
        return "rows of integers are not gathered", "take the mode 'native'"
    return None


def gated_opset(down: LayerWeight, dtype: ir.DataType | None, mode: Mode) -> int:
    """The oldest that a layer without an obstacle, whose up is stored as down is, can be written in."""
    found = operands(down, dtype, "") if mode == "native" else ""
    return 18 if isinstance(found, str) else GATED_OPSET[_OPS[found.op]]


_OPS = {LINEAR: GATED, N_BITS: GATED_N_BITS}


def emit_gated(
    emit: Emitter, a: ir.Value, x: ir.Value, dtype: ir.DataType, gated: Gated, threshold: Threshold
) -> ir.Value:
    """The layer behind its gate in the modes `native` and `gather`.

    Args:
        emit: where the nodes go.
        a: ``[..., I]``, the gate's activation.
        x: ``[..., K]``, as many rows.
        dtype: of both.
        gated: what it multiplies by; without an obstacle.
        threshold: `bound` is tau ``[1]``; the centre is none.
    """
    inputs: list[ir.Value] = []
    attributes: dict[str, int] = {}
    op = GATED
    for role, product, width in (
        ("up", gated.up, gated.up.weight.inputs),
        ("down", gated.down, gated.down.weight.outputs),
    ):
        weights = operands(product.weight, dtype, product.name)
        assert isinstance(weights, Operands)
        op = _OPS[weights.op]
        inputs += [initializer(emit.names, product, part, held) for part, held in weights.tensors.items()]
        attributes |= {f"{role}_{name}": value for name, value in weights.attributes.items()}
        bias = _bias(emit.names, product, width, dtype)
        inputs += [bias] if role == "up" else [threshold.bound, bias]
    own = gated.up.weight.nbytes + gated.down.weight.nbytes
    entry = Acting(threshold.site, a.name or "", threshold.bound.name or "", "", own, rows=x.name or "")
    if threshold.mode == "gather":
        up, up_bias, down, _, bias = inputs
        result = _gathered(emit, a, x, dtype, inputs)
        entry = dataclasses.replace(
            entry,
            weight=down.name or "",
            folded=bias.name or "",
            up=up.name or "",
            up_bias=up_bias.name or "",
        )
    else:
        result = emit.op(op, a, x, *inputs, domain=DOMAIN, **attributes)
    tag(emit.nodes[-1], entry)
    return result


def emit_masked_product(emit: Emitter, a: ir.Value, h: ir.Value, threshold: Threshold) -> ir.Value:
    """``h`` without the units whose activation is small."""
    assert a.dtype is not None
    skipped = emit.op("LessOrEqual", emit.op("Abs", a), threshold.bound)
    masked = emit.op("Where", skipped, emit.scalar(0.0, a.dtype), h)
    masked.shape, masked.type = h.shape, h.type
    return masked


def _bias(names: Namespace, product: Product, width: int, dtype: ir.DataType) -> ir.Value:
    kept = np.zeros(1) if product.bias is None else read_array(product.bias).reshape(-1)
    numbers = np.broadcast_to(
        kept.astype(dtype.numpy()), (width,)
    ).copy()  # one number may stand for all units
    held = ir.Tensor(numbers, dtype, name=f"{product.name}.added")
    return names.initializer(product.home, (dtype, numbers.tobytes(), "added"), held)


def _gathered(emit: Emitter, a: ir.Value, x: ir.Value, dtype: ir.DataType, given: list[ir.Value]) -> ir.Value:
    up, up_bias, down, bound, bias = given
    skipped = emit.op("LessOrEqual", emit.op("Abs", a), bound)
    tokens = emit.op("Div", emit.op("Size", a), emit.op("Shape", down, start=0, end=1))
    single = emit.op("Squeeze", emit.op("Equal", tokens, emit.ints(1)), emit.ints(0))
    then, other = inside(emit, "one"), inside(emit, "several")
    flat = then.op("Reshape", then.op("Not", skipped), then.ints(-1))
    rows = then.op("Reshape", then.op("NonZero", flat), then.ints(-1))
    turned = then.op("Transpose", then.op("Gather", up, rows, axis=0), perm=[1, 0])
    unit = then.op("Add", then.op("MatMul", x, turned), then.op("Gather", up_bias, rows, axis=0))
    few = then.op("Mul", then.op("Gather", a, rows, axis=-1), unit)
    one = then.op("MatMul", few, then.op("Gather", down, rows, axis=0))
    every = other.op("Add", other.op("MatMul", x, other.op("Transpose", up, perm=[1, 0])), up_bias)
    hidden = other.op("Where", skipped, other.scalar(0.0, dtype), other.op("Mul", a, every))
    many = other.op("MatMul", hidden, down)
    told = () if x.shape is None else ((dtype, [None] * len(x.shape)),)
    [product] = emit_if(emit, single, Branch(then, [one]), Branch(other, [many]), told)
    return emit.op("Add", product, bias)


def rewrite_gated(names: Namespace, layer: GatedLayer, threshold: Threshold) -> None:
    """Puts a threshold behind the gate of a layer without an `gated_obstacle`."""
    down = layer.down
    graph = down.node.graph
    assert isinstance(graph, ir.Graph) and layer.activated.dtype is not None
    emit = Emitter(graph, names, down.node.name or down.output.name or "layer")
    if threshold.mode == "simulate":
        masked = emit_masked_product(emit, layer.activated, layer.product, threshold)
        graph.insert_before(down.node, emit.nodes)
        for at, value in enumerate(down.node.inputs):
            if value is layer.product:
                down.node.replace_input_with(at, masked)
        entry = Acting(
            *(threshold.site, layer.activated.name or "", threshold.bound.name or "", "", layer.nbytes),
            rows=layer.product.name or "",
        )
        tag(down.node, entry)
        return
    reads = fresh(layer.up.node)  # now, since rewriting the layer before it may have replaced its input
    assert reads is not None
    last, bias = biased(down)
    up = _product(by_unit(layer.up.weight), layer.up_bias, "by_unit")
    gated = Gated(up, _product(down.weight, bias, "down"))
    result = emit_gated(emit, layer.activated, reads.input, layer.activated.dtype, gated, threshold)
    unread = [layer.product.producer(), *_behind(layer)]
    emit.replace(last, result)
    drop(down)
    for node in unread:
        if node is not None and node.graph is not None and not any(value.uses() for value in node.outputs):
            node.graph.remove(node, safe=True)
    drop(layer.up)


def _behind(layer: GatedLayer) -> list[ir.Node]:
    """The Add of up's bias, where there is one."""
    return [use.node for use in layer.up.output.uses() if use.node.op_type == "Add"]


def _product(weight: LayerWeight, bias: ir.Value | None, role: str) -> Product:
    home = weight.values[0].graph
    assert isinstance(home, ir.Graph)
    key: Hashable = (*(id(value) for value in weight.values), getattr(weight.stored, "index", None), role)
    return Product(weight, None if bias is None else tensor(bias), home, weight.names[0], key)
