"""Einsum equations as labels, one letter an axis."""

from __future__ import annotations

import onnx_ir as ir

from sparse_onnx.matching.values import attribute, producer, rank


def equation(node: ir.Node | None) -> tuple[list[str], str] | None:
    """Labels of each operand and of the result; None where the node is no Einsum or its letters are not plain.

    A result that is left out is what the operator's definition makes of it: the letters that occur once, sorted. An
    ellipsis, and a letter that stands twice in one term, are not plain.
    """
    if node is None or node.domain != "" or node.op_type != "Einsum":
        return None
    text = attribute(node, "equation", "")
    text = (text.decode() if isinstance(text, bytes) else str(text)).replace(" ", "")
    left, arrow, result = text.partition("->")
    terms = left.split(",")
    if not arrow:
        result = "".join(sorted(letter for letter in set(left) - {","} if left.count(letter) == 1))
    letters = [*terms, result]
    if any(not term.isalpha() and term for term in letters) or any(len(set(t)) != len(t) for t in letters):
        return None
    if len(terms) != len(node.inputs) or any(value is None for value in node.inputs):
        return None
    for term, value in zip(terms, node.inputs, strict=True):
        if rank(value) is not None and rank(value) != len(term):
            return None
    return terms, result


def two_operands(value: ir.Value | None) -> list[tuple[str, ir.Value, str, ir.Value, str]]:
    """Both orders (labels, operand, labels, operand, result labels) of the Einsum of two that computes the value."""
    node = producer(value, "Einsum")
    read = equation(node)
    if node is None or read is None or len(read[0]) != 2:
        return []
    (first, second), result = read
    a, b = node.inputs
    assert a is not None and b is not None
    return [(first, a, second, b, result), (second, b, first, a, result)]
