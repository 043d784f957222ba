"""Both sides of a branch as one `torch.cond`, built from what their trace recorded.

Each side's nodes are copied into a graph of its own. What a side writes to a tensor from before it, it writes to
a copy there, which the condition returns and which is written back after it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx
from torch.fx.experimental import proxy_tensor
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.utils import _pytree as pytree

from sparse_onnx.export.lifting import graph_edits, unshaped
from sparse_onnx.export.lifting.program import Sym, expression, name_of, storage, tracing, value_of, writes
from sparse_onnx.export.lifting.values import SomeItems, Undefined

if TYPE_CHECKING:
    from sparse_onnx.export.lifting.branch import Lifted, Side


_ASSERTIONS = (
    "aten::_assert_scalar",
    "aten::_assert_async",
    "aten::_assert_tensor_metadata",
    "aten::sym_constrain_range",
    "aten::sym_constrain_range_for_size",
)


def merge(branch: Lifted) -> dict[str, Any] | str:
    """The variables after the branch, with the condition in the trace; or why that cannot be."""
    if isinstance(branch.condition, SomeItems):
        return "it asks how many items a list has"
    first, second = branch.sides
    changed = first.after.changed(second.after) + branch.before.changed(first.after)
    if changed:
        return f"one of them changes a Python {type(changed[0][0]).__name__}"
    values, wanted = _values(branch)
    outer = {storage(node) for node in graph_edits.until(branch.graph, branch.first)} - {None}
    targets = {node: writes(node)[0] for side in branch.sides for node in side.nodes if writes(node)}
    parts = [_Part(side, outer, targets) for side in branch.sides]
    written: list[fx.Node] = []
    for part in parts:
        if part.problem:
            return part.problem
        written += [node for node in part.written if node not in written]
    if len({storage(node) for node in written}) != len(written):
        return "they write to the same memory under two names"
    if not wanted and not written:
        _discard(branch)
        return values
    graphs = []
    for part, place in zip(parts, (0, 1), strict=True):
        graphs.append(part.finish([pair[place] for _, pair in wanted], written))
    outputs = _condition(branch, parts, graphs, [pair[0] for _, pair in wanted], written)
    for (setter, _), output in zip(wanted, outputs, strict=False):
        setter(output)
    for node, output in zip(written, outputs[len(wanted) :], strict=True):
        target = graph_edits.tensor_of(node)
        if target is None:
            return "they write to a tensor that nothing holds"
        target.copy_(output)
    return {name: _filled(value) for name, value in values.items()}


class _Hole:
    """A value that the condition gives."""

    def __init__(self) -> None:
        self.value: Any = None

    def set(self, value: Any) -> None:
        self.value = value


def _filled(value: Any) -> Any:
    if isinstance(value, _Hole):
        return value.value
    if isinstance(value, pytree_types):
        return pytree.tree_map(lambda each: each.value if isinstance(each, _Hole) else each, value)
    return value


pytree_types = (tuple, list, dict)


def _values(branch: Lifted) -> tuple[dict[str, Any], list[tuple[Any, tuple[Tensor, Tensor]]]]:
    """The variables, with holes for those that the condition gives, and both sides' tensors for each hole."""
    wanted: list[tuple[Any, tuple[Tensor, Tensor]]] = []

    def joined(left: Any, right: Any, name: str) -> Any:
        if left is right or _equal(left, right):
            return left
        if any(unshaped.place_of(each) is not None for each in (left, right)):
            return Undefined(name, branch.place)
        if isinstance(left, Tensor) and isinstance(right, Tensor) and _alike(left, right):
            hole = _Hole()
            wanted.append((hole.set, (left, right)))
            return hole
        if type(left) is type(right) and isinstance(left, (tuple, list)) and len(left) == len(right):
            each = [joined(a, b, name) for a, b in zip(left, right, strict=True)]
            return type(left)(each) if type(left) in (tuple, list) else Undefined(name, branch.place)
        if type(left) is type(right) is dict and list(left) == list(right):
            return {key: joined(left[key], right[key], name) for key in left}
        return Undefined(name, branch.place)

    values = {}
    first, second = branch.sides
    for name in branch.names:
        missing = Undefined(name, branch.place)
        left, right = (side.values.get(name, branch.start.get(name, missing)) for side in (first, second))
        undefined = type(left) is Undefined or type(right) is Undefined
        dead = name not in branch.read_later
        values[name] = missing if undefined or (dead and left is not right) else joined(left, right, name)
    return values, wanted


def _equal(left: Any, right: Any) -> bool:
    plain = (int, float, str, bool, type(None))
    if isinstance(left, Sym) or isinstance(right, Sym):
        both = isinstance(left, (*Sym, int)) and isinstance(right, (*Sym, int))
        return both and statically_known_true(left == right)
    return type(left) is type(right) and isinstance(left, plain) and bool(left == right)


def _alike(left: Tensor, right: Tensor) -> bool:
    if left.dtype != right.dtype or left.device != right.device or left.dim() != right.dim():
        return False
    return all(statically_known_true(a == b) for a, b in zip(left.shape, right.shape, strict=True))


