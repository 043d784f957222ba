"""What torch puts into a traced program that its ONNX exporter would translate wrongly, or that is not so."""

from __future__ import annotations

import operator
from typing import Any

import sympy
import torch
from torch import Tensor, fx
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols
from torch.utils._sympy.value_ranges import bound_sympy

_aten = torch.ops.aten


def apply(module: torch.nn.Module) -> None:
    """Changes the program's graph, and those of its conditions, in place."""
    for each in module.modules():
        if isinstance(each, fx.GraphModule):
            for node in list(each.graph.nodes):
                if node.target in (_aten.squeeze.dim, _aten.squeeze.dims):
                    _squeeze(node)
            each.recompile()


def _squeeze(node: fx.Node) -> None:
    """torch leaves an axis longer than 1 alone; ONNX's Squeeze refuses it."""
    source = node.args[0]
    if not isinstance(source, fx.Node) or not isinstance(before := source.meta.get("val"), Tensor):
        return
    given = node.args[1]
    dims = [given] if isinstance(given, int) else list(given)  # type: ignore[arg-type]
    after = node.meta["val"]
    kept = [dim for dim in dims if isinstance(size := before.shape[dim], int) and size == 1]  # type: ignore[index]
    if len(kept) == len(dims) or before.dim() - after.dim() != len(kept):
        return
    if kept:
        node.target, node.args = _aten.squeeze.dims, (source, kept)
    else:
        node.replace_all_uses_with(source)
        node.graph.erase_node(node)


def drop_traced_bounds(program: torch.export.ExportedProgram) -> None:
    """Takes out assertions, in place, that a size is at least what it is for axes of 2. torch takes each dynamic axis
    for 2 or more: of rows that are as many as an expression of axes says, and it asserts that too, it asserts the
    bound of that expression. One token then fails for no reason of the model's."""
    graph = program.graph
    asserted = [(node, node.args[0]) for node in graph.nodes if node.target is _aten._assert_scalar.default]
    equal = [pair for _, each in asserted if (pair := _sides(each, operator.eq)) is not None]
    least: dict[Any, Any] = {}
    for sides in equal:
        for symbol, size in (sides, sides[::-1]):
            if symbol.is_Symbol and not _unbacked(size) and size.free_symbols:
                least[symbol] = bound_sympy(size, program.range_constraints).lower
    for node, each in asserted:
        found = _sides(each, operator.ge)
        if found is not None and found[0] in least and found[1].is_number and found[1] <= least[found[0]]:
            graph.erase_node(node)
    program.graph_module.recompile()


def _sides(node: Any, relation: Any) -> tuple[sympy.Expr, sympy.Expr] | None:
    """Both sides of a comparison of sizes, as formulas."""
    if not isinstance(node, fx.Node) or node.target is not relation:
        return None
    values: list[Any] = [each.meta.get("val") if isinstance(each, fx.Node) else each for each in node.args]
    if not all(type(each) in (int, torch.SymInt) for each in values):
        return None
    # Not `expr`, in which what is asserted to be equal is put in already.
    left, right = (sympy.Integer(each) if type(each) is int else each.node._expr for each in values)
    return left, right


def _unbacked(size: sympy.Expr) -> bool:
    return bool(free_unbacked_symbols(size))
