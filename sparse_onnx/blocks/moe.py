"""A view of the neutral mixture-of-experts operators: a node, its values by role, and what they add up to."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterator, Mapping

import numpy as np
import onnx_ir as ir

from sparse_onnx.blocks.spec import (
    DOMAIN,
    FLOAT_ATTRIBUTES,
    INTEGER_ATTRIBUTES,
    ROLES,
    Activation,
    ExpertSpec,
    GateLayout,
    WeightLayout,
    input_names,
)
from sparse_onnx.core.errors import ModelError
from sparse_onnx.graph.external import read_array

NAME_KEY = "sparse_onnx.block"
"""Node metadata: the name of the block that the node belongs to."""

SPELLING_KEY = "sparse_onnx.spelling"
"""Metadata of a neutral node: how the model that it was recognised in spelled it."""

_LARGEST_BIAS = 64 << 20
"""Bytes of a constant that `is_zero` is willing to read."""


@dataclasses.dataclass(frozen=True, eq=False)
class MoEBlock:
    """One `MoE` or `GatedMoE` node.

    Attributes:
        node: the node.
        spec: what each expert computes.
        tokens: ``[T, D]``.
        expert_index: ``[T, K]`` int64, each in [0, E]; E is a dropped slot.
        expert_weight: ``[T, K]``, of a floating-point type of its own.
        weights: the experts' matrices and biases by role, in input order (``fc1, fc1_bias, fc2, fc2_bias`` or
            ``gate, gate_bias, up, up_bias, down, down_bias``).
        output: ``[T, D_out]`` of the tokens' type.
        experts, hidden, inner, top_k, hidden_out: E, D, I (behind the gate), K and D_out; None where unknown.
        dtype: of the tokens.
    """

    node: ir.Node
    spec: ExpertSpec
    tokens: ir.Value
    expert_index: ir.Value
    expert_weight: ir.Value
    weights: dict[str, ir.Value]
    output: ir.Value
    experts: int | None
    hidden: int | None
    inner: int | None
    top_k: int | None
    hidden_out: int | None
    dtype: ir.DataType

    @staticmethod
    def of(node: ir.Node) -> MoEBlock | None:
        """The view of a node; None for a node of another operator.

        Raises:
            ModelError: missing inputs or attributes, shapes that contradict each other, or no known type.
        """
        if not is_neutral(node):
            return None
        names = input_names(node.op_type)
        inputs = {name: value for name, value in zip(names, node.inputs, strict=False) if value is not None}
        if len(node.inputs) != len(names) or len(inputs) != len(names) or len(node.outputs) != 1:
            raise _malformed(node, f"needs the inputs {', '.join(names)} and one output")
        spec = _spec(node)
        sizes = _sizes(node, spec, inputs)
        dtype = inputs["tokens"].dtype or _dtype(inputs[spec.roles[0]])
        if dtype is None:
            raise _malformed(node, "works on tokens of unknown type; run shape inference first")
        return MoEBlock(
            node=node,
            spec=spec,
            tokens=inputs["tokens"],
            expert_index=inputs["expert_index"],
            expert_weight=inputs["expert_weight"],
            weights={name: inputs[name] for name in names[3:]},
            output=node.outputs[0],
            experts=sizes.get("E"),
            hidden=sizes.get("D"),
            inner=sizes.get("I"),
            top_k=sizes.get("K"),
            hidden_out=sizes.get("O"),
            dtype=dtype,
        )

    @property
    def op(self) -> str:
        return self.node.op_type

    @property
    def gated(self) -> bool:
        return self.spec.gated

    @property
    def name(self) -> str:
        """The block's name in reports: what its exporter called it, else the node's name or its output's."""
        return self.node.metadata_props.get(NAME_KEY) or self.node.name or self.output.name or self.op

    @property
    def spelling(self) -> str:
        """How the block was written where it was found; ``neutral`` for one that was exported so."""
        return self.node.metadata_props.get(SPELLING_KEY, "neutral")

    @functools.cached_property
    def parameters(self) -> int | None:
        """Elements of all matrices, and of the biases that are not provably zero; None where unknown."""
        counted = (v for name, v in self.weights.items() if not (name.endswith("_bias") and is_zero(v)))
        sizes = [_elements(value) for value in counted]
        return sum(size for size in sizes if size is not None) if None not in sizes else None

    @property
    def active_parameters(self) -> int | None:
        """Parameters that one token uses: those of top_k experts. None where unknown."""
        if self.parameters is None or self.top_k is None or not self.experts:
            return None
        return self.parameters // self.experts * min(self.top_k, self.experts)

    @functools.cached_property
    def weight_bytes(self) -> int:
        """Bytes of all matrices and biases as they are stored; quantized ones in their own width."""
        return sum(map(self.stored_bytes, self.weights))

    def stored_bytes(self, role: str) -> int:
        """Bytes of one matrix or bias, all experts', as it is stored."""
        return _stored_bytes(self.weights[role])


