"""Linear layers that skip inputs near their site's centre: of a graph as it stands, and of experts."""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable

import numpy as np
import onnx_ir as ir

from sparse_onnx.blocks.lowering import Problem
from sparse_onnx.blocks.quantized import Quantized
from sparse_onnx.blocks.thresholded import LINEAR, MIN_OPSET
from sparse_onnx.graph.build import Emitter, Namespace
from sparse_onnx.matching.layer_weights import LayerWeight
from sparse_onnx.matching.layers import Layer
from sparse_onnx.matching.linear import stored_bias
from sparse_onnx.matching.values import pairs, sole_use, tensor
from sparse_onnx.sparsify.emit import Threshold, emit_layer, emit_masked
from sparse_onnx.sparsify.plan import Mode
from sparse_onnx.sparsify.record import Acting, tag
from sparse_onnx.sparsify.weights import Operands, folded, operands, outside

FLOATS = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
_ROUNDING = ("MatMulInteger", "DynamicQuantizeMatMul", "MatMulIntegerToFloat")


def obstacle(layer: Layer, mode: Mode, centre: np.ndarray) -> Problem | None:
    """Why a layer cannot skip inputs, and what to do about it; None where it can."""
    if layer.node.op_type in _ROUNDING:
        return (
            "its inputs are rounded to 8 bits for a product of integers, and would not be any more",
            "calibrate and optimize the model that it was quantized from",
        )
    problem = weight_obstacle(layer.weight, layer.input.dtype, mode, centre)
    return problem or integers_outside(layer, mode)


def integers_outside(layer: Layer, mode: Mode) -> Problem | None:
    """`outside`, of a layer."""
    if not isinstance(layer.weight.stored, Quantized):
        return None
    return outside(layer.node, layer.weight.values[0].graph, mode)


def weight_obstacle(
    weight: LayerWeight, dtype: ir.DataType | None, mode: Mode, centre: np.ndarray
) -> Problem | None:
    """The same of a matrix, whose inputs are of `dtype`."""
    if dtype not in FLOATS:
        return "the type of its inputs is not known, or none of float32, float16 and bfloat16", ""
    if centre.size not in (1, weight.inputs):
        return f"the centre has {centre.size} elements, and it has {weight.inputs} inputs", ""
    if mode == "simulate":
        return None
    found = operands(weight, dtype, "")
    if isinstance(found, str):
        return f"the operator does not take {found}", "the mode 'simulate' takes any"
    if mode == "gather" and found.op != LINEAR:
        return "rows of integers are not gathered", "take the mode 'native'"
    return None


def oldest_opset(weight: LayerWeight, dtype: ir.DataType | None, mode: Mode) -> int:
    """That a layer without an `obstacle` can be written in."""
    found = operands(weight, dtype, "") if mode == "native" else ""
    return 18 if isinstance(found, str) else MIN_OPSET[found.op]


@dataclasses.dataclass(frozen=True, eq=False)
class Product:
    """What a thresholded layer multiplies by.

    Attributes:
        weight: ``[K, N]``.
        bias: ``[N]``, or None.
        home: the graph whose initializers the matrix becomes.
        name: that new initializers' names begin with.
        key: equal for equal matrices.
    """

    weight: LayerWeight
    bias: ir.TensorProtocol | None
    home: ir.Graph
    name: str
    key: Hashable


def emit_product(
    emit: Emitter, x: ir.Value, dtype: ir.DataType, product: Product, threshold: Threshold, watched: str
) -> ir.Value:
    """The layer in the modes `native` and `gather`, on inputs ``[..., K]`` of `dtype`; of `top_k` masked already.

    Args:
        emit: where the nodes go.
        x: the inputs.
        dtype: of the inputs.
        product: the matrix and bias; without an obstacle.
        threshold: of the site.
        watched: name of the value that the threshold is compared with.
    """
    weights = operands(product.weight, dtype, product.name)
    assert isinstance(weights, Operands)
    values = [initializer(emit.names, product, part, held) for part, held in weights.tensors.items()]
    total = folded(product.weight, _centre(threshold), product.bias).astype(dtype.numpy())
    base = ir.Tensor(total, dtype, name=f"{product.name}.folded_bias")
    held = emit.names.initializer(product.home, (dtype, total.tobytes(), "folded"), base)
    result = emit_layer(emit, x, dtype, weights, values, held, threshold)
    entry = note(threshold, watched, product.weight)
    if threshold.mode == "gather":
        entry = dataclasses.replace(entry, weight=values[0].name or "", folded=held.name or "")
    tag(emit.nodes[-1], entry)
    return result


