"""The float32 twin of a half-precision graph: the same nodes, every half-precision weight and constant
widened.

ORT has no bfloat16 arithmetic on CPU and rounds float16 at every cast, and near-tied routers flip under such
rounding. The twin is compared with the module in float32, where neither blurs the picture.
"""

from __future__ import annotations

from collections.abc import Iterator

import ml_dtypes
import numpy as np
import onnx_ir as ir

from sparse_onnx.graph.external import FirstAxis, read_array, slice_first_axis
from sparse_onnx.graph.slots import all_graphs, tensor_slots

HALF = frozenset({ir.DataType.FLOAT16, ir.DataType.BFLOAT16})
#: Attributes that name an element type.
_TYPE_ATTRIBUTES = ("to", "dtype", "output_dtype")


def widen(model: ir.Model, *, limits: bool = True) -> None:
    """Makes the model compute in float32, in place. Weights are widened when they are read.

    Args:
        limits: the lowest and the largest number of its type, with which masks are filled, become those of float32, as
            they are in the module in float32. What is added to float32's lowest number is lost in rounding, and so it
            is with float16's in float16; in float32 it is not.
    """
    slots = tensor_slots(model)
    kinds = {slot.tensor.dtype for slot in slots} & HALF
    for slot in slots:
        limit = _limit(slot.tensor, kinds) if limits else None
        if limit is not None:
            slot.replace(ir.Tensor(np.full(slot.tensor.shape.numpy(), limit), name=slot.tensor.name))
        elif slot.tensor.dtype in HALF:
            slot.replace(Widened(slot.tensor))
    for node in _nodes(model):
        for name in _TYPE_ATTRIBUTES:
            attribute = node.attributes.get(name)
            if attribute is None or attribute.is_ref() or attribute.type != ir.AttributeType.INT:
                continue
            if attribute.as_int() in HALF:
                node.attributes[name] = ir.AttrInt64(name, int(ir.DataType.FLOAT))
    for value in _values(model):
        if value.dtype in HALF:
            value.dtype = ir.DataType.FLOAT


def _limit(tensor: ir.TensorProtocol, kinds: set[ir.DataType]) -> np.float32 | None:
    """Float32's limit for that of a half-precision type, which may be written as float32."""
    if tensor.size != 1 or tensor.dtype not in (*HALF, ir.DataType.FLOAT):
        return None
    value, largest = float(read_array(tensor).item()), np.finfo(np.float32).max
    found = abs(value) in {float(ml_dtypes.finfo(kind.numpy()).max) for kind in kinds}
    return np.float32(np.copysign(largest, value)) if found else None


class Widened(FirstAxis):
    """A half-precision tensor as float32, converted when it is read."""

    def __init__(self, source: ir.TensorProtocol) -> None:
        super().__init__(
            self._whole, ir.DataType.FLOAT, ir.Shape(source.shape.numpy()), name=source.name or ""
        )
        self.source = source

    def part(self, index: int, name: str) -> ir.TensorProtocol:
        return Widened(slice_first_axis(self.source, index, name))

    def _whole(self) -> ir.Tensor:
        return ir.Tensor(read_array(self.source).astype(np.float32), name=self.name)


def _nodes(model: ir.Model) -> Iterator[ir.Node]:
    yield from model.graph.all_nodes()
    for function in model.functions.values():
        yield from function.all_nodes()


def _values(model: ir.Model) -> Iterator[ir.Value]:
    for graph in all_graphs(model):
        yield from graph.inputs
        yield from graph.initializers.values()
    for node in _nodes(model):
        yield from node.outputs
