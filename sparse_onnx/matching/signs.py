"""Which values are provably not negative."""

from __future__ import annotations

import onnx_ir as ir

from sparse_onnx.matching.values import attribute, constant, pairs, producer, scalar

_ALWAYS = frozenset(
    """
    Abs Exp HardSigmoid Hardmax ReduceL1 ReduceL2 ReduceSumSquare Relu Sigmoid Softmax Softplus Sqrt
    """.split()  # noqa: SIM905
)
#: Their first input's elements, or sums, products and choices of them.
_FIRST = frozenset(
    """
    Cast CumSum Expand Flatten Gather GatherElements GatherND Identity ReduceMax ReduceMean ReduceMin ReduceProd
    ReduceSum Reciprocal Reshape Slice Split Squeeze Tile TopK Transpose Unsqueeze
    """.split()  # noqa: SIM905
)
_ALL = frozenset({"Add", "Concat", "Div", "Max", "Mean", "Min", "Mul", "Sum"})
_DEEPEST = 64


def non_negative(value: ir.Value | None, left: int = _DEEPEST) -> bool:
    """Whether no element is below zero (NaN aside)."""
    table = constant(value)
    if table is not None:
        return bool((table >= 0).all())
    node = producer(value)
    if value is None or node is None or left == 0:
        return False
    if node.op_type in _ALWAYS or (node.op_type == "TopK" and value is not node.outputs[0]):
        return True
    if node.op_type in _FIRST:
        return non_negative(node.inputs[0], left - 1)
    if node.op_type == "Max" and any(non_negative(item, left - 1) for item in node.inputs):
        return True
    if node.op_type in _ALL:
        return all(non_negative(item, left - 1) for item in node.inputs)
    if node.op_type == "Where":
        return all(non_negative(item, left - 1) for item in node.inputs[1:])
    if node.op_type == "Clip":
        lowest = scalar(node.inputs[1]) if len(node.inputs) > 1 else None
        return (lowest is not None and lowest >= 0) or non_negative(node.inputs[0], left - 1)
    return False


def support(value: ir.Value) -> tuple[ir.Value, bool] | None:
    """(V, signed) where the value is true just where V is not zero; where `signed`, only where V is above zero."""
    node = producer(value, "Greater", "Less", "Cast", "Not")
    if node is None or node.inputs[0] is None:
        return None
    if node.op_type in ("Greater", "Less"):
        low, high = node.inputs[::-1] if node.op_type == "Greater" else node.inputs
        return (high, True) if high is not None and low is not None and scalar(low) == 0 else None
    if node.op_type == "Not":
        equal = producer(node.inputs[0], "Equal")
        for item, zero in pairs(equal) if equal is not None else ():
            if scalar(zero) == 0 and not isinstance(scalar(zero), bool):
                return item, False
        return None
    source = node.inputs[0]
    numeric = source.dtype is not None and source.dtype.is_floating_point()
    return (source, False) if attribute(node, "to") == int(ir.DataType.BOOL) and numeric else None
