"""Gated feed-forward layers of a graph: down(act(x gate) * (x up)), where down's rows may be skipped by the gate alone.

    a = act(x gate)     any activation that `matching.kinds` knows, in any spelling: SiLU, GELU, ReLU, ...
    h = a * (x up + up_bias), read by nothing but down; y = h down

The activation a is a value of the graph and stays as it is computed. What is proved is that h is the product of it and
of up's result itself, that nothing else reads up's result or h, and that gate and up read the same rows.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import onnx_ir as ir

from sparse_onnx.blocks import MoEBlock
from sparse_onnx.blocks.spec import GateLayout
from sparse_onnx.core.report import Refusal
from sparse_onnx.matching.expert import read_expert
from sparse_onnx.matching.layers import Layer
from sparse_onnx.matching.layout import rows_of
from sparse_onnx.matching.linear import Linear, Matrix, stored_bias
from sparse_onnx.matching.sites import Sites, joined_name
from sparse_onnx.matching.values import pairs, producer, rank, sole_use


@dataclasses.dataclass(frozen=True, eq=False)
class GatedLayer:
    """
    Attributes:
        name: made of those of its three layers, as `matching.sites` calls them.
        gate, up, down: its layers; I = gate.weight.outputs units.
        activated: ``[..., I]``, the activation of the gate.
        product: ``[..., I]``, the activation times up's result, which down reads.
        up_bias: ``[I]``, or one number for all units, with axes of 1 in front: that an Add behind up's product adds, or
            that the product adds itself; None: no bias.
    """

    name: str
    gate: Layer
    up: Layer
    down: Layer
    activated: ir.Value
    product: ir.Value
    up_bias: ir.Value | None

    @property
    def units(self) -> int:
        return self.down.weight.inputs

    @property
    def nbytes(self) -> int:
        """Of the matrices whose rows can be skipped, as they are stored."""
        return self.up.weight.nbytes + self.down.weight.nbytes


def gated_layers(found: Sites) -> tuple[list[GatedLayer], list[Refusal]]:
    """Those among the layers of sites, in graph order, and why others that multiply two branches are none."""
    known = {id(layer.output): layer for site in found for layer in site.layers}
    names = {layer.node: name for site in found for layer, name in zip(site.layers, site.names, strict=True)}
    gated: list[GatedLayer] = []
    refusals: list[Refusal] = []
    for site in found:
        for layer in site.layers:
            result = _gated(layer, known, names)
            if isinstance(result, str):
                reason = f"layer '{names[layer.node]}': {result}"
                refusals.append(Refusal(reason, layer.node.name or "", "", "calibrate"))
            elif result is not None:
                gated.append(result)
    return gated, refusals


def experts_name(block: MoEBlock) -> str:
    """What the gated layers of a block's experts are called together."""
    return f"{block.name}.gated"


def experts_obstacle(block: MoEBlock) -> str | None:
    """Why the gates of a block's experts cannot say what is skipped; None where they can."""
    spec = block.spec
    if spec.gate_layout is GateLayout.NONE:
        return "its experts have no gate"
    if spec.gate_layout is GateLayout.INTERLEAVED:
        return "its experts' gate and up are every other output of one matrix"
    return "its experts' gate or up is clamped or shifted" if spec.limit or spec.beta else None


def expert_bytes(block: MoEBlock) -> int:
    """Of all experts' up and down, as they are stored."""
    first, last = block.spec.roles[-2], block.spec.roles[-1]
    shared = 2 if block.spec.gate_layout is GateLayout.CONCATENATED else 1
    return block.stored_bytes(first) // shared + block.stored_bytes(last)


def _gated(down: Layer, known: Mapping[int, Layer], names: Mapping[ir.Node, str]) -> GatedLayer | str | None:
    """None where the layer does not read a product of two results of layers' own rows."""
    mul = producer(rows_of(down.input), "Mul")
    if mul is None:
        return None
    sides = [(a, u, own) for a, u in pairs(mul) if (own := _result(u, known)) is not None]
    expert = read_expert(down.output, lambda value: _linear(value, known))
    if isinstance(expert, str):
        return f"no gate is found in front of it: {expert}" if sides else None
    kind = expert.kind
    if kind.gate_layout is not GateLayout.SEPARATE:
        return "its gate and up are halves of one matrix" if kind.gate_layout is not GateLayout.NONE else None
    if kind.limit or kind.beta:
        return "its gate or up is clamped or shifted before they are multiplied"
    gate_node, up_node = expert.layers["gate"].node, expert.layers["up"].node
    side = next(((a, u, own) for a, u, own in sides if own[0].node is up_node), None)
    gate = next((layer for layer in known.values() if layer.node is gate_node), None)
    if side is None or gate is None:
        return "the activation of its gate is no value of the graph"
    activated, unit, (up, bias) = side
    problem = _obstacle(down, gate, up, activated, unit, mul)
    if problem:
        return problem
    name = joined_name([names[gate.node], names[up.node], names[down.node]])
    return GatedLayer(name, gate, up, down, activated, mul.outputs[0], bias)


def _obstacle(
    down: Layer, gate: Layer, up: Layer, activated: ir.Value, unit: ir.Value, mul: ir.Node
) -> str | None:
    product = mul.outputs[0]
    graphs = {id(each.graph) for each in (mul, gate.node, up.node, down.node)}
    units = {gate.weight.outputs, up.weight.outputs, down.weight.inputs}
    if len(graphs) > 1 or len(units) > 1 or gate.weight.inputs != up.weight.inputs:
        return "its gate, up and down do not fit each other"
    if down.input is not product:
        return "the product of its gate and up is reshaped in front of it"
    if sole_use(product) is not down.node:
        return "the product of its gate and up is read elsewhere, too"
    if sole_use(unit) is not mul or (unit is not up.output and sole_use(up.output) is not unit.producer()):
        return "up's result is read elsewhere, too"
    if len({value.dtype for value in (up.input, activated, unit, product, down.output)}) > 1:
        return "its gate, up and down are of different types"
    ranks = {rank(up.input), rank(activated), rank(product)}
    if len(ranks) > 1 or None in ranks:
        return "the axes of its gate and its input are not known to be the same"
    return None


def _result(value: ir.Value, known: Mapping[int, Layer]) -> tuple[Layer, ir.Value | None] | None:
    """The layer whose result a value is, with the bias that an Add behind it adds."""
    layer = known.get(id(value))
    if layer is not None:
        return layer, layer.bias
    adding = producer(value, "Add")
    for product, constant in pairs(adding) if adding is not None else ():
        layer = known.get(id(product))
        if layer is not None and layer.bias is None and stored_bias(constant) is not None:
            return layer, constant
    return None


def _linear(value: ir.Value, known: Mapping[int, Layer]) -> Linear | None:
    """A layer of any kind, for who asks nothing but what it reads and which node it is."""
    found = _result(value, known)
    if found is None:
        return None
    layer, bias = found
    stored = None if bias is None else stored_bias(bias)
    return Linear(layer.input, Matrix(layer.weight.values[0]), stored, layer.weight.out_in, layer.node)
