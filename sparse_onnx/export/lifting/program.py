"""The program as traced so far: its nodes, who made a symbol, and which tensors were written to since."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import sympy
import torch
from torch import Tensor, fx
from torch.fx.experimental import proxy_tensor
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

Sym = (torch.SymInt, torch.SymFloat, torch.SymBool)


def tracing() -> Any:
    """The mode that records the trace; None outside of one."""
    return proxy_tensor.get_proxy_mode()


_ALIASES = {
    "aten::greater": "aten::gt",
    "aten::greater_equal": "aten::ge",
    "aten::less": "aten::lt",
    "aten::less_equal": "aten::le",
    "aten::not_equal": "aten::ne",
    "aten::multiply": "aten::mul",
    "aten::concat": "aten::cat",
    "aten::concatenate": "aten::cat",
    "aten::swapdims": "aten::swapaxes",
    "aten::moveaxis": "aten::movedim",
    "aten::__and__": "aten::bitwise_and",
    "aten::__or__": "aten::bitwise_or",
}


def name_of(node: Any) -> str:
    """`aten::index_add_` and the like; empty for what is no operator."""
    schema = getattr(getattr(node, "target", None), "_schema", None)
    name = schema.name if schema is not None and node.op == "call_function" else ""
    return _ALIASES.get(name, name)


def value_of(node: Any) -> Any:
    """What the node gave in the trace; itself where it is no node."""
    return node.meta.get("val") if isinstance(node, fx.Node) else node


def is_integer(node: Any) -> bool:
    value = value_of(node)
    return isinstance(value, Tensor) and not value.dtype.is_floating_point and not value.dtype.is_complex


def is_bool(node: Any) -> bool:
    value = value_of(node)
    return isinstance(value, Tensor) and value.dtype == torch.bool


def expression(value: Any) -> sympy.Expr | None:
    """A size as a formula of the trace's symbols."""
    value = value_of(value)
    if isinstance(value, bool):
        return sympy.true if value else sympy.false
    if isinstance(value, int):
        return sympy.Integer(value)
    return value.node.expr if isinstance(value, Sym) else None


def data_dependent(value: Any) -> bool:
    """Whether a size or truth depends on the values of tensors."""
    return isinstance(value, Sym) and bool(free_unbacked_symbols(value))


def writes(node: fx.Node) -> list[fx.Node]:
    """The arguments that this node changes in place."""
    schema = getattr(node.target, "_schema", None)
    if node.op != "call_function" or schema is None or not schema.is_mutable:
        return []
    found = []
    for position, argument in enumerate(schema.arguments):
        if argument.alias_info is None or not argument.alias_info.is_write:
            continue
        given = node.args[position] if position < len(node.args) else node.kwargs.get(argument.name)
        many = given if isinstance(given, (list, tuple)) else [given]
        found += [each for each in many if isinstance(each, fx.Node)]
    return found


def storage(node: Any) -> int | None:
    """What tells whether two nodes share memory."""
    value = value_of(node)
    if isinstance(value, (list, tuple)):
        return None
    return value.untyped_storage()._cdata if isinstance(value, Tensor) else None


class Program:
    """A view on the trace's graph; made anew for each question, since the graph grows."""

    def __init__(self, graph: fx.Graph, root: Any) -> None:
        self.graph, self.root = graph, root
        self.nodes = list(graph.nodes)
        self.position = {node: index for index, node in enumerate(self.nodes)}
        self.made: dict[sympy.Symbol, fx.Node] = {}
        for node in self.nodes:
            for symbol in _symbols(node.meta.get("val")):
                self.made.setdefault(symbol, node)
        #: What the integers of the module's own buffers, from 0 on, stay below.
        self.bounds: Mapping[fx.Node, int] = {}
        self.written: dict[int, int] = {}
        self.first_written: dict[int, int] = {}

    def count_writes(self, but: Iterable[fx.Node] = ()) -> None:
        """Notes the last write to each storage, without those by some nodes."""
        left_out = set(but)
        self.written, self.first_written = {}, {}
        for node in self.nodes:
            for target in writes(node) if node not in left_out else []:
                key = storage(target)
                if key is not None:
                    self.written[key] = self.position[node]
                    self.first_written.setdefault(key, self.position[node])

    def current(self, node: fx.Node) -> bool:
        """Whether the node's tensor still holds what the node computed."""
        key = storage(node)
        return key is None or self.written.get(key, -1) <= self.position[node]

    def unchanged_since(self, node: fx.Node, later: fx.Node) -> bool:
        """Whether `node`'s tensor is now what it was when `later` read it."""
        key = storage(node)
        return key is None or self.written.get(key, -1) < self.position[later]

    def only_write(self, node: fx.Node) -> bool:
        """Whether a node that writes to its first argument is the only one that does."""
        key = storage(node.args[0])
        return key is not None and self.written.get(key) == self.first_written.get(key) == self.position[node]

    def constant(self, node: Any) -> Tensor | None:
        """The tensor that a node holds as a constant of the trace."""
        while isinstance(node, fx.Node) and name_of(node) in (
            "aten::lift_fresh_copy",
            "aten::detach",
            "aten::alias",
            "aten::clone",
            "aten::detach_",
            "aten::_to_copy",
        ):
            node = node.args[0]
        if isinstance(node, fx.Node) and node.op == "get_attr":
            found: Any = self.root
            for part in str(node.target).split("."):
                found = getattr(found, part, None)
            if isinstance(found, Tensor) and not isinstance(found, torch._subclasses.FakeTensor):
                return found
        return None


def _symbols(value: Any) -> Iterator[sympy.Symbol]:
    if isinstance(value, Tensor):
        for size in value.shape:
            yield from _symbols(size)
    elif isinstance(value, Sym):
        yield from free_unbacked_symbols(value)
    elif isinstance(value, (list, tuple)):
        for each in value:
            yield from _symbols(each)
