"""Prefill by the layers that the model had, where ONNX Runtime's are faster: their own copy of the weights.

    many = Size(X) > MOST K
    Z    = ThresholdedLinearNBits(Slice(X, 0, Where(many, 0, all)), ...)
    Y    = If(many) { the layer as it was, of X } else { Z }

The native kernel multiplies many rows in float32, as fast as ONNX Runtime does; a MatMulNBits that rounds its inputs to
8 bits (`accuracy_level` 4) multiplies integers, and is faster from a few rows on. So such layers, and no others, get a
second copy of their weights: in the file as they were, and in memory as ONNX Runtime packs them. Runs of more than MOST
rows skip nothing there; that is the layer bit by bit, its rounding included. The thresholded layer, which gets no rows
then, stays in the graph itself: ORT 1.32 cannot load its function's body in a branch, since there it looks for the
integers of a DequantizeLinear in the branch alone (`TransposeDQWeightsForMatMulNBits`).
"""

from __future__ import annotations

import dataclasses
from typing import Literal

import numpy as np
import onnx_ir as ir

from sparse_onnx.blocks.thresholded import is_thresholded
from sparse_onnx.core.errors import ImpossibleError
from sparse_onnx.graph.branches import Branch, emit_if, inside
from sparse_onnx.graph.build import Emitter, Namespace
from sparse_onnx.matching.layers import Layer, layer
from sparse_onnx.matching.linear import stored_bias
from sparse_onnx.matching.values import attribute, pairs, tensor
from sparse_onnx.sparsify.record import ACTING_KEY, acting

Prefill = Literal["shared", "copy"]
PREFILLS: tuple[Prefill, ...] = ("shared", "copy")
#: Rows up to which the thresholded layer runs. Measured, 4096x4096, AVX-512, one thread: at 4 rows and half of the
#: inputs skipped it takes as long as MatMulNBits (int8 2.14 and 2.35 ms, int4 1.67 and 1.70), at 6 rows longer.
MOST_ROWS = 4
#: Metadata of the If.
COPY_KEY = "sparse_onnx.prefill"


@dataclasses.dataclass(frozen=True)
class Copied:
    """How many layers have a copy, its bytes, and how many thresholded layers have none."""

    layers: int
    nbytes: int
    others: int


def layer_of(before: dict[str, ir.Value], output: str) -> tuple[Layer, ir.TensorProtocol | None] | None:
    """The layer that computes a value in the model without thresholds, an Add behind it counted in, and its bias.

    Args:
        before: that model's values by name.
        output: the value's name.
    """
    value = before.get(output)
    node = None if value is None else value.producer()
    if node is None:
        return None
    found = layer(node)
    if found is not None:
        return found, None if found.bias is None else tensor(found.bias)
    for product, constant in pairs(node) if node.op_type == "Add" and node.domain == "" else ():
        inner = product.producer()
        own = None if inner is None or stored_bias(constant) is None else layer(inner)
        if own is not None and own.bias is None:
            return own, tensor(constant)
    return None


def copy_dense(model: ir.Model, before: ir.Model) -> Copied:
    """Gives layers of the main graph that round their inputs a copy for many rows.

    Args:
        model: with thresholds, of the mode `native`.
        before: the same without.

    Raises:
        ImpossibleError: no layer would be faster.
    """
    old = {value.name or "": value for node in before.graph for value in node.outputs}
    values = {value.name or "": value for value in model.graph.inputs}
    values |= {value.name or "": value for node in model.graph for value in node.outputs}
    names, apart = Namespace(model), {}
    layers = nbytes = others = 0
    for item in acting(model):
        found = None if item.inner else layer_of(old, item.layer)
        node = values[item.layer].producer() if item.layer in values and not item.inner else None
        x = None if found is None else values.get(found[0].input.name or "")
        if (
            found is None
            or node is None
            or x is None
            or not is_thresholded(node)
            or not _rounds(found[0].node)
        ):
            others += 1
            continue
        if id(x) not in apart:
            apart[id(x)] = _told_apart(model, names, node, x, found[0].weight.inputs)
        _wrap(model, names, node, x, apart[id(x)], found)
        layers, nbytes = layers + 1, nbytes + found[0].weight.nbytes
    if not layers:
        raise ImpossibleError(
            "no thresholded layer was a MatMulNBits that rounds its inputs to 8 bits (accuracy_level 4) in the main "
            "graph, and others are not faster by a copy",
            "leave out --prefill copy: the kernels multiply many rows, too",
        )
    return Copied(layers, nbytes, others)


