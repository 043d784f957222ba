"""Each expert's own matrices, cut out of a block's packed weights, and the product by one of them.

Quantized weights stay as they are stored: an expert gets its range of the integers and its scales, and multiplies by
com.microsoft::MatMulNBits where that can express them, else by DequantizeLinear and Gemm. The latter turns the weights
of experts without tokens into numbers too, at every run. Where a lossy step allowed it, MatMulNBits rounds activations
to 8 bits, or the product is DynamicQuantizeMatMul, which does so for all rows of an expert at once.
"""

from __future__ import annotations

from typing import Any

import onnx_ir as ir

from sparse_onnx.blocks import dynamic
from sparse_onnx.blocks.expert import Linear, emit_linear
from sparse_onnx.blocks.lowering import rounds_activations
from sparse_onnx.blocks.moe import MoEBlock, is_zero
from sparse_onnx.blocks.nbits import DOMAIN, EXACT, ROUNDED, NBits, block_size, emit_nbits
from sparse_onnx.blocks.quantized import Quantized
from sparse_onnx.blocks.spec import WeightLayout
from sparse_onnx.graph.build import Emitter, Namespace
from sparse_onnx.graph.external import slice_first_axis


def obstacle(value: ir.Value, role: str) -> tuple[str, str] | None:
    """Why a packed weight cannot be cut into experts, and what to do about it; None where it can."""
    if value.const_value is not None and value.is_initializer() and not value.is_graph_input():
        return None
    weight = None if role.endswith("_bias") else Quantized.of(value)
    if weight is None or len(weight.shape) != 3:
        return (
            f"{role} is computed or passed in at run time",
            "weights must be initializers that are not graph inputs",
        )
    try:
        weight.part(0, "")
    except ValueError as error:
        return (
            f"{role} is quantized, and not expert by expert: {error}",
            "quantize each expert in blocks of its own",
        )
    return None


def not_dynamic(block: MoEBlock) -> tuple[str, str] | None:
    """Why a block's products cannot be DynamicQuantizeMatMul, and what to do about it; None where they can."""
    if not rounds_activations(block):
        return "the integer product rounds activations", "ask for it with --quantize int8"
    if block.spec.weight_layout != WeightLayout.OUT_IN:
        return "its weights are not rows of inputs", "quantize them with --quantize int8"
    for role in block.spec.roles:
        weight = Quantized.of(block.weights[role])
        reason = f"{role} is not quantized" if weight is None else dynamic.obstacle(weight)
        if reason:
            return f"the integer product does not take it: {reason}", "quantize with --quantize int8"
    return None


class ExpertWeights:
    """The experts of one block. Their matrices become initializers of the graph that holds the packed ones.

    Args:
        block: whose weights have no `obstacle`.
        names: of the model.
        contrib: whether operators of ONNX Runtime may be used.
        integer: products by DynamicQuantizeMatMul; the block is none of `not_dynamic`.
    """

    def __init__(
        self, block: MoEBlock, names: Namespace, contrib: bool = True, integer: bool = False
    ) -> None:
        self.block, self.names, self.contrib, self.integer = block, names, contrib, integer
        self.accuracy = ROUNDED if rounds_activations(block) else EXACT
        self.first_roles = block.spec.roles[:-1]
        self.last_role = block.spec.roles[-1]
        self.domains: set[str] = set()
        weights = block.weights
        self.biased = {role: not is_zero(weights[f"{role}_bias"]) for role in block.spec.roles}
        self.quantized = {role: Quantized.of(weights[role]) for role in block.spec.roles}

    def whole(self, emit: Emitter, expert: int, rows: ir.Value, opset: int) -> ir.Value | None:
        """``rows [n, D] -> [n, D_out]`` by all of an expert, where it is not a matrix at a time; else None."""
        del emit, expert, rows, opset
        return None

    def linear(self, emit: Emitter, role: str, expert: int, rows: ir.Value) -> ir.Value:
        """``rows [n, in] -> [n, out]`` by one matrix of one expert, with its bias."""
        bias = self._slice(self.block.weights[f"{role}_bias"], expert) if self.biased[role] else None
        value, weight = self.block.weights[role], self.quantized[role]
        if weight is None:
            return emit_linear(emit, self.block.spec, rows, Linear(self._slice(value, expert), bias))
        part = weight.part(expert, f"{value.name}.{expert}")
        if self.integer:
            self.domains.add(DOMAIN)
            turned = dynamic.Rows.of(part)
            data = self._put(value, expert, "rows", turned.data)
            scales = self._put(value, expert, "row_scales", turned.scales)
            return dynamic.emit_dynamic(emit, rows, data, scales, bias)
        if self.block.spec.weight_layout == WeightLayout.IN_OUT:
            part = part.turned()
        if self.contrib and part.dtype == self.block.dtype and block_size(part) is not None:
            return self._product(emit, value, expert, part, rows, bias)
        # Of a dequantized matrix that is not turned ORT makes MatMulNBits, which then rounds activations to 8 bits
        # (session option session.qdq_matmulnbits_accuracy_level, 4 by default).
        inputs = [rows, self._dequantized(emit, value, expert, part)]
        return emit.op("Gemm", *inputs, *([] if bias is None else [bias]), transB=1)

    def _product(
        self,
        emit: Emitter,
        value: ir.Value,
        expert: int,
        part: Quantized,
        rows: ir.Value,
        bias: ir.Value | None,
    ) -> ir.Value:
        stored = NBits.of(part)
        assert stored is not None
        self.domains.add(DOMAIN)
        data = self._put(value, expert, "nbits", stored.data)
        scales = self._put(value, expert, "scales", stored.scales)
        points = None
        if stored.zero_points is not None:
            points = self._put(value, expert, "zero_points", stored.zero_points)
        return emit_nbits(emit, rows, data, scales, points, bias, stored, self.accuracy)

    def _dequantized(self, emit: Emitter, value: ir.Value, expert: int, part: Quantized) -> ir.Value:
        inputs = [self._put(value, expert, "data", part.data), self._put(value, expert, "scale", part.scale)]
        if part.zero_point is not None:
            inputs.append(self._put(value, expert, "zero_point", part.zero_point))
        attributes: dict[str, Any] = {"axis": part.axis} if len(part.scale.shape) else {}
        if part.block:
            attributes["block_size"] = part.block
        return emit.op("DequantizeLinear", *inputs, **attributes)

    def _slice(self, packed: ir.Value, expert: int) -> ir.Value:
        assert packed.const_value is not None and isinstance(packed.graph, ir.Graph)
        tensor = slice_first_axis(packed.const_value, expert, f"{packed.name}.{expert}")
        return self.names.initializer(packed.graph, (packed.name, expert), tensor)

    def _put(self, value: ir.Value, expert: int, what: str, tensor: ir.TensorProtocol) -> ir.Value:
        node = value.producer()
        assert node is not None and isinstance(node.graph, ir.Graph)
        return self.names.initializer(node.graph, (value.name, expert, what), tensor)

    def drop_unused(self) -> None:
        """Removes packed weights, and the nodes that dequantize them, which nothing reads any more."""
        values = list(self.block.weights.values())
        for role, weight in self.quantized.items():
            node = self.block.weights[role].producer()
            if weight is None or node is None or node.graph is None:
                continue
            if not (node.outputs[0].uses() or node.outputs[0].is_graph_output()):
                node.graph.remove(node, safe=True)
                values += weight.values
        for value in values:
            graph = value.graph
            if isinstance(graph, ir.Graph) and not value.uses() and not value.is_graph_output():
                graph.initializers.pop(value.name or "", None)