class _Part:
    """One side as a graph; `operands` are the nodes from before it that it reads."""

    def __init__(self, side: Side, outer: set[Any], targets: Mapping[fx.Node, fx.Node]) -> None:
        self.side, self.targets = side, targets
        self.own = set(side.nodes)
        self.operands: list[fx.Node] = []
        lasting = {storage(each) for node in side.nodes for each in writes(node)} & outer
        read = []
        for node in side.nodes:
            for source in node.all_input_nodes:
                source = self._root(source)
                if source not in self.own and source not in read:
                    read.append(source)
        self.written = [node for node in read if storage(node) in lasting]
        self.problem = ""
        if len(self.written) != len(lasting):
            self.problem = "one of them writes to memory under two names"
        if any(_random(node) for node in side.nodes):
            self.problem = "one of them draws random numbers"
        self.read = read

    def _root(self, node: fx.Node) -> fx.Node:
        """What a node from before this side was, without what the other side wrote to it."""
        while node not in self.own and node in self.targets:
            node = self.targets[node]
        return node

    def reads(self, nodes: list[fx.Node]) -> list[fx.Node]:
        return [*self.read, *[node for node in nodes if node not in self.own and node not in self.read]]

    def finish(self, results: list[Tensor], written: list[fx.Node]) -> Any:
        ends = [self._end(result) for result in results]
        self.operands = self.reads([*ends, *written])
        operands, nodes = self.operands, self.side.nodes

        def build(order: list[fx.Node], root: Any) -> fx.GraphModule:
            graph = fx.Graph()
            made: dict[fx.Node, fx.Node] = {}
            sizes: dict[Any, fx.Node] = {}
            for position, node in enumerate(order):
                same = sizes.setdefault(key, node) if (key := _size_of(node)) is not None else node
                if same is not node:
                    made[node] = made[same]
                    continue
                made[node] = graph.placeholder(f"operand_{position}")
                made[node].meta = dict(node.meta)
            for node in written:
                if node in operands:
                    made[node] = _copied(graph, made[node])
            latest: dict[fx.Node, fx.Node] = {node: made[node] for node in written}
            for node in nodes:
                if name_of(node) in _ASSERTIONS:
                    continue
                made[node] = graph.node_copy(node, lambda each: made[self._root(each)])
            outputs = [_copied(graph, made[each]) for each in ends] + [latest[node] for node in written]
            graph.output(tuple(outputs))
            graph.lint()
            return fx.GraphModule(root, graph)

        return build

    def _end(self, result: Tensor) -> fx.Node:
        node = graph_edits.node_of(result)
        assert node is not None
        return self._root(node)


def _size_of(node: fx.Node) -> Any:
    """The formula of a size: torch merges equal ones, and a condition's operands have to differ."""
    return expression(node) if isinstance(value_of(node), torch.SymInt) else None


def _random(node: fx.Node) -> bool:
    """Whether an operator draws numbers; dropout does so in training only."""
    if name_of(node).endswith("dropout") and len(node.args) == 3 and node.args[2] is False:
        return False
    return torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())


def _copied(graph: fx.Graph, node: fx.Node) -> fx.Node:
    """A condition's results may not be its operands, nor views of each other."""
    new = graph.call_function(torch.ops.aten.clone.default, (node,))
    new.meta = dict(node.meta)
    return new


def _condition(
    branch: Lifted, parts: list[_Part], builds: list[Any], results: list[Tensor], written: list[fx.Node]
) -> list[Tensor]:
    tracer = tracing().tracer
    predicate = _predicate(branch.condition)
    order = list(dict.fromkeys(node for part in parts for node in part.operands))
    graphs = [build(order, tracer.root) for build in builds]
    sizes = {key: node for node in reversed(order) if (key := _size_of(node)) is not None}
    order = [node for node in order if sizes.get(_size_of(node), node) is node]
    _discard(branch)
    for kind, graph in zip(("true", "false"), graphs, strict=True):
        number = 0
        while hasattr(tracer.root, f"lifted_{kind}_{number}"):
            number += 1
        tracer.root.register_module(f"lifted_{kind}_{number}", graph)
    operands = tuple(fx.Proxy(node, tracer) for node in _apart(order))
    made = tracer.create_proxy(
        "call_function", torch.ops.higher_order.cond, (fx.Proxy(predicate, tracer), *graphs, operands), {}
    )
    fresh = [graph_edits.fresh(value_of(graph_edits.node_of(result))) for result in results]
    fresh += [graph_edits.fresh(value_of(node)) for node in written]
    proxy_tensor.track_tensor_tree(tuple(fresh), made, constant=None, tracer=tracer)
    return fresh


def _apart(order: list[fx.Node]) -> list[fx.Node]:
    """Operands that share no memory, as a condition's have to: rows and slots that `torch.where` gives do."""
    apart, known = [], set()
    for node in order:
        key = storage(node)
        if key is not None and key in known:
            copy = graph_edits.node_of(graph_edits.readable(node).clone())
            assert copy is not None
            node = copy
        known.add(key)
        apart.append(node)
    return apart


def _predicate(condition: Any) -> fx.Node:
    tracer = tracing().tracer
    if isinstance(condition, Tensor):
        condition = condition.reshape(())
        node = graph_edits.node_of(condition if condition.dtype == torch.bool else condition != 0)
        assert node is not None
        return node
    return proxy_tensor.get_proxy_slot(condition, tracer).force().node


def _discard(branch: Lifted) -> None:
    for side in reversed(branch.sides):
        graph_edits.discard(branch.graph, side.nodes)
