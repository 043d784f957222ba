"""Whether a model in memory is valid ONNX, by onnx's own checker, without reading its external weights."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import onnx
import onnx_ir as ir

from sparse_onnx.core.collector import paused
from sparse_onnx.graph.external import moved
from sparse_onnx.graph.slots import tensor_slots

#: Bytes up to which a tensor may hold a shape or axes, which operators need to know.
_SMALL = 1024
_ELSEWHERE = "elsewhere"


def invalid(model: ir.Model) -> str:
    """What the checker finds first, one line; empty for a valid model.

    The checker opens external data relative to the working directory, so external initializers stand in for it as
    graph inputs of their type and shape. Files are checked where models are loaded.
    """
    try:
        with paused():
            onnx.checker.check_model(without_weights(model, only_external=True))
    except onnx.checker.ValidationError as error:
        return str(error).strip().splitlines()[0]
    return ""


def without_weights(model: ir.Model, only_external: bool = False) -> onnx.ModelProto:
    """The model with graph inputs of the same type and shape in place of its large initializers.

    Args:
        model: unchanged.
        only_external: whether large ones that are in memory stay. Lazy ones never do.
    """
    with contextlib.ExitStack() as undo:
        for slot in tensor_slots(model):
            tensor = slot.tensor
            large = slot.is_initializer and tensor.dtype != ir.DataType.STRING and tensor.nbytes > _SMALL
            if large and (isinstance(tensor, ir.LazyTensor) or not only_external):
                undo.callback(slot.replace(moved(tensor, _ELSEWHERE, 0)))
        proto = ir.to_proto(model)
    inputs = {value.name for value in proto.graph.input}
    for graph in _graphs(proto.graph):
        inline = []
        for tensor in graph.initializer:
            if tensor.data_location != onnx.TensorProto.EXTERNAL:
                inline.append(tensor)
            elif tensor.name not in inputs:
                value = proto.graph.input.add(name=tensor.name)
                value.type.tensor_type.elem_type = tensor.data_type
                value.type.tensor_type.shape.dim.extend(
                    onnx.TensorShapeProto.Dimension(dim_value=size) for size in tensor.dims
                )
                inputs.add(tensor.name)
        del graph.initializer[:]
        graph.initializer.extend(inline)
    return proto


def _graphs(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            for inner in (attribute.g, *attribute.graphs):
                if inner.node or inner.output:
                    yield from _graphs(inner)
