"""The matrices of a block's experts, one by one, as those of linear layers."""

from __future__ import annotations

from sparse_onnx.blocks.lowering import Problem
from sparse_onnx.blocks.moe import MoEBlock
from sparse_onnx.blocks.quantized import Quantized
from sparse_onnx.blocks.spec import WeightLayout
from sparse_onnx.matching.layer_weights import LayerWeight
from sparse_onnx.matching.linear import Matrix
from sparse_onnx.sparsify.weights import outside


def expert_weight(block: MoEBlock, role: str, expert: int) -> LayerWeight:
    """One expert's matrix ``[K, N]``, which is a constant.

    Raises:
        ValueError: quantized, and not expert by expert.
    """
    value = block.weights[role]
    quantized = Quantized.of(value)
    if quantized is not None:
        return integers(block, quantized.part(expert, f"{value.name}.{expert}"))
    turned = block.spec.weight_layout == WeightLayout.OUT_IN
    assert value.const_value is not None
    shape = value.const_value.shape.numpy()[1:]
    inputs, outputs = shape[::-1] if turned else shape
    return LayerWeight(Matrix(value, expert), turned, inputs, outputs, (value,))


def experts_outside(block: MoEBlock, role: str, mode: str) -> Problem | None:
    """`outside`, of a matrix of all experts."""
    node = block.weights[role].producer()
    if node is None or Quantized.of(block.weights[role]) is None:
        return None
    return outside(block.node, node.graph, mode)


def integers(block: MoEBlock, part: Quantized) -> LayerWeight:
    """One expert's matrix out of its integers."""
    turned = block.spec.weight_layout == WeightLayout.OUT_IN
    inputs, outputs = part.shape[::-1] if turned else part.shape
    return LayerWeight(part, turned, inputs, outputs, ())
