"""Which linear layers must stay as they are, because a small error in their input decides something large.

router    its results reach a block's expert_index or expert_weight, or a TopK, ArgMax or Softmax, and no other layer is
          between; or nothing but a router reads what it computes
head      its results reach an output of the model through nothing but shapes, casts, scales, softmax and the like, and
          they are as many as a table of the model has rows (the vocabulary); or nothing else reads them, the model has
          other layers, and they are not as many as the features of an input of the model
embedding its matrix is a table that indices choose rows of, or its input is made of integers or is one-hot
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence

import onnx_ir as ir

from sparse_onnx.blocks.combine import is_combine
from sparse_onnx.blocks.moe import is_neutral
from sparse_onnx.matching.layers import Layer
from sparse_onnx.matching.linear import MICROSOFT
from sparse_onnx.matching.values import size, tensor

_SCORES = (
    "Abs Add And ArgMax Cast CastLike Clip Concat CumSum Div Equal Exp Expand Flatten Gather GatherElements "
    "GatherND Greater GreaterOrEqual HardSigmoid Identity Less LessOrEqual Log LogSoftmax Max Min Mod Mul Neg "
    "Not OneHot Or ReduceMax ReduceMin ReduceSum Relu Reshape ScatterElements ScatterND Sigmoid Slice Softmax "
    "Softplus Split Sqrt Squeeze Sub Sum Tanh Tile TopK Transpose Unsqueeze Where"
)
_LAST = (
    "Add ArgMax Cast CastLike Div Flatten Gather Identity LogSoftmax Mul Reshape Sigmoid Slice Softmax Squeeze "
    "Sub Tanh TopK Transpose Unsqueeze"
)
#: Operators that scores go through on their way to a choice. Not those of a norm or an attention.
_SCORING = frozenset(_SCORES.split())
#: Operators between an output head and the model's output. Of two inputs the other must be stored.
_FINISHING = frozenset(_LAST.split())
#: Of these only the first input holds numbers of the result; the others are sizes and places.
_SHAPED = frozenset(
    {
        "Expand",
        "Flatten",
        "ReduceMax",
        "ReduceMin",
        "ReduceSum",
        "Reshape",
        "Slice",
        "Split",
        "Squeeze",
        "Tile",
    }
    | {"Transpose", "Unsqueeze", "CumSum", "TopK"}
)
_ARITHMETIC = frozenset({"Add", "Sub", "Mul", "Div"})
_SHAPES = frozenset({"Cast", "Identity", "Reshape", "Squeeze", "Unsqueeze", "Flatten", "Transpose"})
_CHOICES = frozenset({"TopK", "ArgMax", "Softmax", "LogSoftmax"})


@dataclasses.dataclass(frozen=True)
class Roles:
    """Why layers are left alone, by their node."""

    model: ir.Model
    layers: Sequence[Layer]

    def reasons(self) -> dict[ir.Node, str]:
        tables = list(_tables(self.model))
        vocabularies = {rows for table in tables if (rows := size(table, 0)) is not None}
        heads = {layer.node for layer in self.layers if self._is_head(layer, vocabularies)}
        routers = _routers(self.model, [layer for layer in self.layers if layer.node not in heads])
        found: dict[ir.Node, str] = {}
        for layer in self.layers:
            if layer.node in heads:
                found[layer.node] = "an output head"
            elif layer.node in routers:
                found[layer.node] = "a router: its results are chosen from"
            elif _of_integers(layer.input):
                found[layer.node] = "an embedding: its input is made of integers"
            elif any(value in tables for value in layer.weight.values):
                found[layer.node] = "an embedding: its matrix is a table as well"
        return found

    def _is_head(self, layer: Layer, vocabularies: set[int]) -> bool:
        reached, alone = _reaches_output(layer.output)
        if not reached or layer.weight.outputs in vocabularies:
            return reached
        inputs = self.model.graph.inputs
        features = {
            size(value, -1) for value in inputs if value.dtype is not None and value.dtype.is_floating_point()
        }
        return alone and len(self.layers) > 1 and layer.weight.outputs not in features


def _tables(model: ir.Model) -> Iterator[ir.Value]:
    """Stored tables that a Gather or ORT's embedding operators choose rows of, by what is no constant."""
    for node in model.graph.all_nodes():
        place = {"Gather": (0, 1), "GatherBlockQuantized": (0, 1), "EmbedLayerNormalization": (2, 0)}.get(
            node.op_type
        )
        if place is None or len(node.inputs) <= max(place):
            continue
        table, index = node.inputs[place[0]], node.inputs[place[1]]
        if table is None or index is None or tensor(index) is not None:
            continue
        for value in _stored_behind(table):
            if len(value.shape or ()) >= 2:
                yield value


