"""Sizes that Python computes with floats, such as `int(1.1 * tokens / experts)`: in double precision, as Python does.

torch translates them in single precision, where 1.1 * 10 is 11 and not 11.000000000000002, and rounds to another
capacity.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxscript
import torch

from sparse_onnx.core.errors import ImpossibleError

_op: Any = onnxscript.opset18
_MOST = 2**63 - 1
_FLOATS = (ir.DataType.FLOAT, ir.DataType.DOUBLE)
_INTEGERS: dict[Any, str] = {operator.mul: "Mul", operator.add: "Add", operator.sub: "Sub"}
_COMPARED: dict[Any, str] = {
    operator.lt: "Less",
    operator.le: "LessOrEqual",
    operator.gt: "Greater",
    operator.ge: "GreaterOrEqual",
    operator.eq: "Equal",
}
#: What keeps the type of its inputs.
_KEEPING = frozenset({"Mul", "Add", "Sub", "Div", "Ceil", "Floor", "Round", "Max", "Min", "Neg", "Identity"})

#: What takes tensors of one type.
_MEETING = _KEEPING | {"Pow", "Mod", "Where", "Equal", "Less", "LessOrEqual", "Greater", "GreaterOrEqual"}
_TENSORS = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16)


def _is_float(value: Any) -> bool:
    return value.dtype in _FLOATS if isinstance(value, ir.Value) else isinstance(value, float)


def _double(value: Any) -> Any:
    if isinstance(value, ir.Value):
        return _op.Cast(value, to=ir.DataType.DOUBLE)
    return _op.Constant(value=ir.tensor(np.array(value, np.float64)))


def _integer(value: Any) -> Any:
    if isinstance(value, ir.Value):
        return value
    return _op.Constant(value=ir.tensor(np.array(value, np.int64)))


def _arithmetic(name: str) -> Callable[[Any, Any], Any]:
    def translate(left: Any, right: Any) -> Any:
        convert = _double if _is_float(left) or _is_float(right) else _integer
        return getattr(_op, name)(convert(left), convert(right))

    return translate


def _comparison(name: str) -> Callable[[Any, Any], Any]:
    """torch asserts that sizes are below its own infinity, 2**63 and more, which no int64 holds; nor does any size
    come near."""
    plain = _arithmetic(name)

    def bounded(value: Any) -> Any:
        return max(-_MOST, min(_MOST, value)) if isinstance(value, int) else value

    return lambda left, right: plain(bounded(left), bounded(right))


def _quotient(left: Any, right: Any) -> Any:
    return _op.Div(_double(left), _double(right))


def _differs(left: Any, right: Any) -> Any:
    return _op.Not(_comparison("Equal")(left, right))


def _negative(value: Any) -> Any:
    return _op.Neg(value if isinstance(value, ir.Value) else _double(value))


def _rounded(name: str) -> Callable[[Any], Any]:
    def translate(value: Any) -> Any:
        if not _is_float(value):
            return _integer(value)
        wide = _double(value)
        return _op.Cast(getattr(_op, name)(wide) if name else wide, to=ir.DataType.INT64)

    return translate


def _round(value: Any, digits: Any = None) -> Any:
    if digits is not None:
        raise ImpossibleError("a size is rounded to digits", "round it to an integer")
    return _rounded("Round")(value)


#: Translations by Python function.
TABLE: dict[Any, Callable[..., Any]] = {
    **{function: _arithmetic(name) for function, name in _INTEGERS.items()},
    **{function: _comparison(name) for function, name in _COMPARED.items()},
    torch.sym_max: _arithmetic("Max"),
    torch.sym_min: _arithmetic("Min"),
    operator.ne: _differs,
    operator.neg: _negative,
    operator.truediv: _quotient,
    math.trunc: _rounded(""),
    math.ceil: _rounded("Ceil"),
    math.floor: _rounded("Floor"),
    round: _round,
    torch.sym_float: _double,
}


def refuse_others(module: torch.nn.Module, *, rewritten: bool) -> None:
    """What is not in the table would be computed in single precision. And torch takes `tokens // 1.1` for
    `floor(tokens / 1.1)`, which is 10 and not 9 for 11 tokens: in a trace of code that was not rewritten, one
    may be the other.

    Raises:
        ImpossibleError: a program computes a float size by another function.
    """
    for each in module.modules():
        for node in each.graph.nodes if isinstance(each, torch.fx.GraphModule) else ():
            values = [node.meta.get("val"), *(source.meta.get("val") for source in node.all_input_nodes)]
            ours = (
                node.op != "call_function"
                or isinstance(node.target, torch._ops.OpOverload)
                or node.target in TABLE
            )
            if (
                node.target is math.floor
                and not rewritten
                and any(isinstance(v, torch.SymFloat) for v in values)
            ):
                ours = False
            if not ours and any(isinstance(value, torch.SymFloat) for value in values):
                name = getattr(node.target, "__name__", str(node.target))
                raise ImpossibleError(
                    f"the model computes a number by Python's {name} of floats, which ONNX would round otherwise",
                    "use tensor operations there",
                )


def retype(model: ir.Model) -> None:
    """Marks as double what is computed in double, in place: torch notes single precision for every float size. Where
    such a number meets a tensor it takes the tensor's type, as torch has it."""
    graphs = [model.graph, *model.functions.values()]
    for graph in graphs:
        for node in list(graph):
            if node.op_type in _MEETING and (met := _met(node)) is not None:
                _cast(node, met)
            elif node.op_type in _KEEPING and any(
                v is not None and v.dtype == ir.DataType.DOUBLE for v in node.inputs
            ):
                for value in node.outputs:
                    value.dtype = ir.DataType.DOUBLE
            elif node.op_type in ("Cast", "Constant") and _makes_double(node):
                node.outputs[0].dtype = ir.DataType.DOUBLE


def _met(node: ir.Node) -> ir.DataType | None:
    """The type of the tensors among its inputs where others are double."""
    types = [value.dtype for value in node.inputs if value is not None]
    tensors = [each for each in types if each in _TENSORS]
    return tensors[0] if ir.DataType.DOUBLE in types and tensors else None


def _cast(node: ir.Node, dtype: ir.DataType) -> None:
    for at, value in enumerate(node.inputs):
        if value is not None and value.dtype == ir.DataType.DOUBLE:
            cast = ir.node("Cast", [value], attributes={"to": dtype}, name=f"{node.name}/number_{at}")
            cast.outputs[0].name = f"{node.outputs[0].name}/number_{at}"
            cast.outputs[0].dtype, cast.outputs[0].shape = dtype, value.shape
            assert node.graph is not None
            node.graph.insert_before(node, [cast])
            node.replace_input_with(at, cast.outputs[0])


def _makes_double(node: ir.Node) -> bool:
    if node.op_type == "Cast":
        return node.attributes["to"].as_int() == ir.DataType.DOUBLE
    value = node.attributes.get("value")
    return value is not None and value.as_tensor().dtype == ir.DataType.DOUBLE
