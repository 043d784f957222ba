"""In which types a model chooses by scores: what enters each `topk` and `argmax`, and the product it comes from.

A router that torch computes in float32, in a model of 16 bits, has to be one in the file: near ties are decided there.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

import onnx_ir as ir
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from sparse_onnx.graph.annotate import annotate

if TYPE_CHECKING:
    from sparse_onnx.export.samples import Run
    from sparse_onnx.export.sources import Source

_ATEN: Any = torch.ops.aten
_PRODUCTS = frozenset({_ATEN.mm, _ATEN.addmm, _ATEN.bmm, _ATEN.baddbmm, _ATEN.mv, _ATEN.dot})
_NODES = frozenset({"MatMul", "Gemm", "Einsum"})

#: One of these two, type of the scores before a cast to a wider one, type of the nearest matrix product before them
#: ("": none) -> how often.
Choices = Counter[tuple[str, str, str]]
_RANK, _LARGEST = "topk", "argmax"
_CHOOSING = {_ATEN.topk: _RANK, _ATEN.sort: _RANK, _ATEN.argmax: _LARGEST, _ATEN.max: _LARGEST}
_CHOOSING_NODES = {"TopK": _RANK, "ArgMax": _LARGEST}


class _Watching(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.found: Choices = Counter()
        # The tensor, so that no other one gets its id.
        self._products: dict[int, tuple[Tensor, str]] = {}
        self._widened: dict[int, tuple[Tensor, torch.dtype]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = [each for each in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(each, Tensor)]
        before = next((self._products[id(each)][1] for each in given if id(each) in self._products), "")
        if func.overloadpacket in _CHOOSING and given:
            scores = self._widened.get(id(given[0]), (given[0], given[0].dtype))[1]
            self.found[_CHOOSING[func.overloadpacket], _name(scores), before] += 1
        if func.overloadpacket is _ATEN._to_copy and result.dtype.itemsize > given[0].dtype.itemsize:
            self._widened[id(result)] = (result, given[0].dtype)
        after = _name(given[0].dtype) if func.overloadpacket in _PRODUCTS else before
        for each in torch.utils._pytree.tree_leaves(result) if after else ():
            if isinstance(each, Tensor) and each.dtype != torch.bool:  # a mask says where there are scores
                self._products[id(each)] = (each, after)
        return result


def in_torch(source: Source, run: Run) -> Choices:
    with _Watching() as watching:
        source.forward(run.inputs)
    return watching.found


def in_file(model: ir.Model) -> Choices:
    """The same of an exported model; types that its values lack are inferred, in place."""
    annotate(model)
    found: Choices = Counter()
    _walk(model.graph, {}, found)
    return found


def _walk(graph: ir.Graph, products: dict[ir.Value, str], found: Choices) -> None:
    for node in graph:
        before = next((products[value] for value in node.inputs if value in products), "")
        if node.op_type in _CHOOSING_NODES:
            found[_CHOOSING_NODES[node.op_type], _type(_unwidened(node)), before] += 1
        after = _type(node) if node.op_type in _NODES else before
        for attribute in node.attributes.values():
            if attribute.type == ir.AttributeType.GRAPH:
                _walk(attribute.as_graph(), products, found)
        for value in node.outputs if after else ():
            if value.dtype != ir.DataType.BOOL:
                products[value] = after


def _unwidened(node: ir.Node) -> ir.Node:
    """The cast to a wider type whose result the node reads, if it does: equal scores stay equal, and the order too."""
    value = node.inputs[0]
    cast = None if value is None else value.producer()
    if value is None or cast is None or cast.op_type != "Cast" or cast.inputs[0] is None:
        return node
    before, after = cast.inputs[0].dtype, value.dtype
    wider = before is not None and after is not None and after.itemsize > before.itemsize
    return cast if wider else node


def _type(node: ir.Node) -> str:
    value = node.inputs[0]
    kind = None if value is None else value.dtype
    return "" if kind is None else {"FLOAT": "float32", "DOUBLE": "float64"}.get(kind.name, kind.name.lower())


def _name(kind: torch.dtype) -> str:
    return str(kind).removeprefix("torch.")


def differing(torch_: Choices, file: Choices) -> str:
    """What the file computes in other types than torch, or an empty text. Integers do not matter."""
    torch_, file = _of_floats(torch_), _of_floats(file)
    ranked = [Counter({key: n for key, n in each.items() if key[0] == _RANK}) for each in (torch_, file)]
    same_number = (
        ranked[0].total() == ranked[1].total()
    )  # not so where torch runs a loop that the file holds once
    if set(file) <= set(torch_) and (ranked[0] == ranked[1] if same_number else set(ranked[0]) <= set(file)):
        return ""
    return f"torch chooses by {_said(torch_)}, and the file by {_said(file)}"


def _of_floats(choices: Choices) -> Choices:
    return Counter({key: number for key, number in choices.items() if "float" in key[1]})


def _said(choices: Choices) -> str:
    parts = [
        f"{number} {scores} {operator}" + (f" of {product} products" if product else "")
        for (operator, scores, product), number in sorted(choices.items())
    ]
    return ", ".join(parts) or "nothing"
