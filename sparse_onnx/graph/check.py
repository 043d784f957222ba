"""What a model file must not do to us: checks on the protobuf, before anything reads a weight.

Everything here may be chosen by an attacker. A refusal is a `ModelError` of one line, with names made safe
to print.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator
from typing import Any

import onnx
import onnx_ir as ir

from sparse_onnx.core.errors import ModelError
from sparse_onnx.graph.calls import Body, check_calls, function_key
from sparse_onnx.graph.external import DataFile, check_range, locate
from sparse_onnx.graph.text import DAMAGED, has_control_characters, quoted

MAX_DEPTH = 32  # onnx-ir and ORT recurse into subgraphs; real models stay below 5
MAX_RANK = 64  # numpy's

_NUMBER = re.compile(r"[0-9]{1,19}")
_KEYS = ("location", "offset", "length", "checksum", "basepath")
_PREPACKED = "prepacked"


def check_model(proto: onnx.ModelProto, folder: str) -> dict[str, DataFile]:
    """Checks the whole model, and finds its weight files.

    Args:
        proto: with its graph set. Dimensions of -1 in declared shapes, which old exporters write for unknown
            ones, become unknown dimensions; nothing else is changed.
        folder: of the model file.

    Returns:
        Each external location as the model spells it, and its file.

    Raises:
        ModelError: what is wrong, with the name of the tensor, node or file.
    """
    files: dict[str, DataFile] = {}
    checker = _Checker(proto, folder, files)
    checker.check()
    return files


class _Checker:
    def __init__(self, proto: onnx.ModelProto, folder: str, files: dict[str, DataFile]) -> None:
        self.proto, self.folder, self.files = proto, folder, files
        self.functions = {function_key(f.domain, f.name, f.overload): f for f in proto.functions}

    def check(self) -> None:
        proto = self.proto
        for name in (proto.producer_name, proto.producer_version, proto.domain):
            _check_name(name, "producer")
        _check_notes(proto)
        _check_opsets(proto)
        if len(self.functions) < len(self.proto.functions):
            raise ModelError("two functions have the same name", DAMAGED)
        main = self._body("the main graph", [self.proto.graph], ())
        bodies = {}
        for key, function in self.functions.items():
            for name in (*key, *function.input, *function.output, *function.attribute):
                _check_name(name, "function")
            _check_notes(function)
            _check_opsets(function)
            if any(default.HasField("g") or default.graphs for default in function.attribute_proto):
                raise ModelError(f"function {quoted(function.name)} has a graph as default of an attribute")
            _check_distinct([*function.input, *_outputs(function.node)], function.name)
            bodies[key] = self._body(function.name, function.node, function.attribute_proto)
        check_calls(main, bodies)

    def _body(
        self,
        owner: str,
        roots: Iterable[onnx.GraphProto | onnx.NodeProto],
        attributes: Iterable[onnx.AttributeProto],
    ) -> Body:
        body = Body()
        pending: list[tuple[onnx.GraphProto | onnx.NodeProto | onnx.AttributeProto, int]]
        pending = [(root, 0) for root in (*roots, *attributes)]
        while pending:
            item, depth = pending.pop()
            if depth > MAX_DEPTH:
                raise ModelError(f"{quoted(owner)} nests graphs more than {MAX_DEPTH} deep", DAMAGED)
            if isinstance(item, onnx.GraphProto):
                self._graph(item)
                pending.extend((node, depth) for node in item.node)
            elif isinstance(item, onnx.NodeProto):
                self._node(item, body)
                pending.extend((attribute, depth) for attribute in item.attribute)
            else:
                pending.extend((graph, depth + 1) for graph in self._attribute(item))
        return body

    def _graph(self, graph: onnx.GraphProto) -> None:
        _check_name(graph.name, "graph")
        _check_notes(graph)
        if graph.sparse_initializer:
            raise ModelError(
                f"graph {quoted(graph.name)} has sparse initializers, which are not supported",
                "store them as dense initializers",
            )
        for value in (*graph.input, *graph.output, *graph.value_info):
            _check_name(value.name, "value")
            _check_notes(value)
            _check_type(value.type, value.name)
        inputs = [value.name for value in graph.input]
        _check_distinct(inputs, graph.name)
        _check_distinct([tensor.name for tensor in graph.initializer], graph.name)
        own = dict.fromkeys([*inputs, *(tensor.name for tensor in graph.initializer)])
        _check_distinct([*own, *_outputs(graph.node)], graph.name)
        for tensor in graph.initializer:
            self._tensor(tensor)

    def _node(self, node: onnx.NodeProto, body: Body) -> None:
        for name in (node.op_type, node.domain, node.overload, node.name, *node.input, *node.output):
            _check_name(name, "node")
        _check_notes(node)
        body.nodes += 1
        key = function_key(node.domain, node.op_type, node.overload)
        if key in self.functions:
            body.calls[key] = body.calls.get(key, 0) + 1

    def _attribute(self, attribute: onnx.AttributeProto) -> Iterator[onnx.GraphProto]:
        _check_name(attribute.name, "attribute")
        _check_name(attribute.ref_attr_name, "attribute")
        if attribute.HasField("sparse_tensor") or attribute.sparse_tensors:
            raise ModelError(
                f"attribute {quoted(attribute.name)} is a sparse tensor, which is not supported",
                "store it as a dense tensor",
            )
        for kind in (attribute.tp, *attribute.type_protos):
            _check_type(kind, attribute.name)
        if attribute.HasField("t") or (
            attribute.type == onnx.AttributeProto.TENSOR and not attribute.ref_attr_name
        ):
            self._tensor(attribute.t)
        for tensor in attribute.tensors:
            self._tensor(tensor)
        if attribute.HasField("g"):
            yield attribute.g
        yield from attribute.graphs

    def _tensor(self, tensor: onnx.TensorProto) -> None:
        _check_name(tensor.name, "tensor")
        _check_notes(tensor)
        dtype, size = _dtype(tensor), _size(tensor)
        if tensor.data_location != onnx.TensorProto.EXTERNAL:
            _check_inline(tensor, dtype, size)
            return
        if dtype == ir.DataType.STRING:
            raise ModelError(f"string tensor {quoted(tensor.name)} has external data", DAMAGED)
        packed = _packed_ranges(tensor)
        info = _external_info(tensor)
        location = info.get("location", "")
        if location not in self.files:
            self.files[location] = locate(self.folder, location)
        start = _number(tensor, info, "offset", 0)
        needed = _nbytes(size, dtype)
        length = _number(tensor, info, "length", needed)
        if length != needed:
            raise ModelError(
                f"tensor {quoted(tensor.name)} gives {length} bytes of external data, but needs {needed}",
                DAMAGED,
            )
        for first, count in ((start, needed), *packed):
            check_range(tensor.name, first, count, location, self.files[location].size)


def _nbytes(size: int, dtype: ir.DataType) -> int:
    return -(-size * dtype.bitwidth // 8)


def _check_name(name: str | bytes, what: str) -> None:
    # protobuf gives bytes for a string that is not UTF-8
    if isinstance(name, bytes) or has_control_characters(name):
        raise ModelError(f"{what} name {quoted(name)} holds control characters or is not UTF-8", DAMAGED)


def _check_opsets(item: onnx.ModelProto | onnx.FunctionProto) -> None:
    for opset in item.opset_import:
        _check_name(opset.domain, "operator set")


def _check_notes(item: Any) -> None:
    """Documentation and metadata may hold line breaks: they are for files, and not printed."""
    for entry in item.metadata_props:
        _check_name(entry.key, "metadata")
        if isinstance(entry.value, bytes):
            raise ModelError(f"metadata {quoted(entry.key)} is not UTF-8", DAMAGED)
    if isinstance(item.doc_string, bytes):
        raise ModelError(
            f"the documentation of {quoted(getattr(item, 'name', 'the model'))} is not UTF-8", DAMAGED
        )


def _check_distinct(names: Iterable[str], owner: str) -> None:
    seen = set()
    for name in names:
        if name in seen:
            raise ModelError(f"value {quoted(name)} is defined twice in {quoted(owner)}", DAMAGED)
        seen.add(name)


def _outputs(nodes: Iterable[onnx.NodeProto]) -> Iterator[str]:
    return (name for node in nodes for name in node.output if name)


def _check_type(kind: onnx.TypeProto, owner: str) -> None:
    depth = 0
    while (field := kind.WhichOneof("value")) in ("sequence_type", "optional_type") and depth < MAX_DEPTH:
        kind = getattr(kind, field).elem_type
        depth += 1
    if field is None:
        return
    if field not in ("tensor_type", "sparse_tensor_type"):
        raise ModelError(f"{quoted(owner)} has a type that is not supported: {field}")
    for dim in getattr(kind, field).shape.dim:
        _check_name(dim.dim_param, "dimension")
        if dim.dim_value == -1:
            dim.ClearField("dim_value")
        elif dim.dim_value < 0:
            raise ModelError(f"{quoted(owner)} has a negative dimension: {dim.dim_value}", DAMAGED)


def _dtype(tensor: onnx.TensorProto) -> ir.DataType:
    try:
        dtype = ir.DataType(tensor.data_type)
    except ValueError:
        dtype = ir.DataType.UNDEFINED
    if dtype == ir.DataType.UNDEFINED:
        raise ModelError(f"tensor {quoted(tensor.name)} has no known type: {tensor.data_type}", DAMAGED)
    return dtype


def _size(tensor: onnx.TensorProto) -> int:
    if len(tensor.dims) > MAX_RANK:
        raise ModelError(f"tensor {quoted(tensor.name)} has {len(tensor.dims)} dimensions", DAMAGED)
    if any(dim < 0 for dim in tensor.dims):
        raise ModelError(
            f"tensor {quoted(tensor.name)} has a negative dimension: {list(tensor.dims)}", DAMAGED
        )
    return math.prod(tensor.dims)


def _packed_ranges(tensor: onnx.TensorProto) -> list[tuple[int, int]]:
    """First byte and length of each piece that ORT packed of the tensor, from entries `KEY|first;length;checksum|...`.

    As ORT does, passes over what has another form. It takes the file for good up to version 1.31.
    """
    ranges: list[tuple[int, int]] = []
    for entry in tensor.external_data:
        if isinstance(entry.key, str) and entry.key.startswith(_PREPACKED) and isinstance(entry.value, str):
            for piece in entry.value.split("|")[1:]:
                first, *rest = piece.split(";")
                if len(rest) == 2:
                    numbers = {"offset": first, "length": rest[0]}
                    ranges.append(
                        (_number(tensor, numbers, "offset", 0), _number(tensor, numbers, "length", 0))
                    )
    return ranges


def _external_info(tensor: onnx.TensorProto) -> dict[str, str]:
    info: dict[str, str] = {}
    for entry in tensor.external_data:
        if isinstance(entry.key, str) and entry.key.startswith(_PREPACKED):
            continue  # checked by `_packed_ranges`; our sessions of models in memory pack for themselves
        if entry.key not in _KEYS or entry.key in info or not isinstance(entry.value, str):
            raise ModelError(
                f"tensor {quoted(tensor.name)} has a strange external data key {quoted(entry.key)}",
                DAMAGED,
            )
        info[entry.key] = entry.value
    # Only what was checked goes on to onnx-ir.
    del tensor.external_data[:]
    for key in ("location", "offset", "length"):
        if key in info:
            tensor.external_data.add(key=key, value=info[key])
    return info


def _number(tensor: onnx.TensorProto, info: dict[str, str], key: str, default: int) -> int:
    text = info.get(key)
    if text is None:
        return default
    if not _NUMBER.fullmatch(text):
        raise ModelError(
            f"tensor {quoted(tensor.name)}: external data {key} {quoted(text)} is no size", DAMAGED
        )
    return int(text)


def _check_inline(tensor: onnx.TensorProto, dtype: ir.DataType, size: int) -> None:
    """Refuses a tensor that claims more than it carries: reading it would allocate what it claims."""
    if dtype == ir.DataType.STRING:
        held, needed = len(tensor.string_data), size
    elif tensor.HasField("raw_data"):
        held, needed = len(tensor.raw_data), _nbytes(size, dtype)
    else:
        held = max(
            len(field)
            for field in (
                tensor.float_data,
                tensor.int32_data,
                tensor.int64_data,
                tensor.double_data,
                tensor.uint64_data,
            )
        )
        needed = size
        if dtype in (ir.DataType.COMPLEX64, ir.DataType.COMPLEX128):
            needed = 2 * size
        elif dtype.bitwidth in (2, 4):  # packed, one byte an element of int32_data
            needed = _nbytes(size, dtype)
    if held != needed:
        raise ModelError(
            f"tensor {quoted(tensor.name)} of shape {list(tensor.dims)} carries {held} of {needed} values",
            DAMAGED,
        )
