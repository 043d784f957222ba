"""Equal values become one: `Identity(x)` is x, equal constants are one, what is computed twice is computed once.

Recognisers then compare values by identity, whatever the exporter repeated.

- `Identity`, `Dropout` outside training and `Cast` to the type that a value has are taken out, unless a graph returns
  their output.
- Initializers of equal type, shape and bytes, up to 1 KiB, become one; larger ones if they lie in the same bytes of the
  same file.
- Nodes of equal operator, attributes and inputs become one, in one graph or in a graph and those inside it. Nodes stay
  that draw random numbers, have a graph or more than 1 KiB among their attributes, compute what a graph returns, or are
  of a domain of which nothing is known.

onnx-ir's own passes are not used: its identity elimination renames and repeats outputs, and lets a branch return values
of another graph; its elimination of common subexpressions merges Bernoulli's draws and does not enter subgraphs.

Exact. Enters If, Loop and Scan bodies, not functions. Nodes and boundary values of blocks that are lowered already
stay. Refused: nothing.
"""

from __future__ import annotations

import dataclasses
from collections import ChainMap
from collections.abc import Hashable, MutableMapping, Sequence
from typing import Any, ClassVar

import onnx_ir as ir

from sparse_onnx.blocks.lowered import FORM_KEY, lowered_blocks
from sparse_onnx.core.passes import Outcome, Pass

_SMALL = 1024
_RANDOM = frozenset(
    ("RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike", "Multinomial", "Bernoulli")
)
_PURE = frozenset(
    ("FusedMatMul", "FusedGemm", "Gelu", "QuickGelu", "FastGelu", "BiasGelu", "DequantizeLinear")
)
_PLAIN = (ir.AttributeType.INT, ir.AttributeType.FLOAT, ir.AttributeType.STRING)
_LISTS = (ir.AttributeType.INTS, ir.AttributeType.FLOATS, ir.AttributeType.STRINGS)

Known = MutableMapping[Hashable, Any]


@dataclasses.dataclass(frozen=True)
class ShareValues(Pass):
    __doc__ = __doc__
    name: ClassVar[str] = "share_values"
    summary: ClassVar[str] = "equal values become one value"

    def call(self, model: ir.Model) -> Outcome:
        kept = {
            name
            for block in lowered_blocks(model)
            for name in (block.tokens, block.expert_index, block.expert_weight, block.output, block.scores)
        }
        removed = _share(model.graph, {}, kept)
        return Outcome(model, removed > 0, removed, removed)


def _share(graph: ir.Graph, known: Known, kept: set[str | None]) -> int:
    """How many nodes and initializers of the graph are gone. `known` gains the values of the graph by content."""
    removed = _share_constants(graph, known)
    for node in graph:
        if FORM_KEY not in node.metadata_props:
            removed += _share_node(graph, node, known, kept)
        for body in _bodies(node):
            # A value of the graph that is computed by now is computed whether or not the body runs.
            removed += _share(body, ChainMap({}, *_layers(known)), kept)
    return removed


def _layers(known: Known) -> Sequence[Known]:
    return known.maps if isinstance(known, ChainMap) else [known]


def _bodies(node: ir.Node) -> list[ir.Graph]:
    found: list[ir.Graph] = []
    for attribute in node.attributes.values():
        if attribute.type == ir.AttributeType.GRAPH and not attribute.is_ref():
            found.append(attribute.as_graph())
        elif attribute.type == ir.AttributeType.GRAPHS and not attribute.is_ref():
            found.extend(attribute.as_graphs())
    return found


def _share_constants(graph: ir.Graph, known: Known) -> int:
    removed = 0
    for value in list(graph.initializers.values()):
        tensor = value.const_value
        if tensor is None or value.is_graph_input() or value.is_graph_output():
            continue
        key = _content(tensor)
        first = known.setdefault(("constant", key), value) if key is not None else value
        if first is not value:
            ir.convenience.replace_all_uses_with(value, first)
            del graph.initializers[value.name or ""]
            removed += 1
    return removed


def _content(tensor: ir.TensorProtocol) -> Hashable:
    """Equal for equal tensors; None where nothing is known without reading much."""
    if tensor.dtype == ir.DataType.STRING:
        return None
    head = tensor.dtype, tuple(tensor.shape.numpy())
    if isinstance(tensor, ir.ExternalTensor):
        return *head, tensor.path, tensor.offset or 0
    return (*head, tensor.tobytes()) if tensor.nbytes <= _SMALL else (*head, id(tensor))


def _share_node(graph: ir.Graph, node: ir.Node, known: Known, kept: set[str | None]) -> int:
    removable = not any(value.is_graph_output() or value.name in kept for value in node.outputs)
    same = _same_as_input(node) if removable else None
    if same is not None:
        return _replace(graph, node, [same])
    key = _computation(node)
    if key is None:
        return 0
    first = known.setdefault(key, node)
    return _replace(graph, node, first.outputs) if removable and first is not node else 0


def _same_as_input(node: ir.Node) -> ir.Value | None:
    """The value that the node's first output is equal to by definition."""
    if node.domain or not node.inputs or node.inputs[0] is None:
        return None
    value = node.inputs[0]
    if node.op_type == "Identity":
        return value
    if node.op_type == "Cast":
        to = node.attributes.get("to")
        return value if to is not None and not to.is_ref() and value.dtype == to.as_int() else None
    if node.op_type == "Dropout":
        training = node.inputs[2] if len(node.inputs) > 2 else None
        mask = len(node.outputs) > 1 and bool(node.outputs[1].uses())
        return None if mask or not _is_false(training) else value
    return None


def _is_false(value: ir.Value | None) -> bool:
    if value is None:
        return True
    tensor = None if value.is_graph_input() else value.const_value
    return tensor is not None and tensor.size == 1 and not tensor.numpy().any()


def _computation(node: ir.Node) -> Hashable:
    """Equal for nodes that compute the same; None for nodes that stay."""
    if node.domain:
        if node.domain != "com.microsoft" or node.op_type not in _PURE:
            return None
    elif node.op_type in _RANDOM or (node.op_type == "Dropout" and len(node.inputs) > 2):
        return None
    attributes = []
    for attribute in node.attributes.values():
        kind, value = attribute.type, attribute.value
        if attribute.is_ref():
            return None
        if kind in _PLAIN:
            content: Hashable = repr(value)  # tells 0.0 from -0.0
        elif kind in _LISTS:
            content = repr(tuple(value))
        elif kind == ir.AttributeType.TENSOR and value.nbytes <= _SMALL:
            content = _content(value)
        else:
            content = None
        if content is None:
            return None
        attributes.append((attribute.name, kind, content))
    given = tuple(value.name != "" for value in node.outputs)
    return node.domain, node.op_type, given, tuple(node.inputs), tuple(sorted(attributes, key=_first))


def _first(item: tuple[str, ir.AttributeType, Hashable]) -> str:
    return item[0]


def _replace(graph: ir.Graph, node: ir.Node, values: Sequence[ir.Value]) -> int:
    for old, new in zip(node.outputs, values, strict=False):
        new.shape = new.shape or old.shape
        new.type = new.type or old.type
        ir.convenience.replace_all_uses_with(old, new)
    graph.remove(node, safe=True)
    return 1
