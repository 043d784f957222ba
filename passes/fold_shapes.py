"""Shapes that are computed from constants and from known sizes become constants.

Exporters write `Shape -> Gather -> Unsqueeze -> Concat -> Reshape` where a constant would do. What is computed by the
operators below from integers and truth values of at most 256 elements, or from sizes in `Shape(x)` that the graph
states, is an initializer afterwards. Of a shape only the sizes that are read need be known: `Gather(Shape(x), 1)` of
`x [T, 64]` is 64.

onnxscript's constant folding is not used: it also takes out branches, without renaming what is in them, evaluates
floating-point arithmetic, and took ten times as long. What ORT folds when it loads a model is left to ORT.

Exact. Enters If, Loop and Scan bodies, not functions. Nodes of blocks that are lowered already stay, and so do nodes
that compute what a graph returns, and divisions by zero. Refused: nothing.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir

from sparse_onnx.blocks.lowered import FORM_KEY
from sparse_onnx.core.passes import Outcome, Pass
from sparse_onnx.graph.build import Emitter, Namespace
from sparse_onnx.graph.external import read_array

_LARGEST = 256
_TYPES = (ir.DataType.INT64, ir.DataType.INT32, ir.DataType.BOOL)

Array = np.ndarray


@dataclasses.dataclass(frozen=True)
class FoldShapes(Pass):
    __doc__ = __doc__
    name: ClassVar[str] = "fold_shapes"
    summary: ClassVar[str] = "shapes that are computed from constants become constants"

    def call(self, model: ir.Model) -> Outcome:
        folding = _Folding(model)
        for graph in model.graphs():
            folding.graph(graph)
        return Outcome(model, folding.folded > 0, folding.folded, folding.folded)


class _Folding:
    """`known` holds what is computed: arrays of Python integers and truth values, None for a size that is not known."""

    def __init__(self, model: ir.Model) -> None:
        self.model = model
        self.names: Namespace | None = None
        self.known: dict[ir.Value, Array | None] = {}
        self.folded = 0

    def graph(self, graph: ir.Graph) -> None:
        for node in graph:
            if node.domain or node.op_type not in _OPERATORS or FORM_KEY in node.metadata_props:
                continue
            output = node.outputs[0]
            array = self._evaluate(node)
            if array is None or array.size > _LARGEST:
                continue
            self.known[output] = array
            if (
                output.is_graph_output()
                or output.dtype not in _TYPES
                or any(item is None for item in array.flat)
            ):
                continue
            self.names = self.names or Namespace(self.model)
            emit = Emitter(graph, self.names, "")
            value = emit.constant(array.astype(output.dtype.numpy()))
            ir.convenience.replace_all_uses_with(output, value)
            graph.remove(node, safe=True)
            self.known[value] = array
            self.folded += 1

    def _evaluate(self, node: ir.Node) -> Array | None:
        if node.op_type in ("Shape", "Size"):
            return _sizes(node)
        arrays = []
        for value in node.inputs:
            array = None if value is None else self._read(value)
            if value is not None and array is None:
                return None
            arrays.append(array)
        operator, whole = _OPERATORS[node.op_type]
        if whole and any(item is None for array in arrays if array is not None for item in array.flat):
            return None
        try:
            result = operator(node, arrays)
            # Scalars of objects come back as what they hold.
            return None if result is None else np.asarray(result, object)
        except (ValueError, IndexError, TypeError, ZeroDivisionError, OverflowError):
            return None  # an operator that fails when it runs, or a form of it that is not known here

    def _read(self, value: ir.Value) -> Array | None:
        if value not in self.known:
            tensor = value.const_value
            known = None
            fixed = value.is_initializer() and not value.is_graph_input()
            if fixed and tensor is not None and tensor.dtype in _TYPES and tensor.size <= _LARGEST:
                known = read_array(tensor).astype(object)
            self.known[value] = known
        return self.known[value]


def _sizes(node: ir.Node) -> Array | None:
    value = node.inputs[0]
    if value is None or value.shape is None:
        return None
    sizes = [size if isinstance(size, int) else None for size in value.shape]
    if node.op_type == "Shape":
        chosen = sizes[_get(node, "start", 0) : _get(node, "end", None)]
        return np.asarray(chosen, object) if chosen else None
    if None in sizes:
        return None
    return np.asarray(int(np.prod([size or 0 for size in sizes], dtype=np.int64)), object)


def _get(node: ir.Node, name: str, default: Any) -> Any:
    attribute = node.attributes.get(name)
    if attribute is not None and attribute.is_ref():
        raise ValueError(name)
    return default if attribute is None else attribute.value


def _ints(array: Array | None) -> list[int]:
    if array is None:
        raise ValueError("not given")
    return [int(item) for item in array.ravel()]


def _unsqueeze(node: ir.Node, inputs: Sequence[Array]) -> Array:
    return np.expand_dims(inputs[0], tuple(_ints(inputs[1])))


def _squeeze(node: ir.Node, inputs: Sequence[Array]) -> Array:
    return np.squeeze(inputs[0], tuple(_ints(inputs[1])) if len(inputs) > 1 else None)


def _gather(node: ir.Node, inputs: Sequence[Array]) -> Array:
    return np.take(inputs[0], inputs[1].astype(np.int64), axis=_get(node, "axis", 0))


def _slice(node: ir.Node, inputs: Sequence[Array]) -> Array:
    data, starts, ends = inputs[0], _ints(inputs[1]), _ints(inputs[2])
    axes = _ints(inputs[3]) if len(inputs) > 3 and inputs[3] is not None else list(range(len(starts)))
    steps = _ints(inputs[4]) if len(inputs) > 4 and inputs[4] is not None else [1] * len(starts)
    places = [slice(None)] * data.ndim
    for axis, start, end, step in zip(axes, starts, ends, steps, strict=True):
        if step < 1:
            raise ValueError("backwards")
        places[axis] = slice(start, end, step)
    return data[tuple(places)]


def _reshape(node: ir.Node, inputs: Sequence[Array]) -> Array:
    shape = _ints(inputs[1])
    if _get(node, "allowzero", 0) or 0 in shape:
        raise ValueError("zero")
    return inputs[0].reshape(shape)


def _cast(node: ir.Node, inputs: Sequence[Array]) -> Array:
    to = ir.DataType(_get(node, "to", 0))
    if to not in _TYPES:
        raise ValueError(to.name)
    if to == ir.DataType.INT64:
        return np.asarray([None if item is None else int(item) for item in inputs[0].flat], object).reshape(
            inputs[0].shape
        )
    if any(item is None for item in inputs[0].flat):
        raise ValueError("not known")
    return _exact(inputs[0], to)


def _exact(array: Array, dtype: ir.DataType) -> Array:
    numbers = array.astype(np.int64)
    if dtype == ir.DataType.INT32 and (np.abs(numbers) >= 2**31).any():
        raise OverflowError
    return numbers.astype(dtype.numpy()).astype(object)


def _of_shape(node: ir.Node, inputs: Sequence[Array]) -> Array:
    (size,) = _ints(inputs[0])  # of a vector: a tensor of zeros is no shape
    value = _get(node, "value", None)
    if value is None or value.dtype not in _TYPES or size > _LARGEST:
        raise ValueError("no integers")
    return np.full([size], value.numpy().reshape(()).item(), object)


def _whole(compute: Callable[..., Any]) -> Callable[[ir.Node, Sequence[Array]], Array]:
    """An elementwise operator on Python's integers, whose results must fit 64 bits."""

    def run(node: ir.Node, inputs: Sequence[Array]) -> Array:
        shape = np.broadcast_shapes(*(array.shape for array in inputs))
        wide = [np.broadcast_to(array, shape).ravel() for array in inputs]
        items = [compute(*row) for row in zip(*wide, strict=True)]
        if any(not -(2**63) <= item < 2**63 for item in items):
            raise OverflowError
        result = _exact(np.asarray(items, object), node.outputs[0].dtype or ir.DataType.INT64)
        return result.reshape(shape)

    return run


