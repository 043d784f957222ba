"""What torch puts into a traced program that its ONNX exporter would translate wrongly, or that is not so."""

from __future__ import annotations

import operator
from typing import Any

import numpy as np
import sympy
import torch
from torch import Tensor, fx
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols
from torch.utils._sympy.value_ranges import bound_sympy

from sparse_onnx.core.errors import ImpossibleError

_aten = torch.ops.aten
#: Position of the scales among the arguments, and up to how many times as long an axis torch takes for exactly that
#: many times as long, whatever the scale says.
_RESIZED = {_aten.upsample_bilinear2d.vec: (3, 1), _aten.upsample_nearest2d.vec: (2, 2)}
#: Position of the scales of all operators that may have some.
_SCALED = {
    **{target: place for target, (place, _) in _RESIZED.items()},
    **dict.fromkeys((_aten.upsample_nearest1d.vec, _aten.upsample_nearest3d.vec), 2),
    **dict.fromkeys((_aten._upsample_nearest_exact1d.vec, _aten._upsample_nearest_exact2d.vec), 2),
    **dict.fromkeys((_aten._upsample_nearest_exact3d.vec,), 2),
    **dict.fromkeys((_aten.upsample_linear1d.vec, _aten.upsample_trilinear3d.vec), 3),
    **dict.fromkeys((_aten.upsample_bicubic2d.vec, _aten._upsample_bilinear2d_aa.vec), 3),
    _aten._upsample_bicubic2d_aa.vec: 3,
}
#: Operators that torch computes in the type which is asked for; onnxscript's translation casts the result only.
_IN_TYPE = frozenset(
    {
        _aten.softmax.int,
        _aten.log_softmax.int,
        _aten.special_softmax.default,
        _aten.special_log_softmax.default,
        _aten.mean.dim,
        _aten.sum.default,
        _aten.sum.dim_IntList,
    }
)
#: Operators whose results in a narrow type are those of int64, cut: sums wrap alike.
_ADDING = frozenset(
    {
        _aten.sum.default,
        _aten.sum.dim_IntList,
        _aten.cumsum.default,
    }
)
_NARROW = (torch.int8, torch.uint8, torch.int16)


def apply(module: torch.nn.Module) -> None:
    """Changes the program's graph, and those of its conditions, in place."""
    for each in module.modules():
        if isinstance(each, fx.GraphModule):
            for node in list(each.graph.nodes):
                if node.op == "output" and each is module:
                    _copy_what_is_given_back(node)
                elif node.target in (_aten.squeeze.dim, _aten.squeeze.dims):
                    _squeeze(node)
                elif node.target in (_aten.split.Tensor, _aten.chunk.default):
                    _split(node)
                elif node.target in _SCALED:
                    _resize(node)
                elif node.target in _ADDING and _narrow(node):
                    _add_widely(node)
                elif node.target in _IN_TYPE:
                    _compute_in_type(node)
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


def _split(node: fx.Node) -> None:
    """Parts whose length follows from an open one become as many lengths as there are parts: from one length alone
    onnxscript does not learn how many parts it gives."""
    source, given, *rest = node.args
    parts, dim = node.meta["val"], rest[0] if rest else node.kwargs.get("dim", 0)
    if not isinstance(source, fx.Node) or not isinstance(dim, int) or len(parts) < 2:
        return
    if all(isinstance(each.shape[dim], int) for each in parts):
        return

    def add(target: Any, *args: Any) -> fx.Node:
        made = node.graph.call_function(target, args)
        values = [each.meta["val"] if isinstance(each, fx.Node) else each for each in args]
        made.meta = {**node.meta, "val": target(*values)}
        return made

    with node.graph.inserting_before(node):
        total = add(_aten.sym_size.int, source, dim)
        size = given
        if node.target is _aten.chunk.default and isinstance(given, int):
            size = add(operator.floordiv, add(operator.add, total, given - 1), given)
        last = add(operator.sub, total, add(operator.mul, size, len(parts) - 1))
    node.target, node.kwargs = _aten.split_with_sizes.default, {}
    node.args = (source, [size] * (len(parts) - 1) + [last], dim)


