"""Operators of a traced program that torch's ONNX exporter would translate wrongly."""

from __future__ import annotations

import torch
from torch import Tensor, fx

_aten = torch.ops.aten
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


def apply(module: torch.nn.Module) -> None:
    """Changes the program's graph, and those of its conditions, in place."""
    for each in module.modules():
        if isinstance(each, fx.GraphModule):
            for node in list(each.graph.nodes):
                if node.target in (_aten.squeeze.dim, _aten.squeeze.dims):
                    _squeeze(node)
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