def _quotient(a: int, b: int) -> int:
    """C's division, which rounds towards zero."""
    return abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)


def _modulo(node: ir.Node, inputs: Sequence[Array]) -> Array:
    if _get(node, "fmod", 0):
        raise ValueError("fmod")
    return _whole(lambda a, b: a % b)(node, inputs)


#: How to compute each, and whether every element must be known for that.
_OPERATORS: dict[str, tuple[Callable[[ir.Node, Sequence[Any]], Array], bool]] = {
    "Shape": (_unsqueeze, False),
    "Size": (_unsqueeze, False),
    "Unsqueeze": (_unsqueeze, False),
    "Squeeze": (_squeeze, False),
    "Gather": (_gather, False),
    "Slice": (_slice, False),
    "Reshape": (_reshape, False),
    "Concat": (lambda node, inputs: np.concatenate(inputs, axis=_get(node, "axis", 0)), False),
    "Cast": (_cast, False),
    "ConstantOfShape": (_of_shape, True),
    "Add": (_whole(lambda a, b: a + b), True),
    "Sub": (_whole(lambda a, b: a - b), True),
    "Mul": (_whole(lambda a, b: a * b), True),
    "Div": (_whole(_quotient), True),
    "Mod": (_modulo, True),
    "Neg": (_whole(lambda a: -a), True),
    "Equal": (_whole(lambda a, b: a == b), True),
    "Where": (_whole(lambda c, a, b: a if c else b), True),
}
