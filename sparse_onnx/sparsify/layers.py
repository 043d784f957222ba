"""Layers of the main graph and of bodies, made to skip inputs near their site's centre."""

from __future__ import annotations

import dataclasses

import numpy as np
import onnx_ir as ir

from sparse_onnx.blocks.lowering import Problem
from sparse_onnx.blocks.thresholded import LINEAR, MIN_OPSET
from sparse_onnx.graph.build import Emitter, Namespace
from sparse_onnx.matching.layers import Layer
from sparse_onnx.matching.linear import stored_bias
from sparse_onnx.matching.values import pairs, sole_use, tensor
from sparse_onnx.sparsify.emit import Threshold, emit_layer, emit_masked
from sparse_onnx.sparsify.plan import Mode
from sparse_onnx.sparsify.record import SITE_KEY
from sparse_onnx.sparsify.weights import Operands, folded, operands

_FLOATS = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
_ROUNDING = ("MatMulInteger", "DynamicQuantizeMatMul", "MatMulIntegerToFloat")


def obstacle(layer: Layer, mode: Mode, centre: np.ndarray) -> Problem | None:
    """Why a layer cannot skip inputs, and what to do about it; None where it can."""
    if layer.input.dtype not in _FLOATS:
        return "the type of its inputs is not known, or none of float32, float16 and bfloat16", ""
    if layer.node.op_type in _ROUNDING:
        return (
            "its inputs are rounded to 8 bits for a product of integers, and would not be any more",
            "calibrate and optimize the model that it was quantized from",
        )
    if centre.size not in (1, layer.weight.inputs):
        return f"the centre has {centre.size} elements, and it has {layer.weight.inputs} inputs", ""
    if mode == "simulate":
        return None
    found = operands(layer.weight, layer.input.dtype, "")
    if isinstance(found, str):
        return f"the operator does not take {found}", "the mode 'simulate' takes any"
    if mode == "gather" and found.op != LINEAR:
        return "rows of integers are not gathered", "take the mode 'native'"
    return None


def oldest_opset(layer: Layer, mode: Mode) -> int:
    """That the layer can be written in."""
    if mode != "native":
        return 18
    found = operands(layer.weight, layer.input.dtype, "")
    assert isinstance(found, Operands)
    return MIN_OPSET[found.op]


@dataclasses.dataclass
class Writer:
    """Puts thresholds in front of layers of one model."""

    names: Namespace
    masked: dict[tuple[int, int], ir.Value] = dataclasses.field(default_factory=dict)

    def rewrite(self, layer: Layer, threshold: Threshold, centre: np.ndarray) -> ir.Value:
        """
        Args:
            layer: without an `obstacle`.
            threshold: of its site.
            centre: what `threshold.centre` holds.

        Returns:
            The layer's output, in the graph's new state.
        """
        x = layer.input
        if threshold.mode == "simulate" or threshold.top_k:
            x = self._masked(layer, threshold)
        if threshold.mode == "simulate":
            for node in layer.nodes:
                for at, value in enumerate(node.inputs):
                    if value is layer.input:
                        node.replace_input_with(at, x)
            return layer.output
        return self._replaced(layer, x, threshold, centre)

    def _masked(self, layer: Layer, threshold: Threshold) -> ir.Value:
        """The layer's input with what is skipped put to the centre, once for all layers of a graph that read it."""
        graph = layer.node.graph
        assert isinstance(graph, ir.Graph)
        key = (id(graph), id(layer.input))
        if key not in self.masked:
            emit = self._emitter(graph, layer, threshold)
            self.masked[key] = emit_masked(emit, layer.input, threshold)
            # Layers come in the order of their graph: this one is the first to read it.
            graph.insert_before(layer.node, emit.nodes)
        return self.masked[key]

    def _replaced(self, layer: Layer, x: ir.Value, threshold: Threshold, centre: np.ndarray) -> ir.Value:
        graph = layer.node.graph
        assert isinstance(graph, ir.Graph)
        last, bias = _biased(layer)
        name = layer.weight.names[0]
        weights = operands(layer.weight, layer.input.dtype, name)
        assert isinstance(weights, Operands) and layer.input.dtype is not None
        home = layer.weight.values[0].graph
        assert isinstance(home, ir.Graph)
        values = [self._initializer(home, layer, part, tensor) for part, tensor in weights.tensors.items()]
        total = folded(layer.weight, centre, None if bias is None else tensor(bias))
        base = ir.Tensor(total.astype(layer.input.dtype.numpy()), name=f"{name}.folded_bias")
        emit = self._emitter(graph, layer, threshold)
        held = self.names.initializer(home, (base.dtype, base.numpy().tobytes(), "folded"), base)
        result = emit_layer(emit, x, weights, values, held, threshold)
        emit.replace(last, result)
        for value in layer.weight.values:
            if not value.uses() and not value.is_graph_output() and isinstance(value.graph, ir.Graph):
                value.graph.initializers.pop(value.name or "", None)
        return result

    def _initializer(self, graph: ir.Graph, layer: Layer, part: str, held: ir.TensorProtocol) -> ir.Value:
        """The tensor in the graph; where it lies as it lay, the value that holds it."""
        for value in layer.weight.values:
            if tensor(value) is held:
                return value
        source = layer.weight
        suffix = "" if part == "W" else f".{part}"
        held.name = f"{source.names[0]}.in_out{suffix}"
        index = getattr(source.stored, "index", None)
        return self.names.initializer(graph, (*map(id, source.values), index, source.out_in, part), held)

    def _emitter(self, graph: ir.Graph, layer: Layer, threshold: Threshold) -> Emitter:
        prefix = layer.node.name or layer.output.name or "layer"
        return Emitter(graph, self.names, prefix, {SITE_KEY: threshold.site})


def _biased(layer: Layer) -> tuple[ir.Node, ir.Value | None]:
    """The node whose output the layer's is, and its bias: a stored vector that an Add behind it adds counts too."""
    last = layer.output.producer()
    assert last is not None
    if layer.bias is not None:
        return last, layer.bias
    adding = sole_use(layer.output)
    if adding is not None and adding.op_type == "Add" and adding.domain == "" and adding.graph is last.graph:
        for product, constant in pairs(adding):
            held = tensor(constant)
            if product is layer.output and held is not None and stored_bias(constant) is not None:
                if tuple(held.shape.numpy()) == (layer.weight.outputs,) and held.dtype == layer.input.dtype:
                    return adding, constant
    return last, None
