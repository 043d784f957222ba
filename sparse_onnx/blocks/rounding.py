"""Kernels that round activations to 8 bits, found in a graph by their operators; and the same graph without rounding.

int8        each row by itself: MatMulNBits and QMoE at accuracy level 4, QMoE with 8-bit weights in blocks
int8_batch  one scale for all rows of an operand: DynamicQuantizeMatMul, whose results depend on the batch
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
import onnx_ir as ir

from sparse_onnx.blocks.nbits import DOMAIN, EXACT, ROUNDED
from sparse_onnx.graph.branches import Branch, emit_if, inside
from sparse_onnx.graph.build import Emitter, Namespace
from sparse_onnx.graph.external import read_array

INT8, INT8_BATCH = "int8", "int8_batch"

#: Inputs of QMoE: scales and zero points of its three projections.
_SCALES, _ZERO_POINTS = (3, 6, 9), slice(11, 14)


def rounding(nodes: Iterable[ir.Node]) -> str | None:
    """How the coarsest of the nodes rounds activations; None where none does. Bodies of If, Loop and Scan count."""
    kinds = {_rounds(node) for node in _all(nodes)}
    return next((kind for kind in (INT8_BATCH, INT8) if kind in kinds), None)


def without_rounding(model: ir.Model) -> str | None:
    """Replaces kernels that round activations by ones that do not and multiply by the same stored integers.

    Returns:
        How what is left rounds: QMoE has no other kernel for 8-bit weights in blocks, if a row has several scales.
    """
    names = Namespace(model)
    for node in list(model.graph.all_nodes()):
        if _rounds(node) is None:
            continue
        if node.op_type == "DynamicQuantizeMatMul":
            _dequantize(node, names)
        elif node.op_type == "QMoE" and _integer(node, "expert_weight_bits") == 8:
            _row_by_row(node, names)
        elif _integer(node, "accuracy_level") == ROUNDED:
            node.attributes["accuracy_level"] = ir.AttrInt64("accuracy_level", EXACT)
    return rounding(model.graph)


def _all(nodes: Iterable[ir.Node]) -> Iterator[ir.Node]:
    for node in nodes:
        yield node
        for attribute in node.attributes.values():
            if attribute.is_ref():
                continue
            if attribute.type == ir.AttributeType.GRAPH:
                yield from _all(attribute.as_graph())
            elif attribute.type == ir.AttributeType.GRAPHS:
                for graph in attribute.as_graphs():
                    yield from _all(graph)


def _rounds(node: ir.Node) -> str | None:
    if node.domain != DOMAIN:
        return None
    if node.op_type == "DynamicQuantizeMatMul":
        return INT8_BATCH
    if node.op_type == "MatMulNBits":
        return INT8 if _integer(node, "accuracy_level") == ROUNDED else None
    if node.op_type == "QMoE":
        blocks_of_bytes = _integer(node, "expert_weight_bits") == 8 and _integer(node, "block_size") > 0
        return INT8 if blocks_of_bytes or _integer(node, "accuracy_level") == ROUNDED else None
    return None


def _integer(node: ir.Node, name: str) -> int:
    attribute = node.attributes.get(name)
    return 0 if attribute is None or attribute.is_ref() else attribute.as_int()


def _row_by_row(node: ir.Node, names: Namespace) -> None:
    """One scale a row in place of one a block, which are the same: the operator then takes activations as they are."""
    scales = {at: node.inputs[at] for at in _SCALES if at < len(node.inputs) and node.inputs[at] is not None}
    tensors = {at: value.const_value for at, value in scales.items() if value is not None}
    if any(value is not None for value in node.inputs[_ZERO_POINTS]) or None in tensors.values():
        return
    arrays = {at: read_array(tensor) for at, tensor in tensors.items() if tensor is not None}
    if not all(array.ndim == 3 and (array == array[..., :1]).all() for array in arrays.values()):
        return
    assert isinstance(node.graph, ir.Graph)
    for at, array in arrays.items():
        rows = ir.Tensor(np.ascontiguousarray(array[..., 0]), name=f"{node.name}/scales_{at}")
        node.replace_input_with(at, names.initializer(node.graph, (node, at), rows))
    for name in ("block_size", "accuracy_level"):
        node.attributes.pop(name, None)


def _dequantize(node: ir.Node, names: Namespace) -> None:
    """``If(rows > 0) {rows @ DequantizeLinear(data, scales) + bias} {no rows}`` in place of the integer product: the
    weights of an expert without tokens are not read."""
    rows, *weight = node.inputs[:4]
    bias = node.inputs[4] if len(node.inputs) > 4 else None
    assert isinstance(node.graph, ir.Graph) and weight[0] is not None and weight[0].shape is not None
    width = weight[0].shape[-1]
    assert isinstance(width, int)
    emit = Emitter(node.graph, names, f"{node.name}/exact")
    then = inside(emit, "product")
    given = [value for value in weight if value is not None]
    matrix = then.op("DequantizeLinear", *given, axis=1)
    # With an axis more: of a plain product by a dequantized matrix ORT makes MatMulNBits at accuracy level 4.
    first = emit.ints(0)
    lifted = [then.op("Unsqueeze", value, first) for value in (rows, matrix)]
    result = then.op("Squeeze", then.op("MatMul", *lifted), first)
    if bias is not None:
        result = then.op("Add", result, bias)
    result.type, result.shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape([None, width])
    nothing = emit.constant(np.zeros((0, width), np.float32))
    some = emit.op("Cast", emit.op("Shape", rows, start=0, end=1), to=ir.DataType.BOOL)
    chosen = emit_if(emit, some, Branch(then, [result]), Branch(inside(emit, "nothing"), [nothing]))
    emit.replace(node, chosen[0])
