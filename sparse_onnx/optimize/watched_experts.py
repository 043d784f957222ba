"""Layers of all experts while the model runs: whether each row is what numpy makes of it with its own expert."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir

from sparse_onnx.blocks.quantized import Quantized
from sparse_onnx.blocks.thresholded_experts import EXPERTS, is_of_experts
from sparse_onnx.graph.external import read_array, slice_first_axis
from sparse_onnx.matching.values import attribute
from sparse_onnx.optimize.watched_gated import judged, layer_gap
from sparse_onnx.sparsify.record import Acting


def index_of(item: Acting, values: Mapping[str, ir.Value]) -> str:
    """The value that says which expert each row of the layer goes to; empty for a layer of another kind."""
    node = values[item.layer].producer()
    if node is None or not is_of_experts(node) or node.inputs[1] is None:
        return ""
    return node.inputs[1].name or ""


def experts_error(
    item: Acting,
    values: Mapping[str, ir.Value],
    x: np.ndarray,
    index: np.ndarray,
    y: np.ndarray,
    bound: np.ndarray,
) -> float:
    """The largest error of the layer of all experts, relative to the scale of its row.

    Args:
        item: the layer.
        values: of the model, by name.
        x: ``[S, K]``.
        index: ``[S]``.
        y: its result, ``[S, N]``.
        bound: tau.

    Raises:
        VerificationError: names the layer.
    """
    node = values[item.layer].producer()
    assert node is not None
    tensors = [None if value is None else value.const_value for value in node.inputs]
    centre, folded = values[item.centre].const_value, tensors[-1]
    assert centre is not None and folded is not None
    biases = read_array(folded)
    expected = np.zeros((len(x), biases.shape[1]))
    gap = np.zeros_like(expected)
    for expert in np.unique(index):
        own = index == expert
        weight = _matrix(node, tensors, int(expert))
        part = y[own] if y.shape == expected.shape else expected[own]
        expected[own], gap[own] = layer_gap(x[own], part, weight, bound, read_array(centre), biases[expert])
    return judged(item, y, expected, gap)


def _matrix(node: ir.Node, tensors: list[ir.TensorProtocol | None], expert: int) -> np.ndarray:
    """One expert's, ``[K, N]`` as numbers."""
    data = tensors[2]
    assert data is not None
    if node.op_type == EXPERTS:
        return read_array(slice_first_axis(data, expert, ""))
    scale, zero = tensors[3:5]
    assert scale is not None
    stored = Quantized(data, scale, zero, attribute(node, "axis"), attribute(node, "block_size"), scale.dtype)
    return stored.part(expert, "").dequantized()
