"""A block's name in reports: what its exporter called the module, as far as node names and metadata tell."""

from __future__ import annotations

import ast
from collections.abc import Sequence

import onnx_ir as ir

_SCOPES = "pkg.torch.onnx.name_scopes"
_LISTS = ("experts", "expert", "mlps")


def block_name(nodes: Sequence[ir.Node], anchor: ir.Node) -> str:
    """The longest module path that the nodes share, e.g. ``model.layers.0.mlp``; else a name after the anchor.

    Args:
        nodes: of different experts, or the first and the last of packed ones.
        anchor: the node that computes the block's result.
    """
    scopes = [_scope(node) for node in nodes]
    if all(scopes):
        return _shared([".".join(scope) for scope in scopes if scope]) or _plain(anchor)
    paths = [_path(node) for node in nodes]
    if all(paths):
        return _shared([path for path in paths if path]) or _plain(anchor)
    return _plain(anchor)


def module_path(node: ir.Node) -> str:
    """What its exporter called the module that the node belongs to, e.g. ``model.layers.0.mlp.up_proj``; or nothing."""
    scope = _scope(node)
    return ".".join(scope) if scope else _path(node) or ""


def _scope(node: ir.Node) -> list[str] | None:
    """Module path of torch's exporter: the last entry but the node's own."""
    text = node.metadata_props.get(_SCOPES)
    if not text:
        return None
    try:
        entries = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return None
    if (
        not isinstance(entries, list)
        or len(entries) < 2
        or not all(isinstance(item, str) for item in entries)
    ):
        return None
    return entries[-2].split(".") if entries[-2] else None


def _path(node: ir.Node) -> str | None:
    """Module path in a node's name, ``/model/layers.0/mlp/experts.3/up_proj/MatMul``."""
    name = node.name or ""
    if name.count("/") < 2:
        return None
    return name.strip("/").rsplit("/", 1)[0].replace("/", ".")


def _shared(paths: Sequence[str]) -> str:
    """Components that all paths begin with, without those that name the list of experts in the block."""
    shared = []
    for parts in zip(*(path.split(".") for path in paths), strict=False):
        if len(set(parts)) > 1:
            break
        shared.append(parts[0])
    while shared and shared[-1] in _LISTS:
        shared.pop()
    return ".".join(shared)


def _plain(anchor: ir.Node) -> str:
    name = (anchor.name or "").strip("/")
    return f"moe/{name}" if name else "moe"
