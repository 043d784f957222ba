"""The three ways in which a layer skips inputs near its centre.

    native    Y = ThresholdedLinear(X, W, tau, centre, bias + centre W)
    simulate  X' = Where(|X - centre| <= tau, centre, X), and the layer as it was on X'
    gather    rows = NonZero(|X - centre| > tau); Y = (X - centre)[rows] @ Gather(W, rows) + bias + centre W

Gathering copies the rows that it keeps, so it is for one token, and several tokens multiply by all of W. With `top_k`
the bound is that of the token itself, its k-th largest distance:

    X' = Where(|X - centre| < min(TopK(|X - centre|, k)), centre, X)

and what was put to the centre is what tau = 0 skips.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from sparse_onnx.blocks.spec import DOMAIN
from sparse_onnx.graph.branches import Branch, emit_if, inside
from sparse_onnx.graph.build import Emitter
from sparse_onnx.sparsify.plan import Mode
from sparse_onnx.sparsify.weights import Operands


@dataclasses.dataclass(frozen=True, eq=False)
class Threshold:
    """Of one site: `bound` is tau ``[1]``, or the k ``[1]`` of `top_k`; `centre` ``[1]`` or ``[K]``."""

    site: str
    bound: ir.Value
    centre: ir.Value
    mode: Mode
    top_k: bool


def emit_masked(emit: Emitter, x: ir.Value, threshold: Threshold) -> ir.Value:
    """``x`` with what is skipped put to the centre."""
    distance = emit.op("Abs", emit.op("Sub", x, threshold.centre))
    if threshold.top_k:
        largest = emit.ops("TopK", (distance, threshold.bound), 2, axis=-1, sorted=0)[0]
        skipped = emit.op("Less", distance, emit.op("ReduceMin", largest, emit.ints(-1), keepdims=1))
    else:
        skipped = emit.op("LessOrEqual", distance, threshold.bound)
    masked = emit.op("Where", skipped, threshold.centre, x)
    masked.shape, masked.type = x.shape, x.type
    return masked


def emit_layer(
    emit: Emitter,
    x: ir.Value,
    dtype: ir.DataType,
    weights: Operands,
    values: Sequence[ir.Value],
    folded: ir.Value,
    threshold: Threshold,
) -> ir.Value:
    """The layer in the modes `native` and `gather`.

    Args:
        emit: where the nodes go.
        x: ``[..., K]``; of `top_k` masked already.
        dtype: of x.
        weights: what `values` hold; numbers, where the mode is `gather`.
        values: the operator's weights, as initializers.
        folded: ``[N]``, bias + centre W.
        threshold: of the site.
    """
    bound = threshold.bound
    if threshold.top_k:
        bound = emit.constant(np.zeros(1, dtype.numpy()))
    if threshold.mode == "gather":
        return _gathered(emit, x, dtype, values[0], folded, bound, threshold.centre)
    inputs = [x, *values, bound, threshold.centre, folded]
    return emit.op(weights.op, *inputs, domain=DOMAIN, **weights.attributes)


def _gathered(
    emit: Emitter,
    x: ir.Value,
    dtype: ir.DataType,
    weight: ir.Value,
    folded: ir.Value,
    bound: ir.Value,
    centre: ir.Value,
) -> ir.Value:
    distance = emit.op("Sub", x, centre)
    skipped = emit.op("LessOrEqual", emit.op("Abs", distance), bound)
    kept = emit.op("Where", skipped, emit.scalar(0.0, dtype), distance)
    tokens = emit.op("Div", emit.op("Size", x), emit.op("Shape", weight, start=0, end=1))
    single = emit.op("Squeeze", emit.op("Equal", tokens, emit.ints(1)), emit.ints(0))
    then, other = inside(emit, "one"), inside(emit, "several")
    flat = then.op("Reshape", then.op("Not", skipped), then.ints(-1))
    rows = then.op("Reshape", then.op("NonZero", flat), then.ints(-1))
    few = then.op("MatMul", then.op("Gather", kept, rows, axis=-1), then.op("Gather", weight, rows, axis=0))
    many = other.op("MatMul", kept, weight)
    told = () if x.shape is None else ((dtype, [None] * len(x.shape)),)
    [product] = emit_if(emit, single, Branch(then, [few]), Branch(other, [many]), told)
    return emit.op("Add", product, folded)
