"""Types and shapes of a model's values by onnx's inference, at any size of weights and in linear time.

onnx-ir's `ShapeInferencePass` looks through a list of all inputs for every initializer, and so is quadratic in them.
"""

from __future__ import annotations

import logging
from collections import ChainMap
from collections.abc import Iterator, Mapping
from itertools import chain

import onnx
import onnx_ir as ir

from sparse_onnx.graph.contrib import contrib_schemas
from sparse_onnx.graph.valid import without_weights

_log = logging.getLogger(__name__)
#: Outputs that are int64 whatever is known of the inputs. onnx says nothing of them where an input has no type.
_INTEGERS = {"TopK": (1,), "Unique": (1, 2, 3)}


def infer(model: ir.Model) -> int:
    """Fills in the types and shapes that can be inferred, also in subgraphs. Weights are not read.

    Returns:
        Of how many values the type or the shape changed. 0 where inference fails as a whole.
    """
    for graph in model.graphs():
        for value in graph.initializers.values():
            if value.const_value is not None:
                value.shape = value.shape or ir.Shape(value.const_value.shape.numpy())
                value.dtype = value.dtype or value.const_value.dtype
        for node in graph:
            for at in _INTEGERS.get(node.op_type, ()) if node.domain == "" else ():
                if at < len(node.outputs) and node.outputs[at].type is None:
                    node.outputs[at].dtype = ir.DataType.INT64
    proto = without_weights(model)
    _forget_defaults(proto.graph)
    for body in _bodies(proto.graph):
        _lend(body, {tensor.name: tensor for tensor in proto.graph.initializer})
    try:
        with contrib_schemas():
            proto = onnx.shape_inference.infer_shapes(
                proto, check_type=False, strict_mode=False, data_prop=True
            )
    except Exception as error:  # what onnx makes of graphs that it does not know
        _log.warning("no types and shapes could be inferred: %s", error)
        return 0
    return _merge(model.graph, proto.graph)


def _forget_defaults(graph: onnx.GraphProto) -> None:
    """Takes out the values of initializers that a caller may override: no shape may be inferred from them."""
    given = {value.name for value in graph.input}
    fixed = [tensor for tensor in graph.initializer if tensor.name not in given]
    if len(fixed) < len(graph.initializer):
        del graph.initializer[:]
        graph.initializer.extend(fixed)


def _bodies(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    """The bodies of a graph's nodes."""
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                yield attribute.g
            else:
                yield from attribute.graphs


def _lend(body: onnx.GraphProto, outer: Mapping[str, onnx.TensorProto]) -> set[str]:
    """Gives a body copies of the constants of outer graphs that it or a body in it reads: inference knows the types of
    outer values, not what is in them.

    Args:
        body: of a copy of the model, made for inference alone.
        outer: by name, as the body sees them.

    Returns:
        The names of outer graphs that it reads.
    """
    own = {tensor.name: tensor for tensor in body.initializer}
    read = {name for node in body.node for name in node.input}
    for inner in _bodies(body):
        read |= _lend(inner, ChainMap(own, outer) if own else outer)  # type: ignore[arg-type]
    read -= own.keys() | {value.name for value in body.input}
    read -= {name for node in body.node for name in node.output}
    body.initializer.extend(outer[name] for name in sorted(read) if name in outer)
    return read


def _merge(graph: ir.Graph, proto: onnx.GraphProto) -> int:
    known = {info.name: info.type for info in chain(proto.value_info, proto.output)}
    changed = 0
    for node, inferred in zip(graph, proto.node, strict=True):
        for value in node.outputs:
            found = known.get(value.name or "")
            if found is not None and found.HasField("tensor_type"):
                changed += _take(value, found.tensor_type)
        inner = [attribute for attribute in node.attributes.values() if not attribute.is_ref()]
        if any(attribute.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS) for attribute in inner):
            bodies = {attribute.name: attribute for attribute in inferred.attribute}
            for attribute in inner:
                if attribute.type == ir.AttributeType.GRAPH:
                    changed += _merge(attribute.as_graph(), bodies[attribute.name].g)
                elif attribute.type == ir.AttributeType.GRAPHS:
                    for body, found_body in zip(
                        attribute.as_graphs(), bodies[attribute.name].graphs, strict=True
                    ):
                        changed += _merge(body, found_body)
    return changed


def _take(value: ir.Value, found: onnx.TypeProto.Tensor) -> bool:
    changed = False
    if found.elem_type and value.dtype != found.elem_type:
        value.dtype = ir.DataType(found.elem_type)
        changed = True
    if found.HasField("shape"):
        dims = [_dim(dim) for dim in found.shape.dim]
        if value.shape is None or list(value.shape) != dims:
            value.shape = ir.Shape(dims)
            changed = True
    return changed


def _dim(dim: onnx.TensorShapeProto.Dimension) -> int | str | None:
    kind = dim.WhichOneof("value")
    return dim.dim_value if kind == "dim_value" else dim.dim_param if kind == "dim_param" else None
