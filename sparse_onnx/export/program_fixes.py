"""Operators of a traced program that torch's ONNX exporter would translate wrongly."""

from __future__ import annotations

import torch
from torch import Tensor, fx

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
