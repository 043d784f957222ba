"""Every place of a model that holds a tensor: initializers of all graphs, tensor attributes of all nodes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, MutableMapping

import onnx_ir as ir


@dataclasses.dataclass(frozen=True)
class Slot:
    """One place with a tensor. `replace` puts another tensor there and answers with the way back."""

    name: str
    tensor: ir.TensorProtocol
    is_initializer: bool
    replace: Callable[[ir.TensorProtocol], Callable[[], None]]


def all_graphs(model: ir.Model) -> Iterator[ir.Graph]:
    """The main graph and all subgraphs, also those in function bodies (`ir.Model.graphs` leaves them out)."""
    yield from model.graphs()
    for function in model.functions.values():
        yield from function.subgraphs()


def tensor_slots(model: ir.Model) -> list[Slot]:
    """All tensors of the model, in a fixed order."""
    slots = [
        _initializer(value)
        for graph in all_graphs(model)
        for value in graph.initializers.values()
        if value.const_value is not None
    ]
    bodies: list[ir.Graph | ir.Function] = [model.graph, *model.functions.values()]
    for body in bodies:
        for node in body.all_nodes():
            slots.extend(_attributes(node.name or node.op_type, node.attributes))
    for function in model.functions.values():
        slots.extend(_attributes(function.name, function.attributes))
    return slots


def _initializer(value: ir.Value) -> Slot:
    tensor = value.const_value
    assert tensor is not None

    def put(new: ir.TensorProtocol) -> None:
        value.const_value = new

    def replace(new: ir.TensorProtocol) -> Callable[[], None]:
        put(new)
        return lambda: put(tensor)

    return Slot(value.name or "", tensor, True, replace)


def _attributes(owner: str, attributes: MutableMapping[str, ir.Attr]) -> Iterator[Slot]:
    for key, attribute in attributes.items():
        if attribute.is_ref() or attribute.value is None:
            continue
        if attribute.type == ir.AttributeType.TENSOR:
            yield _attribute(owner, attributes, key, None, attribute.value)
        elif attribute.type == ir.AttributeType.TENSORS:
            for index, tensor in enumerate(attribute.value):
                yield _attribute(owner, attributes, key, index, tensor)


def _attribute(
    owner: str,
    attributes: MutableMapping[str, ir.Attr],
    key: str,
    index: int | None,
    tensor: ir.TensorProtocol,
) -> Slot:
    def replace(new: ir.TensorProtocol) -> Callable[[], None]:
        before = attributes[key]
        if index is None:
            attributes[key] = ir.AttrTensor(key, new, doc_string=before.doc_string)
        else:
            tensors = list(before.value)
            tensors[index] = new
            attributes[key] = ir.AttrTensors(key, tensors, doc_string=before.doc_string)

        def undo() -> None:
            attributes[key] = before

        return undo

    return Slot(f"{owner}.{key}", tensor, False, replace)