def is_neutral(node: ir.Node) -> bool:
    """Whether the node is one of the neutral mixture-of-experts operators."""
    return node.domain == DOMAIN and node.op_type in ROLES and node.overload == ""


def blocks(model: ir.Model) -> list[MoEBlock]:
    """All blocks in graph order, those in If, Loop and Scan bodies included, those in functions not.

    Raises:
        ModelError: a malformed block.
    """
    return list(_blocks(model.graph))


def _blocks(graph: ir.Graph) -> Iterator[MoEBlock]:
    for node in ir.traversal.RecursiveGraphIterator(graph):
        block = MoEBlock.of(node)
        if block is not None:
            yield block


def make_node(
    spec: ExpertSpec,
    tokens: ir.Value,
    expert_index: ir.Value,
    expert_weight: ir.Value,
    weights: Mapping[str, ir.Value],
    *,
    name: str,
) -> ir.Node:
    """The neutral node of a block. The caller puts it into a graph, and later calls `attach_functions`.

    Args:
        spec: decides the operator.
        tokens: ``[T, D]``; its type becomes the output's.
        expert_index: ``[T, K]`` int64.
        expert_weight: ``[T, K]``.
        weights: matrices and biases by role, as in `MoEBlock.weights`, all of them.
        name: of the block and of the node; the output is called ``<name>/output``.

    Raises:
        ModelError: a missing or unknown role, or shapes that contradict each other.
    """
    names = input_names(spec.op)[3:]
    if set(weights) != set(names):
        raise ModelError(
            f"{spec.op} has the weights {', '.join(names)}, not {', '.join(weights)}", where=name
        )
    attributes = [
        ir.AttrInt64(key, value) if isinstance(value, int) else ir.AttrFloat32(key, value)
        for key, value in spec.attributes().items()
    ]
    output = ir.Value(name=f"{name}/output", type=tokens.type)
    node = ir.Node(
        DOMAIN,
        spec.op,
        [tokens, expert_index, expert_weight, *(weights[key] for key in names)],
        attributes,
        outputs=[output],
        name=name,
        metadata_props={NAME_KEY: name},
    )
    block = MoEBlock.of(node)
    assert block is not None
    if tokens.shape is not None:
        output.shape = ir.Shape([tokens.shape[0], block.hidden_out])
    return node


def is_zero(value: ir.Value) -> bool:
    """Whether the value is a constant of zeros: an initializer that no caller can override, or computed so.

    Constants above 64 MiB are not read, and count as not zero.
    """
    producer = value.producer()
    if producer is not None and producer.domain == "" and producer.op_type == "ConstantOfShape":
        fill = producer.attributes.get("value")
        return fill is None or (not fill.is_ref() and not fill.as_tensor().numpy().any())
    if value.is_graph_input():
        return False
    tensor = ir.convenience.get_const_tensor(value)
    if tensor is None or tensor.dtype == ir.DataType.STRING or tensor.nbytes > _LARGEST_BIAS:
        return False
    return not np.any(read_array(tensor))


