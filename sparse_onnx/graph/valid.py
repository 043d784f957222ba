"""Whether a model in memory is valid ONNX, by onnx's own checker, without reading its external weights."""

from __future__ import annotations

from collections.abc import Iterator

import onnx
import onnx_ir as ir


def invalid(model: ir.Model) -> str:
    """What the checker finds first, one line; empty for a valid model.

    The checker opens external data relative to the working directory, so external initializers stand in for it as
    graph inputs of their type and shape. Files are checked where models are loaded.
    """
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
        del graph.initializer[:]
        graph.initializer.extend(inline)
    try:
        onnx.checker.check_model(proto)
    except onnx.checker.ValidationError as error:
        return str(error).strip().splitlines()[0]
    return ""


def _graphs(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            for inner in (attribute.g, *attribute.graphs):
                if inner.node or inner.output:
                    yield from _graphs(inner)
