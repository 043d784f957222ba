"""Gated layers while the model runs: whether they compute what numpy does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnx_ir as ir

from sparse_onnx.blocks.quantized import Quantized
from sparse_onnx.blocks.thresholded import thresholded_reference
from sparse_onnx.blocks.thresholded_gated import GATED, gated_reference, is_gated
from sparse_onnx.core.errors import VerificationError
from sparse_onnx.graph.external import read_array
from sparse_onnx.matching.layers import layer
from sparse_onnx.matching.values import attribute
from sparse_onnx.sparsify.record import Acting
from sparse_onnx.verify.compare import TOLERANCES, same_places, sizes

#: Relative errors of types whose own rounding moves a value across a threshold.
COARSE = {"float16": 2e-3, "bfloat16": 1.6e-2}

Arrays = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]


def gated_error(
    item: Acting,
    values: Mapping[str, ir.Value],
    gate: np.ndarray,
    rows: np.ndarray,
    y: np.ndarray,
    bound: np.ndarray,
) -> float:
    """The largest error of a gated layer, relative to the scale of its row.

    Args:
        item: the layer.
        values: of the model, by name.
        gate: ``[..., I]``, the activation.
        rows: ``[..., K]`` that up reads; in the mode `simulate` ``[..., I]``, the product that is masked.
        y: its result.
        bound: tau.

    Raises:
        VerificationError: names the layer.
    """
    skipped = np.abs(gate.astype(np.float32)) <= bound.astype(np.float32)
    held = gated_numbers(item, values)
    if held is None:
        down, bias = _masked_numbers(item, values)
        hidden = np.where(skipped, 0.0, rows.astype(np.float64))
        expected = hidden @ down.astype(np.float64) + bias.astype(np.float64)
        units = rows.astype(np.float64)
    else:
        up, up_bias, down, bias = held
        expected = gated_reference(gate, rows, up, up_bias, down, bound, bias)
        units = rows.astype(np.float64) @ up.astype(np.float64).T + up_bias.astype(np.float64)
        units *= gate.astype(np.float64)
    gap = np.abs(y.astype(np.float64) - expected) if y.shape == expected.shape else np.zeros(1)
    name = gate.dtype.name
    if name in COARSE:
        size = np.abs(gate.astype(np.float32))
        near = np.abs(size - bound.astype(np.float32)) <= COARSE[name] * np.maximum(size, 1e-6)
        gap = gap - np.where(near, np.abs(units), 0) @ np.abs(down.astype(np.float64))
    return judged(item, y, expected, gap)


def layer_gap(
    x: np.ndarray,
    y: np.ndarray,
    weight: np.ndarray,
    bound: np.ndarray,
    centre: np.ndarray,
    folded: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """What a layer that skips inputs must give, ``[..., N]``, and how far off `y` is beyond what its type excuses."""
    expected = thresholded_reference(x, weight, bound, centre, folded)
    gap = np.abs(y.astype(np.float64) - expected) if y.shape == expected.shape else np.zeros(1)
    name = x.dtype.name
    if name in COARSE:  # a distance that the body rounds may come to lie on the other side of the threshold
        distance = np.abs(x.astype(np.float32) - centre.astype(np.float32))
        near = np.abs(distance - bound.astype(np.float32)) <= COARSE[name] * np.maximum(distance, 1e-6)
        gap = gap - np.where(near, distance, 0).astype(np.float64) @ np.abs(weight).astype(np.float64)
    return expected, gap


def judged(item: Acting, y: np.ndarray, expected: np.ndarray, gap: np.ndarray) -> float:
    """The largest of the errors `gap` of a layer, each relative to the scale of its row: a token of huge activations
    must not hide what is wrong with the others.

    Raises:
        VerificationError: it is more than the type accounts for, or shapes or places of NaN and infinities differ.
    """
    if y.shape != expected.shape or not same_places(expected, y):
        raise VerificationError(
            f"layer '{item.layer}' differs from numpy in shape, or in where NaN and infinities are"
        )
    if expected.size == 0:
        return 0.0
    error = float(np.nan_to_num(np.maximum(gap, 0) / sizes(expected, y)).max())
    if error > TOLERANCES.get(y.dtype.name, 1e-4):
        raise VerificationError(
            f"thresholded layer '{item.layer}' differs from numpy: relative error {error:.2g}",
            "nothing was written; please report it, this is a fault of sparse-onnx",
        )
    return error


def gated_numbers(item: Acting, values: Mapping[str, ir.Value]) -> Arrays | None:
    """up ``[I, K]``, its bias, down ``[I, N]`` and its bias, as the model holds them; None in the mode `simulate`."""
    node = values[item.layer].producer()
    assert node is not None
    if not is_gated(node):
        if not item.up:
            return None
        up, up_bias, down, bias = (
            _array(values[name].const_value) for name in (item.up, item.up_bias, item.weight, item.folded)
        )
        return up, up_bias, down, bias
    tensors = [None if value is None else value.const_value for value in node.inputs[2:]]
    if node.op_type == GATED:
        return _array(tensors[0]), _array(tensors[1]), _array(tensors[2]), _array(tensors[4])
    sizes = {name: attribute(node, name) for name in node.attributes}
    first, second = (
        stored_numbers(tensors[at : at + 3], sizes[f"{name}_axis"], sizes[f"{name}_block_size"])
        for at, name in ((0, "up"), (4, "down"))
    )
    return first, _array(tensors[3]), second, _array(tensors[8])


def stored_numbers(tensors: Sequence[ir.TensorProtocol | None], axis: int, block: int) -> np.ndarray:
    """Integers, their scales and zero points as numbers."""
    data, scale, zero = tensors
    assert data is not None and scale is not None
    return Quantized(data, scale, zero, axis, block, scale.dtype).dequantized()


def _masked_numbers(item: Acting, values: Mapping[str, ir.Value]) -> tuple[np.ndarray, np.ndarray]:
    node = values[item.layer].producer()
    found = None if node is None else layer(node)
    assert found is not None
    bias = np.zeros(found.weight.outputs)
    if found.bias is not None and found.bias.const_value is not None:
        bias = read_array(found.bias.const_value).reshape(-1)
    return found.weight.numbers(), bias


def _array(tensor: ir.TensorProtocol | None) -> np.ndarray:
    assert tensor is not None
    return read_array(tensor)
