"""What a branch does where nothing is selected: which writes change nothing, which values stay equal."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from sparse_onnx.export.lifting.facts import Facts
from sparse_onnx.export.lifting.program import Sym, expression, name_of, value_of, writes

#: Operator -> position of the indices that say where it writes.
_INDEXED = {
    "aten::index_add": 2,
    "aten::index_copy": 2,
    "aten::index_fill": 2,
    "aten::index_reduce": 2,
    "aten::scatter": 2,
    "aten::scatter_add": 2,
    "aten::scatter_reduce": 2,
}
_MASKED = ("aten::masked_fill", "aten::masked_scatter")


def changes_nothing(node: fx.Node, facts: Facts) -> bool:
    """Whether a write leaves its target as it is, under the facts."""
    return all(facts.empty(target) for target in writes(node)) or _no_op(node, facts)


def _no_op(node: fx.Node, facts: Facts) -> bool:
    """Whether the operator gives back its first argument, in place or not."""
    name, args = name_of(node).removesuffix("_"), node.args
    if name == "aten::index_put":
        return any(
            facts.zero(each) if _boolean(each) else facts.empty(each)
            for each in args[1]  # type: ignore[union-attr]
            if isinstance(each, fx.Node)
        )
    if name in _INDEXED:
        return facts.empty(args[_INDEXED[name]])
    if name in _MASKED:
        return facts.zero(args[1])
    if name == "aten::copy":
        source = args[1]
        return isinstance(source, fx.Node) and resolved(source, facts) is resolved(args[0], facts)
    if name in ("aten::add", "aten::sub"):
        return facts.zero(args[1]) and _like(args[0], node)
    if name in ("aten::logical_or", "aten::bitwise_or"):
        return facts.zero(args[1]) and _like(args[0], node)
    return False


def _boolean(node: Any) -> bool:
    value = value_of(node)
    return isinstance(value, Tensor) and value.dtype in (torch.bool, torch.uint8)


def _like(source: Any, result: fx.Node) -> bool:
    """Whether a result has its first argument's type and shape, so that it can be that argument."""
    before, after = value_of(source), value_of(result)
    return (
        isinstance(before, Tensor)
        and before.dtype == after.dtype
        and tuple(before.shape) == tuple(after.shape)
    )


def resolved(node: Any, facts: Facts) -> Any:
    """The earliest node of equal value, under the facts."""
    while isinstance(node, fx.Node):
        name, args = name_of(node), node.args
        if not args or not facts.program.current(node):
            return node
        source: Any = args[0]
        if name == "aten::where" and len(args) == 3 and facts.zero(args[0]):
            source = args[2]
        elif name == "aten::slice" and facts.slices_all(node):
            source = args[0]
            if isinstance(source, fx.Node) and facts.program.unchanged_since(source, node):
                node = source
                continue
            return node
        elif name == "aten::cat":
            left = [each for each in args[0] if not facts.empty(each)]  # type: ignore[union-attr]
            if len(left) != 1:
                return node
            source = left[0]
        elif not (writes(node) and changes_nothing(node, facts)) and not _no_op(node, facts):
            return node
        if not isinstance(source, fx.Node) or value_of(source).dtype != value_of(node).dtype:
            return node
        if facts.shape(source) != facts.shape(node) or not facts.program.unchanged_since(source, node):
            return node
        node = source
    return node


def same(left: Any, right: Any, facts: Facts, node_of: Callable[[Tensor], fx.Node | None]) -> bool:
    """Whether two values are equal under the facts."""
    if left is right:
        return True
    if isinstance(left, Tensor) and isinstance(right, Tensor):
        first, second = node_of(left), node_of(right)
        if first is None or second is None or left.dtype != right.dtype:
            return False
        if resolved(first, facts) is resolved(second, facts):
            return True
        return facts.shape(first) == facts.shape(second) and facts.empty(first)
    if isinstance(left, (*Sym, int, float)) and isinstance(right, (*Sym, int, float)):
        if not isinstance(left, Sym) and not isinstance(right, Sym):
            return type(left) is type(right) and left == right
        first, second = facts.reduced(expression(left)), facts.reduced(expression(right))
        return first is not None and first == second
    if isinstance(left, (list, tuple)) and type(left) is type(right) and len(left) == len(right):
        return all(same(a, b, facts, node_of) for a, b in zip(left, right, strict=True))
    if isinstance(left, dict) and isinstance(right, dict) and list(left) == list(right):
        return all(same(left[key], right[key], facts, node_of) for key in left)
    if isinstance(left, (str, bytes, type(None), torch.dtype)):
        return type(left) is type(right) and left == right
    return False


def without_elements(
    left: Any, right: Any, facts: Facts, node_of: Callable[[Tensor], fx.Node | None]
) -> bool:
    """Whether neither of two tensors has elements, the second being of shape [0] as in `x.new_empty(0)`."""
    if not isinstance(left, Tensor) or not isinstance(right, Tensor) or left.dtype != right.dtype:
        return False
    first, second = node_of(left), node_of(right)
    known = first is not None and second is not None
    return known and facts.shape(second) == [0] and facts.shape(first)[:1] == [0]
