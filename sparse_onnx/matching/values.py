"""Values by producer, use and constant content. Nothing here looks at a name."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import onnx_ir as ir

from sparse_onnx.graph.external import read_array

#: Types between which a Cast only rounds, by less than half precision does. Of eight bits is another function.
_FLOATS = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.DOUBLE)
#: Elements of the largest constant that `constant` reads.
_SMALL = 4096


def producer(value: ir.Value | None, *op_types: str, domain: str = "") -> ir.Node | None:
    """The node that computes the value, if it is one of these operators (any, where none is named)."""
    node = None if value is None else value.producer()
    if node is None or node.domain != domain or node.overload:
        return None
    return node if not op_types or node.op_type in op_types else None


def tensor(value: ir.Value | None) -> ir.TensorProtocol | None:
    """The tensor of an initializer that no caller can override, or of a Constant node."""
    if value is None or value.is_graph_input():
        return None
    if value.const_value is not None and value.is_initializer():
        return value.const_value
    return ir.convenience.get_const_tensor(value) if producer(value, "Constant") is not None else None


def constant(value: ir.Value | None) -> np.ndarray | None:
    """A constant of at most 4096 elements as an array; None for anything else."""
    found = tensor(value)
    if found is None or found.size > _SMALL or found.dtype == ir.DataType.STRING:
        return None
    return read_array(found)


def is_float(dtype: ir.DataType | int | None) -> bool:
    """Whether numbers may be cast to and from the type and stay what they are, but for rounding."""
    return dtype in _FLOATS


def scalar(value: ir.Value | None) -> Any:
    """The one element of a constant of any rank, as a Python number; None for anything else."""
    array = constant(value)
    return array.reshape(()).item() if array is not None and array.size == 1 else None


def ints(value: ir.Value | None) -> list[int] | None:
    """A constant of integers, flattened."""
    array = constant(value)
    if array is None or array.dtype.kind not in "iu":
        return None
    return [int(item) for item in array.ravel()]


def attribute(node: ir.Node, name: str, default: Any = None) -> Any:
    """The value of an attribute, or `default` where the node has none."""
    found = node.attributes.get(name)
    return default if found is None or found.is_ref() else found.value


def rank(value: ir.Value | None) -> int | None:
    return None if value is None or value.shape is None else len(value.shape)


def size(value: ir.Value | None, axis: int) -> int | None:
    """The static size of an axis (negative counts from the end); None where it is not known."""
    if value is None or value.shape is None or not -len(value.shape) <= axis < len(value.shape):
        return None
    found = value.shape[axis]
    return found if isinstance(found, int) else None


def axis(node: ir.Node, default: int = 0, of: int = 0) -> int | None:
    """The node's attribute `axis` counted from the front, by the rank of its input `of`; None where unknown."""
    found = attribute(node, "axis", default)
    if found >= 0:
        return found
    dimensions = rank(node.inputs[of])
    return None if dimensions is None else found + dimensions


def is_last(node: ir.Node, default: int = -1, of: int = 0) -> bool:
    """Whether the node's `axis` is the last of its input `of`."""
    found = attribute(node, "axis", default)
    dimensions = rank(node.inputs[of])
    return found == -1 or (dimensions is not None and found == dimensions - 1)


def axes(node: ir.Node) -> list[int] | None:
    """`axes` of a reduction, Squeeze or Unsqueeze, as an input or as an attribute, as written; None where unknown."""
    if len(node.inputs) > 1 and node.inputs[1] is not None:
        return ints(node.inputs[1])
    found = attribute(node, "axes")
    return None if found is None else list(found)


def measured(shape: ir.Value | None) -> ir.Value | None:
    """The value whose Shape, of all axes, this is."""
    node = producer(shape, "Shape")
    whole = node is not None and not attribute(node, "start", 0) and attribute(node, "end") is None
    return node.inputs[0] if node is not None and whole else None


def pairs(node: ir.Node) -> Iterator[tuple[ir.Value, ir.Value]]:
    """Both orders of the inputs of a commutative operator with two."""
    if len(node.inputs) == 2:
        a, b = node.inputs
        if a is not None and b is not None:
            yield a, b
            yield b, a


def sole_use(value: ir.Value) -> ir.Node | None:
    """The only node that reads the value, where there is just one use and it is no output of the graph."""
    uses = list(value.uses())
    return uses[0].node if len(uses) == 1 and not value.is_graph_output() else None
