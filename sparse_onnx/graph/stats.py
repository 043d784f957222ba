"""What a model is made of: nodes, bytes of weights, and a fingerprint that is quick at any size."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from typing import Any

import numpy as np
import onnx_ir as ir

from sparse_onnx.core.collector import paused
from sparse_onnx.core.report import ModelRecord
from sparse_onnx.graph.external import opened
from sparse_onnx.graph.slots import all_graphs, tensor_slots
from sparse_onnx.graph.stacked import Stacked, stored

# Weight bytes that a fingerprint reads: of each tensor, and of all of them together.
_SAMPLE = 4096
_TOTAL_SAMPLE = 32 * 1024 * 1024
_SPANS = 8


def record(model: ir.Model, path: str | os.PathLike[str]) -> ModelRecord:
    """The report's description of a model on disk."""
    with paused():
        return ModelRecord(os.fspath(path), node_count(model), weight_bytes(model), fingerprint(model))


def node_count(model: ir.Model) -> int:
    """Nodes of the main graph and all its subgraphs; bodies of functions not."""
    return sum(1 for _ in model.graph.all_nodes())


def weight_bytes(model: ir.Model) -> int:
    """Bytes of the initializers of all graphs. What some of them share in a file or in memory counts once."""
    spans: dict[Any, list[tuple[int, int]]] = {}
    for graph in all_graphs(model):
        for value in graph.initializers.values():
            if value.const_value is not None:
                for tensor in stored(value.const_value):
                    owner, start, length = _span(tensor)
                    spans.setdefault(owner, []).append((start, start + length))
    return sum(_covered(ranges) for ranges in spans.values())


def _span(tensor: ir.TensorProtocol) -> tuple[Any, int, int]:
    """Where the bytes of a tensor are: a file or the memory, the first byte in it, how many."""
    if tensor.dtype == ir.DataType.STRING:
        return id(tensor), 0, sum(len(text) for text in tensor.numpy().flat)
    if isinstance(tensor, ir.ExternalTensor):
        return tensor.path, tensor.offset or 0, tensor.nbytes
    if isinstance(tensor, ir.Tensor) and isinstance(tensor.raw, np.ndarray):
        array = tensor.raw
        if array.flags.c_contiguous and array.nbytes == tensor.nbytes:
            return "memory", array.__array_interface__["data"][0], array.nbytes
    return id(tensor), 0, tensor.nbytes


def _covered(ranges: Iterable[tuple[int, int]]) -> int:
    total = end = 0
    for start, stop in sorted(ranges):
        total += max(0, stop - max(start, end))
        end = max(end, stop)
    return total


def fingerprint(model: ir.Model) -> str:
    """16 hex digits of a hash over the structure and samples of the weights.

    It depends on operators, attributes, the names and types of inputs, outputs and values, and at most 4 KiB
    of each tensor, 32 MiB in all; not on where weights are stored, node names, documentation or other
    metadata. A change of few weights in a large tensor can go unnoticed: this recognises a model, it does not
    prove that it is untouched.

    Raises:
        ModelError: a weight file is gone.
    """
    budget = min(_SAMPLE, max(_SPANS * 8, _TOTAL_SAMPLE // max(1, len(tensor_slots(model)))))
    hasher = _Hasher(budget)
    hasher.add("opsets", sorted(model.opset_imports.items()))
    hasher.add_body(model.graph)
    for key in sorted(model.functions):
        function = model.functions[key]
        hasher.add("function", key, sorted(function.opset_imports.items()))
        hasher.add_attributes(function.attributes.values())
        hasher.add_body(function)
    return hasher.digest.hexdigest()[:16]


class _Hasher:
    def __init__(self, budget: int) -> None:
        self.budget = budget
        self.digest = hashlib.sha256()

    def add(self, *facts: object) -> None:
        self.digest.update(repr(facts).encode("utf-8", "surrogatepass"))

    def add_body(self, body: ir.Graph | ir.Function) -> None:
        self.add("inputs", [_signature(value) for value in body.inputs])
        self.add("outputs", [_signature(value) for value in body.outputs])
        if isinstance(body, ir.Graph):
            for name, value in sorted(body.initializers.items()):
                self.add("initializer", name)
                if value.const_value is not None:
                    self.add_tensor(value.const_value)
        for node in body:
            self.add("node", node.domain, node.op_type, node.overload)
            self.add([value and value.name for value in node.inputs], [value.name for value in node.outputs])
            self.add_attributes(node.attributes.values())

    def add_attributes(self, attributes: Iterable[ir.Attr]) -> None:
        for attribute in sorted(attributes, key=lambda attribute: attribute.name):
            self.add("attribute", attribute.name, attribute.type.name, attribute.ref_attr_name)
            value = attribute.value
            if attribute.type in (ir.AttributeType.TENSOR, ir.AttributeType.TENSORS) and value is not None:
                for tensor in value if attribute.type == ir.AttributeType.TENSORS else (value,):
                    self.add_tensor(tensor)
            elif attribute.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS) and value is not None:
                for graph in value if attribute.type == ir.AttributeType.GRAPHS else (value,):
                    self.add_body(graph)
            else:
                self.add(value)

    def add_tensor(self, tensor: ir.TensorProtocol) -> None:
        self.add("tensor", tensor.dtype.name, list(tensor.shape.numpy()))
        if tensor.dtype == ir.DataType.STRING:
            self.add(list(tensor.numpy().flat))
            return
        for chunk in _sample(tensor, self.budget):
            self.digest.update(chunk)


def _signature(value: ir.Value) -> tuple[str | None, str, list[int | str | None] | None]:
    shape = value.shape
    dims = None if shape is None else [dim if isinstance(dim, int) else dim.value for dim in shape]
    return value.name, str(value.type), dims


def _sample(tensor: ir.TensorProtocol, budget: int) -> list[bytes]:
    """Bytes of the tensor: all of them, or some spans evenly from its first to its last."""
    nbytes = tensor.nbytes
    if nbytes <= budget:
        spans = [(0, nbytes)]
    else:
        size = budget // _SPANS
        spans = [((nbytes - size) * index // (_SPANS - 1), size) for index in range(_SPANS)]
    return _read(tensor, spans) if nbytes else []


def _read(tensor: ir.TensorProtocol, spans: list[tuple[int, int]]) -> list[bytes]:
    """Bytes of the tensor: so many from each of these starts."""
    if isinstance(tensor, Stacked):
        each, chunks = tensor.parts[0].nbytes, []
        for start, size in spans:
            end = start + size
            while start < end:
                index, inside = divmod(start, each)
                length = min(end - start, each - inside)
                chunks += _read(tensor.parts[index], [(inside, length)])
                start += length
        return chunks
    if isinstance(tensor, ir.ExternalTensor):
        first = tensor.offset or 0
        with opened(tensor) as file:
            return [os.pread(file, size, first + start) for start, size in spans]
    if tensor.dtype.bitwidth < 8:
        content: Any = tensor.tobytes()
    else:
        content = np.ascontiguousarray(tensor.numpy()).reshape(-1).view(np.uint8)
    return [bytes(content[start : start + size]) for start, size in spans]