def _stored_behind(value: ir.Value) -> Iterator[ir.Value]:
    """The constants that a table is: itself, or what it is dequantized, cast or turned from."""
    node = value.producer()
    if node is None:
        if tensor(value) is not None:
            yield value
    elif (
        node.domain == ""
        and node.op_type in ("DequantizeLinear", "Cast", "Identity", "Transpose")
        and node.inputs[0]
    ):
        yield from _stored_behind(node.inputs[0])


def _of_integers(value: ir.Value) -> bool:
    """Whether the value is integers or a one-hot code, in another shape or type."""
    node: ir.Node | None
    while True:
        if value.dtype is not None and not value.dtype.is_floating_point():
            return True
        node = value.producer()
        if node is not None and node.domain == "" and node.op_type == "OneHot":
            return True
        if node is None or node.domain != "" or node.op_type not in _SHAPES or node.inputs[0] is None:
            return False
        value = node.inputs[0]


def _routers(model: ir.Model, layers: Sequence[Layer]) -> set[ir.Node]:
    last = {layer.output: layer for layer in layers}
    deciding: set[ir.Node] = set()
    found: set[ir.Node] = set()
    pending = list(_decisions(model))
    seen: set[ir.Value] = set()
    while pending:
        value = pending.pop()
        if value in seen:
            continue
        seen.add(value)
        layer, node = last.get(value), value.producer()
        if layer is not None:
            found.add(layer.node)
            deciding.update(layer.nodes)
        elif node is not None and _scores(node):
            deciding.add(node)
            read = node.inputs[:1] if node.op_type in _SHAPED else node.inputs
            pending.extend(item for item in read if item is not None)
    found |= _only_for(model, deciding, layers) if found else set()
    return found


def _scores(node: ir.Node) -> bool:
    if node.domain not in ("", MICROSOFT) or node.op_type in ("Shape", "Size"):
        return False
    return node.op_type in _SCORING or len(node.inputs) == 1


def _decisions(model: ir.Model) -> Iterator[ir.Value]:
    for node in model.graph.all_nodes():
        places: Iterable[int] = ()
        if is_neutral(node):
            places = (1, 2)
        elif is_combine(node):
            places = (0, 1)
        elif node.domain == "" and node.op_type in _CHOICES:
            places = (0,)
        yield from (value for at in places if (value := node.inputs[at]) is not None)


def _only_for(model: ir.Model, deciding: set[ir.Node], layers: Sequence[Layer]) -> set[ir.Node]:
    """Layers in front of a router whose results nothing but the router reads, as in routers of several layers."""
    known = {node: layer for layer in layers for node in layer.nodes}
    found: set[ir.Node] = set()
    for graph in model.graphs():
        for node in reversed(graph):
            if node in deciding:
                continue
            readers = [use.node for value in node.outputs for use in value.uses()]
            if not readers or any(value.is_graph_output() for value in node.outputs):
                continue
            if all(reader in deciding for reader in readers):
                deciding.add(node)
                if node in known:
                    found.add(known[node].node)
    return found


def _reaches_output(value: ir.Value) -> tuple[bool, bool]:
    """Whether the value is an output of the model but for shapes and scales, and whether it is nothing else."""
    reached, alone = False, True
    pending, seen = [value], {value}
    while pending:
        current = pending.pop()
        if current.is_graph_output():
            reached = True
        for node, position in current.uses():
            if not _finishes(node, position):
                alone = False
                continue
            for output in node.outputs:
                if output not in seen:
                    seen.add(output)
                    pending.append(output)
    return reached, alone


def _finishes(node: ir.Node, position: int) -> bool:
    if node.domain != "" or node.op_type not in _FINISHING:
        return False
    if node.op_type not in _ARITHMETIC:
        return position == 0
    others = [item for at, item in enumerate(node.inputs) if at != position]
    return all(tensor(item) is not None for item in others) and (
        position == 0 or node.op_type in ("Add", "Mul")
    )
