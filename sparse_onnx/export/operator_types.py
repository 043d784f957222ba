"""Operators that ONNX does not define for float16 or bfloat16, in float32 with casts around them.

    y = TopK(x)   of bfloat16, before opset 24:   y = Cast(TopK(Cast(x, float32)), bfloat16)

torch's exporter writes such nodes as they are, and onnx's checker lets them pass; onnxruntime refuses the file. Of
operators of bfloat16 those are at opset 20 TopK, Cos, Sin, Softplus, Conv, Einsum and dozens of others. Torch computes
them in float32 and rounds the result, or only moves values: the answer is its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import onnx
import onnx_ir as ir

from sparse_onnx.core.errors import ImpossibleError
from sparse_onnx.export.twin import HALF
from sparse_onnx.graph.build import Emitter, Namespace
from sparse_onnx.graph.infer import infer

_FLOAT = "tensor(float)"
#: Lists of tensors; ONNX has none of bfloat16.
_LISTS = frozenset(
    {
        "ConcatFromSequence",
        "SequenceAt",
        "SequenceConstruct",
        "SequenceEmpty",
        "SequenceErase",
        "SequenceInsert",
    }
    | {"SequenceMap", "SplitToSequence"}
)


def cast_where_undefined(model: ir.Model) -> int:
    """Rewrites them in place, in If, Loop and Scan bodies too; how many there were.

    Raises:
        ImpossibleError: the graph holds lists of bfloat16.
    """
    infer(model)
    version, names, found = model.opset_imports[""], Namespace(model), 0
    for node in list(model.graph.all_nodes()):
        _refuse_lists(node)
        kinds = _undefined(node, version)
        if kinds:
            _rewrite(node, kinds, names, version)
            found += 1
    return found


def _refuse_lists(node: ir.Node) -> None:
    if node.domain not in ("", "ai.onnx") or node.op_type not in _LISTS:
        return
    dtype = node.attributes.get("dtype")
    narrow = dtype is not None and dtype.as_int() == ir.DataType.BFLOAT16
    if narrow or any(
        value is not None and value.dtype == ir.DataType.BFLOAT16 for value in (*node.inputs, *node.outputs)
    ):
        raise ImpossibleError(
            f"the graph holds a list of bfloat16 tensors ({node.op_type}), and ONNX defines none",
            "export with --dtype float16 or float32",
        )


def _undefined(node: ir.Node, version: int) -> dict[str, ir.DataType]:
    """Type variables of the operator that stand for a type which it is not defined for -> that type."""
    if node.domain not in ("", "ai.onnx") or any(
        attribute.type == ir.AttributeType.GRAPH for attribute in node.attributes.values()
    ):
        return {}
    schema = _schema(node, version)
    if schema is None:
        return {}
    return {
        formal.type_str: value.dtype
        for formal, value in _paired(schema.inputs, node.inputs)
        if value is not None
        and value.dtype in HALF
        and _FLOAT in formal.types
        and f"tensor({value.dtype.name.lower()})" not in formal.types
    }


def _schema(node: ir.Node, version: int) -> onnx.defs.OpSchema | None:
    try:
        return onnx.defs.get_schema(node.op_type, version, "")
    except onnx.defs.SchemaError:
        return None


def _paired(
    formals: Sequence[onnx.defs.OpSchema.FormalParameter], values: Sequence[ir.Value | None]
) -> Iterator[tuple[onnx.defs.OpSchema.FormalParameter, ir.Value | None]]:
    """The last formal parameter may stand for several values."""
    for at, value in enumerate(values):
        yield formals[min(at, len(formals) - 1)], value


def _rewrite(node: ir.Node, kinds: dict[str, ir.DataType], names: Namespace, version: int) -> None:
    schema = _schema(node, version)
    assert schema is not None and isinstance(node.graph, ir.Graph)
    emit = Emitter(node.graph, names, node.name or node.op_type, node.metadata_props)
    inputs = [
        emit.op("Cast", value, to=ir.DataType.FLOAT)
        if value is not None and formal.type_str in kinds and value.dtype in HALF
        else value
        for formal, value in _paired(schema.inputs, node.inputs)
    ]
    attributes: dict[str, Any] = dict(node.attributes)
    wide = emit.ops(node.op_type, inputs, len(node.outputs), **attributes)
    outputs = []
    for (formal, old), value in zip(_paired(schema.outputs, node.outputs), wide, strict=True):
        assert old is not None
        value.shape, value.type = old.shape, old.type
        if formal.type_str in kinds:
            value.dtype = ir.DataType.FLOAT
            value = emit.op("Cast", value, to=kinds[formal.type_str])
            value.shape, value.dtype = old.shape, kinds[formal.type_str]
        outputs.append(value)
    node.graph.insert_before(node, emit.nodes)
    named = [value.name for value in node.outputs]
    ir.convenience.replace_all_uses_with(node.outputs, outputs, replace_graph_outputs=True)
    old_values = list(node.outputs)
    node.graph.remove(node, safe=True)
    for old, value, name in zip(old_values, outputs, named, strict=True):
        old.name, value.name = None, name
