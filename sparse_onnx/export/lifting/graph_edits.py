"""Parts of a trace that is being made: found, and taken back."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.experimental import proxy_tensor

from sparse_onnx.export.lifting.program import tracing, writes


def last(graph: fx.Graph) -> fx.Node:
    """The newest node; the graph's own root where there is none."""
    return graph._root._prev


def since(graph: fx.Graph, mark: fx.Node) -> list[fx.Node]:
    """The nodes after it, in order."""
    found, node = [], mark._next
    while node is not graph._root:
        found.append(node)
        node = node._next
    return found


def until(graph: fx.Graph, mark: fx.Node) -> list[fx.Node]:
    """The nodes up to it."""
    found, node = [], mark
    while node is not graph._root:
        found.append(node)
        node = node._prev
    return found


def node_of(value: Tensor) -> fx.Node | None:
    """The node that stands for a tensor in the trace."""
    mode = tracing()
    slot = proxy_tensor.get_proxy_slot(value, mode.tracer, None) if mode is not None else None
    return slot.proxy.node if slot is not None else None


def tensor_of(node: fx.Node) -> Tensor | None:
    """The tensor that a node stands for, if anything still holds it."""
    for tensor, slot in tracing().tracer.tensor_tracker.items():
        if slot.proxy.node is node:
            return tensor  # type: ignore[no-any-return]
    return None


def fresh(value: Tensor) -> Tensor:
    """A tensor like one of the trace, unknown to it."""
    with proxy_tensor.disable_proxy_modes_tracing(), value.fake_mode:  # type: ignore[attr-defined]
        return torch.empty(tuple(value.shape), dtype=value.dtype, device=value.device)


def readable(node: fx.Node) -> Tensor:
    """A tensor that stands for a node, to be read only."""
    found, tracer = tensor_of(node), tracing().tracer
    if found is None:
        found = fresh(node.meta["val"])
        proxy_tensor.track_tensor_tree(found, fx.Proxy(node, tracer), constant=None, tracer=tracer)
    return found


def discard(graph: fx.Graph, nodes: Iterable[fx.Node]) -> None:
    """Takes back what these nodes do to tensors from before them. The rest of them is dead code."""
    nodes = list(nodes)
    targets = {node: targets[0] for node in nodes if (targets := writes(node))}
    for node in reversed(nodes):
        if node in targets:
            before = _first(targets, node)
            node.replace_all_uses_with(before)
            _repoint(node, before)
            graph.erase_node(node)
        elif node.is_impure() and not node.users and node.op == "call_function":
            graph.erase_node(node)


def _first(targets: dict[fx.Node, fx.Node], node: fx.Node) -> fx.Node:
    while node in targets:
        node = targets[node]
    return node


def _repoint(old: fx.Node, new: fx.Node) -> None:
    """Tensors that stood for `old` stand for `new`."""
    tracer: Any = tracing().tracer
    for tensor, slot in list(tracer.tensor_tracker.items()):
        if slot.proxy.node is old:
            tracer.tensor_tracker[tensor] = proxy_tensor._ProxyTensor(fx.Proxy(new, tracer), slot.constant)


def line_of(node: fx.Node) -> str:
    """The user's line that a node comes from, as far as the trace knows."""
    lines = [line.strip() for line in (node.stack_trace or "").splitlines() if line.strip()]
    return lines[-1] if lines else str(node.target)
