"""Thresholded layers of models too large to be run whole: the same weights as before, one layer at a time."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from sparse_onnx.core.errors import VerificationError
from sparse_onnx.graph.external import read_array
from sparse_onnx.matching.gated import GatedLayer, gated_layers
from sparse_onnx.matching.sites import sites
from sparse_onnx.matching.values import tensor
from sparse_onnx.optimize.watched import numbers_of, values_of
from sparse_onnx.optimize.watched_gated import gated_numbers
from sparse_onnx.sparsify.prefill import layer_of
from sparse_onnx.sparsify.record import Acting, acting

_TOLERANCE = {"float32": 1e-6, "float16": 2e-3, "bfloat16": 1.6e-2}


def compare_weights(before: ir.Model, after: ir.Model) -> int:
    """What a thresholded layer computes at level 0 is X W + bias with the matrix and bias that it had.

    Args:
        before: without thresholds.
        after: with them. Layers of experts, which have no counterpart in `before`, are passed over.

    Returns:
        How many layers were compared.

    Raises:
        VerificationError: names the layer.
    """
    old, new = _all_values(before), values_of(after)
    compared = 0
    layers: dict[str, GatedLayer] = {}
    for item in acting(after):
        found = None if item.inner else layer_of(old, item.layer)
        if found is None:
            continue
        original, bias = found
        if item.rows:
            layers = layers or {each.name: each for each in gated_layers(sites(before))[0]}
            _compare_gated(item, layers[item.site], bias, new)
            compared += 1
            continue
        weight, folded, centre = numbers_of(item, new)
        expected = original.weight.numbers().astype(np.float64)
        base = (
            np.zeros(original.weight.outputs)
            if bias is None
            else read_array(bias).astype(np.float64).reshape(-1)
        )
        spread = np.broadcast_to(centre.astype(np.float64).reshape(-1), (original.weight.inputs,))
        name = "float32" if original.input.dtype is None else original.input.dtype.numpy().name
        tolerance = _TOLERANCE.get(name, 1e-6)
        sums = np.abs(base) + np.abs(spread) @ np.abs(expected)
        gap = np.abs(folded.astype(np.float64) - (base + spread @ expected))
        if weight.shape != expected.shape or not np.array_equal(weight.astype(np.float64), expected):
            raise _differs(item.layer, "other weights")
        if (gap > tolerance * np.maximum(sums, 1e-30)).any():
            raise _differs(item.layer, "another bias")
        compared += 1
    return compared


def _compare_gated(
    item: Acting, original: GatedLayer, bias: ir.TensorProtocol | None, values: dict[str, ir.Value]
) -> None:
    held = gated_numbers(item, values)
    if held is None:
        return
    up_bias = None if original.up_bias is None else tensor(original.up_bias)
    before = [original.up.weight.numbers().T, up_bias, original.down.weight.numbers(), bias]
    for at, (was, now) in enumerate(zip(before, held, strict=True)):
        kept = was if isinstance(was, np.ndarray) else np.zeros(1) if was is None else read_array(was)
        if at % 2:
            kept = np.broadcast_to(kept.reshape(-1), now.shape)
        if not np.array_equal(kept.astype(np.float64), now.astype(np.float64)):
            raise _differs(item.layer, "another bias" if at % 2 else "other weights")


def _differs(name: str, what: str) -> VerificationError:
    return VerificationError(
        f"thresholded layer '{name}' has {what} than before",
        "nothing was written; please report it, this is a fault of sparse-onnx",
    )


def _all_values(model: ir.Model) -> dict[str, ir.Value]:
    return {value.name or "": value for node in model.graph for value in node.outputs}