def thresholded_of(choice: ir.Node) -> ir.Node:
    """The thresholded layer that such an If chooses for few rows."""
    copied = choice.attributes["else_branch"].as_graph().outputs[0].producer()
    found = None if copied is None or copied.inputs[0] is None else copied.inputs[0].producer()
    assert found is not None
    return found


def _fits(node: ir.Node, x: ir.Value, was: ir.Node) -> bool:
    """Whether it is a thresholded layer of several rows that was one that rounds its inputs."""
    return (
        is_thresholded(node)
        and x is node.inputs[0]
        and x.shape is not None
        and len(x.shape) > 1
        and _rounds(was)
    )


def _rounds(node: ir.Node) -> bool:
    return node.op_type == "MatMulNBits" and attribute(node, "accuracy_level", 0) == 4


def _told_apart(
    model: ir.Model, names: Namespace, node: ir.Node, x: ir.Value, inputs: int
) -> tuple[ir.Value, ir.Value]:
    """Whether x has many rows, and x where it has few: where it has many, nothing."""
    emit = Emitter(model.graph, names, f"{x.name}/rows")
    most = emit.constant(np.asarray(MOST_ROWS * inputs, np.int64))
    many = emit.op("Greater", emit.op("Size", x), most)
    many.dtype, many.shape = ir.DataType.BOOL, ir.Shape(())
    end = emit.op("Where", many, emit.ints(0), emit.ints(np.iinfo(np.int64).max))
    few = emit.op("Slice", x, emit.ints(0), end, emit.ints(0))
    few.type = x.type
    if x.shape is not None:
        few.shape = ir.Shape([None, *x.shape[1:]])
    model.graph.insert_before(node, emit.nodes)
    return many, few


def _wrap(
    model: ir.Model,
    names: Namespace,
    node: ir.Node,
    x: ir.Value,
    apart: tuple[ir.Value, ir.Value],
    found: tuple[Layer, ir.TensorProtocol | None],
) -> None:
    dense, bias = found
    many, few = apart
    graph, result = model.graph, node.outputs[0]
    name, uses, returned = result.name, list(result.uses()), result.is_graph_output()
    emit = Emitter(graph, names, f"{node.name}/prefill")
    then, other = inside(emit, "dense"), inside(emit, "skipping")
    given: list[ir.Value | None] = [x]
    for value in dense.node.inputs[1:]:
        held = None if value is None or not value.name else tensor(value)
        given.append(None if held is None else _held(graph, names, held))
    every = then.op(dense.node.op_type, *given, domain=dense.node.domain, **dict(dense.node.attributes))
    if bias is not None and dense.bias is None:
        every = then.op("Add", every, _held(graph, names, bias))
    every.type, every.shape = result.type, result.shape
    told: tuple[tuple[ir.DataType, list[None]], ...] = ()
    if result.shape is not None and result.dtype is not None:
        told = ((result.dtype, [None] * len(result.shape)),)
    [chosen] = emit_if(emit, many, Branch(then, [every]), Branch(other, [result]), told)
    chosen.type, chosen.shape = result.type, result.shape
    if result.shape is not None:
        result.shape = ir.Shape([None, *result.shape[1:]])
    node.replace_input_with(0, few)
    graph.insert_after(node, emit.nodes)
    result.name, chosen.name = names.free(f"{node.name}/few"), name
    for use in uses:
        use.node.replace_input_with(use.idx, chosen)
    if returned:
        graph.outputs[list(graph.outputs).index(result)] = chosen
    emit.nodes[-1].metadata_props[ACTING_KEY] = node.metadata_props.pop(ACTING_KEY)
    emit.nodes[-1].metadata_props[COPY_KEY] = str(MOST_ROWS)


def _held(graph: ir.Graph, names: Namespace, held: ir.TensorProtocol) -> ir.Value:
    """The tensor as an initializer, the one that is there already where it is the same."""
    known = graph.initializers.get(held.name or "")
    if known is not None and known.const_value is held:
        return known
    return names.initializer(graph, ("prefill", id(held)), held)