def note(threshold: Threshold, watched: str, weight: LayerWeight) -> Acting:
    bound = "" if threshold.top_k else threshold.bound.name or ""
    return Acting(threshold.site, watched, bound, threshold.centre.name or "", weight.nbytes)


def _centre(threshold: Threshold) -> np.ndarray:
    """As the graph rounds it, so that what is folded is what is subtracted."""
    held = threshold.centre.const_value
    assert held is not None
    return held.numpy()


def initializer(names: Namespace, product: Product, part: str, held: ir.TensorProtocol) -> ir.Value:
    """The tensor in the graph; where it lies as it lay, the value that holds it."""
    for value in product.weight.values:
        if tensor(value) is held:
            return value
    held.name = f"{product.name}.in_out" + ("" if part == "W" else f".{part}")
    return names.initializer(product.home, (product.key, part), held)


@dataclasses.dataclass
class Writer:
    """Puts thresholds in front of layers of one model."""

    names: Namespace
    masked: dict[tuple[int, int], ir.Value] = dataclasses.field(default_factory=dict)

    def rewrite(self, layer: Layer, threshold: Threshold) -> None:
        """Of a layer without an `obstacle`. Layers come in the order of the graph."""
        x, watched = layer.input, layer.input
        if threshold.mode == "simulate" or threshold.top_k:
            x = self._masked(layer, threshold)
        if threshold.top_k:
            watched = x
        if threshold.mode == "simulate":
            for at, value in enumerate(layer.node.inputs):
                if value is layer.input:
                    layer.node.replace_input_with(at, x)
            tag(layer.node, note(threshold, watched.name or "", layer.weight))
            return
        graph, home = layer.node.graph, layer.weight.values[0].graph
        last, bias = biased(layer)
        assert isinstance(graph, ir.Graph) and isinstance(home, ir.Graph) and layer.input.dtype is not None
        weight, index = layer.weight, getattr(layer.weight.stored, "index", None)
        key = (*(id(value) for value in weight.values), index, weight.out_in)
        product = Product(weight, None if bias is None else tensor(bias), home, weight.names[0], key)
        emit = self._emitter(graph, layer)
        result = emit_product(emit, x, layer.input.dtype, product, threshold, watched.name or "")
        emit.replace(last, result)
        drop(layer)

    def _masked(self, layer: Layer, threshold: Threshold) -> ir.Value:
        """The layer's input with what is skipped put to the centre, once for all layers of a graph that read it."""
        graph = layer.node.graph
        assert isinstance(graph, ir.Graph)
        key = (id(graph), id(layer.input))
        if key not in self.masked:
            emit = self._emitter(graph, layer)
            self.masked[key] = emit_masked(emit, layer.input, threshold)
            graph.insert_before(layer.node, emit.nodes)
        return self.masked[key]

    def _emitter(self, graph: ir.Graph, layer: Layer) -> Emitter:
        return Emitter(graph, self.names, layer.node.name or layer.output.name or "layer")


def drop(layer: Layer) -> None:
    """The layer's nodes that nothing reads any more, and the weights in the order that they had."""
    for node in reversed(layer.nodes):
        if node.graph is not None and not any(
            value.uses() or value.is_graph_output() for value in node.outputs
        ):
            node.graph.remove(node, safe=True)
    for value in layer.weight.values:
        reader = next(iter(value.uses()), None)
        if reader is not None and reader.node.op_type in ("DequantizeLinear", "Transpose", "Identity"):
            _remove_unread(reader.node)
        if not value.uses() and not value.is_graph_output() and isinstance(value.graph, ir.Graph):
            value.graph.initializers.pop(value.name or "", None)


def _remove_unread(node: ir.Node) -> None:
    """A node that turned or dequantized a weight, and those behind it, where nothing reads them."""
    for use in list(node.outputs[0].uses()):
        if use.node.op_type in ("Transpose", "Identity"):
            _remove_unread(use.node)
    if node.graph is not None and not (node.outputs[0].uses() or node.outputs[0].is_graph_output()):
        node.graph.remove(node, safe=True)


def biased(layer: Layer) -> tuple[ir.Node, ir.Value | None]:
    """The node whose output the layer's is, and its bias: a stored vector that an Add behind it adds counts too."""
    last = layer.output.producer()
    assert last is not None
    if layer.bias is not None:
        return last, layer.bias
    adding = sole_use(layer.output)
    if adding is not None and adding.op_type == "Add" and adding.domain == "" and adding.graph is last.graph:
        for product, constant in pairs(adding):
            held = tensor(constant)
            if product is not layer.output or held is None or stored_bias(constant) is None:
                continue
            if tuple(held.shape.numpy()) == (layer.weight.outputs,) and held.dtype == layer.input.dtype:
                return adding, constant
    return last, None