def _spec(node: ir.Node) -> ExpertSpec:
    integers = {
        name: _attribute(node, name, ir.AttributeType.INT).as_int()
        for name in INTEGER_ATTRIBUTES[node.op_type]
    }
    floats = [_attribute(node, name, ir.AttributeType.FLOAT).as_float() for name in FLOAT_ATTRIBUTES]
    try:
        spec = ExpertSpec(
            Activation(integers["activation"]),
            GateLayout(integers.get("gate_layout", GateLayout.SEPARATE)),
            WeightLayout(integers["weight_layout"]),
            *floats,
        )
    except ValueError as error:
        raise _malformed(node, f"has an attribute out of range: {error}") from None
    if spec.op != node.op_type:
        raise _malformed(node, f"has an attribute out of range: gate_layout {int(spec.gate_layout)}")
    return spec


def _attribute(node: ir.Node, name: str, kind: ir.AttributeType) -> ir.Attr:
    attribute = node.attributes.get(name)
    if attribute is None or attribute.is_ref():
        raise _malformed(node, f"lacks the attribute '{name}'")
    if attribute.type != kind:
        raise _malformed(node, f"has an attribute '{name}' that is {attribute.type.name}, not {kind.name}")
    return attribute


def _axes(spec: ExpertSpec) -> dict[str, str]:
    """Axes of each input: T tokens, K slots, E experts, D hidden, W width of fc1, I inner, O output."""
    first = "W" if spec.gated and spec.op == "MoE" else "I"
    axes = {"tokens": "TD", "expert_index": "TK", "expert_weight": "TK"}
    for role in spec.roles:
        out, into = ("O", "I") if role == spec.roles[-1] else (first, "D")
        axes[role] = f"E{out}{into}" if spec.weight_layout == WeightLayout.OUT_IN else f"E{into}{out}"
        axes[f"{role}_bias"] = f"E{out}"
    return axes


def _sizes(node: ir.Node, spec: ExpertSpec, inputs: Mapping[str, ir.Value]) -> dict[str, int]:
    """Sizes of the axes by letter, as far as they are known."""
    sizes: dict[str, int] = {}
    source: dict[str, str] = {}

    def learn(letter: str, size: int, name: str) -> None:
        if sizes.setdefault(letter, size) != size:
            raise _malformed(node, f"has shapes that contradict each other: {source[letter]} and {name}")
        source.setdefault(letter, name)

    for name, letters in _axes(spec).items():
        shape = inputs[name].shape
        if shape is None:
            continue
        if len(shape) != len(letters):
            raise _malformed(node, f"takes '{name}' with {len(letters)} axes, not {shape}")
        for letter, size in zip(letters, shape, strict=True):
            if isinstance(size, int):
                learn(letter, size, f"{name} {shape}")
    if "W" in sizes:
        if sizes["W"] % 2:
            raise _malformed(node, f"has gate and up in {source['W']}, an odd number of outputs")
        learn("I", sizes["W"] // 2, source["W"])
    return sizes


def _malformed(node: ir.Node, problem: str) -> ModelError:
    return ModelError(f"{DOMAIN}::{node.op_type} {problem}", where=f"node '{node.name}'")


def _dtype(value: ir.Value) -> ir.DataType | None:
    tensor = ir.convenience.get_const_tensor(value)
    return value.dtype if tensor is None else tensor.dtype


def _elements(value: ir.Value) -> int | None:
    if value.shape is None or not value.shape.is_static():
        return None
    return math.prod(value.shape.numpy())


def _stored_bytes(value: ir.Value) -> int:
    tensor = ir.convenience.get_const_tensor(value)
    if tensor is not None:
        return tensor.nbytes
    producer = value.producer()
    if producer is not None and producer.domain == "" and producer.op_type == "DequantizeLinear":
        return sum(_stored_bytes(source) for source in producer.inputs if source is not None)
    elements = _elements(value)
    if elements is None or value.dtype is None:
        return 0
    return -(-elements * value.dtype.bitwidth // 8)
