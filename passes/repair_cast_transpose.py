"""A Cast between a Transpose and a MatMul goes before the Transpose: ONNX Runtime dies of it otherwise.

    MatMul(Cast(Transpose(x)), w) = MatMul(Transpose(Cast(x)), w)

Where the Transpose moves an axis over two others, ORT's fusion of Transpose and MatMul leaves a node without an
operator behind when it swaps the two itself, and a later step of its optimizer reads that: the process ends while the
session is created (microsoft/onnxruntime#28392; seen in 1.32.0, on x86-64). Written the other way round both are right.

Exact: a Cast takes each element alone. Enters If, Loop and Scan bodies and functions. Refused: nothing.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import onnx_ir as ir

from sparse_onnx.core.passes import Outcome, Pass
from sparse_onnx.graph.build import Namespace

#: Cast: ORT makes one of two in a row.
_READERS = ("MatMul", "FusedMatMul", "Cast")


@dataclasses.dataclass(frozen=True)
class RepairCastTranspose(Pass):
    __doc__ = __doc__
    name: ClassVar[str] = "repair_cast_transpose"
    summary: ClassVar[str] = "a cast before a transpose rather than behind it, where ORT dies of it"

    def call(self, model: ir.Model) -> Outcome:
        names, swapped = None, 0
        nodes = [node for graph in model.graphs() for node in graph]
        nodes += [node for function in model.functions.values() for node in function.all_nodes()]
        for node in nodes:  # judged one by one: of two casts in a row the second then follows a transpose
            if crashes(node):
                names = names or Namespace(model)
                _swap(node, names)
                swapped += 1
        return Outcome(model, swapped > 0, swapped, swapped)


def crashes(node: ir.Node) -> bool:
    """Whether the node is a Cast between a Transpose of three or more axes and a MatMul."""
    if node.domain or node.op_type != "Cast":
        return False
    source = node.inputs[0].producer() if node.inputs[0] is not None else None
    if source is None or source.domain or source.op_type != "Transpose" or source.inputs[0] is None:
        return False
    order = source.attributes.get("perm")
    if order is not None and len(order.as_ints()) < 3:
        return False
    return any(reader.op_type in _READERS for reader, _ in node.outputs[0].uses())


def _swap(cast: ir.Node, names: Namespace) -> None:
    before = cast.inputs[0]
    assert before is not None and cast.graph is not None
    transpose = before.producer()
    assert transpose is not None
    source, result = transpose.inputs[0], cast.outputs[0]
    name = cast.name or result.name
    early = ir.node("Cast", [source], attributes=cast.attributes, name=names.free(f"{name}/before_transpose"))
    late = ir.node(
        "Transpose", early.outputs, attributes=transpose.attributes, name=names.free(f"{name}/transpose")
    )
    early.outputs[0].name = names.free(f"{result.name}/before_transpose")
    late.outputs[0].name = names.free(f"{result.name}/transpose")
    early.metadata_props.update(cast.metadata_props)
    late.metadata_props.update(transpose.metadata_props)
    kind = ir.TensorType(ir.DataType(cast.attributes["to"].as_int()))
    early.outputs[0].type = late.outputs[0].type = kind
    early.outputs[0].shape = None if source is None else source.shape
    late.outputs[0].shape = result.shape
    cast.graph.insert_before(cast, [early, late])
    ir.convenience.replace_all_uses_with(result, late.outputs[0], replace_graph_outputs=True)
    late.outputs[0].name = result.name
    cast.graph.remove(cast, safe=True)
    if not before.uses() and not before.is_graph_output() and transpose.graph is not None:
        transpose.graph.remove(transpose, safe=True)