def _resize(node: fx.Node) -> None:
    """A scale such as 1.02 may leave the length of an axis as it is. torch copies it then; ONNX's Resize interpolates
    by the scale all the same. And torch multiplies lengths by scales in double precision, ONNX in single.

    Raises:
        ImpossibleError: whether the two differ is open, as the length is.
    """
    place = _SCALED[node.target]  # type: ignore[index]
    most = _RESIZED.get(node.target, (place, 0))[1]  # type: ignore[arg-type, call-overload]
    source = node.args[0]
    if len(node.args) <= place or node.args[place] is None or not isinstance(source, fx.Node):
        return
    scales = [float(scale) for scale in node.args[place]]  # type: ignore[union-attr, arg-type]
    before, after = source.meta["val"].shape[2:], node.meta["val"].shape[2:]
    for axis, scale in enumerate(scales):
        old, new = before[axis], after[axis]
        if isinstance(old, int) and isinstance(new, int):
            if new in [times * old for times in range(1, most + 1)]:
                scales[axis] = float(new // old)
        elif float(np.float32(scale)) != scale:
            raise ImpossibleError(
                f"the model resizes an axis of open length by {scale:g}, which no float32 is: lengths may differ",
                "make that axis static, or resize to a size or by a factor such as 2.5",
            )
        elif 1 < scale < most + 1 and not scale.is_integer():
            raise ImpossibleError(
                f"the model resizes an axis of open length by {scale:g}, which may keep its length",
                "make that axis static, or resize to a size instead of by a factor",
            )
    node.args = (*node.args[:place], scales, *node.args[place + 1 :])


def _copy_what_is_given_back(node: fx.Node) -> None:
    """An input that is an output as well needs two names."""

    def copied(source: fx.Node) -> fx.Node:
        if source.op != "placeholder" or not isinstance(source.meta.get("val"), Tensor):
            return source
        with node.graph.inserting_before(node):
            copy = node.graph.call_function(_aten.clone.default, (source,))
        copy.meta = dict(source.meta)
        return copy

    node.args = fx.map_arg(node.args, copied)


def _narrow(node: fx.Node) -> bool:
    return node.kwargs.get("dtype") in _NARROW and isinstance(node.args[0], fx.Node)


def _add_widely(node: fx.Node) -> None:
    """ONNX has no sums of narrow integers, of which torch keeps the low bits."""
    kind: Any = node.kwargs["dtype"]
    source: Any = node.args[0]
    value = source.meta["val"]
    with node.graph.inserting_before(node):
        for each in (kind, torch.int64):  # torch cuts what it adds, too
            source = node.graph.call_function(_aten._to_copy.default, (source,), {"dtype": each})
            source.meta = {**node.meta, "val": value.to(each)}
    node.args, node.kwargs = (source, *node.args[1:]), {}
    after = node.meta["val"]
    with node.graph.inserting_after(node):
        cut = node.graph.call_function(_aten._to_copy.default, (node,), {"dtype": kind})
    cut.meta = {**node.meta}
    node.meta = {**node.meta, "val": after.to(torch.int64)}
    node.replace_all_uses_with(cut, delete_user_cb=lambda user: user is not cut)


def _compute_in_type(node: fx.Node) -> None:
    """The cast in front: a router's softmax in float32, of logits of 16 bits, is one in the file, too."""
    source, kind = node.args[0], node.kwargs.get("dtype")
    positional = kind is None and len(node.args) == 3 and isinstance(node.args[2], torch.dtype)
    kind = node.args[2] if positional else kind
    if not isinstance(kind, torch.dtype) or not isinstance(source, fx.Node):
        return
    before = source.meta.get("val")
    if not isinstance(before, Tensor) or before.dtype == kind:
        return
    with node.graph.inserting_before(node):
        cast = node.graph.call_function(_aten._to_copy.default, (source,), {"dtype": kind})
    cast.meta = {**node.meta, "val": before.to(kind)}
    node.args = (cast, *(node.args[1:2] if positional else node.args[1:]))
    node.kwargs = {name: value for name, value in node.kwargs.items() if name != "dtype"}


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
