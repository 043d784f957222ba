"""Operators of a traced program that torch's ONNX exporter would translate wrongly."""

from __future__ import annotations

import torch
from torch import Tensor, fx

from sparse_onnx.core.errors import ImpossibleError

_aten = torch.ops.aten
#: Position of the scales among the arguments, and up to how many times as long an axis torch takes for exactly that
#: many times as long, whatever the scale says.
_RESIZED = {_aten.upsample_bilinear2d.vec: (3, 1), _aten.upsample_nearest2d.vec: (2, 2)}
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
                elif node.target in _RESIZED:
                    _resize(node)
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


def _resize(node: fx.Node) -> None:
    """A scale such as 1.02 may leave the length of an axis as it is. torch copies it then; ONNX's Resize interpolates
    by the scale all the same.

    Raises:
        ImpossibleError: whether it does is open, as the length is.
    """
    place, most = _RESIZED[node.target]  # type: ignore[index]
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
        elif 1 < scale < most + 1 and not scale.is_integer():
            raise ImpossibleError(
                f"the model resizes an axis of open length by {scale:g}, which may keep its length",
                "make that axis static, or resize to a size instead of by a factor",
            )
    node.args = (*node.args[:place], scales, *node.args[place + 1 :])


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
