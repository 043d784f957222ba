"""A `com.microsoft::MoE` or `QMoE` node as experts of the neutral kind."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import onnx_ir as ir

from sparse_onnx.blocks import ExpertSpec, GateLayout
from sparse_onnx.matching.values import tensor

#: The types of a quantized weight's elements, by their bits.
STORED = {2: ir.DataType.UINT2, 4: ir.DataType.UINT4, 8: ir.DataType.UINT8}


class Unlike(Exception):
    """Why a node is not lifted, and what to do about it."""

    def __init__(self, reason: str, hint: str) -> None:
        super().__init__(reason)
        self.reason, self.hint = reason, hint


@dataclasses.dataclass(frozen=True, eq=False)
class Contrib:
    """A node that computes experts of the neutral kind.

    Attributes:
        node: the node.
        spec: what an expert computes.
        roles: the node's projection by neutral role: ``{"fc1": "fc1", "fc2": "fc2"}``, or gate, up and down.
        inputs: by the names of the operators' definition, those that are present.
        experts, hidden, inner: E, D and I.
        top_k: chosen experts of a token.
        normalize: whether the weights of a token's experts are divided by their sum.
        bits: of a weight; 0 where weights are not quantized.
        blocks: elements that share a scale, by projection.
        on_cpu: whether ONNX Runtime's CPU kernel runs this form, which is then the one whose ties count.
    """

    node: ir.Node
    spec: ExpertSpec
    roles: Mapping[str, str]
    inputs: Mapping[str, ir.Value]
    experts: int
    hidden: int
    inner: int
    top_k: int
    normalize: bool
    bits: int
    blocks: Mapping[str, int]
    on_cpu: bool

    @property
    def stored(self) -> ir.DataType:
        """The type of a quantized weight's elements."""
        return STORED[self.bits]

    def outputs(self, projection: str) -> int:
        if projection == "fc2":
            return self.hidden
        fused = self.spec.gate_layout in (GateLayout.INTERLEAVED, GateLayout.CONCATENATED)
        return 2 * self.inner if fused else self.inner

    def width(self, projection: str) -> int:
        """Inputs of a projection."""
        return self.inner if projection == "fc2" else self.hidden


def constant_shape(value: ir.Value) -> tuple[int, ...]:
    """Of a value that is known to be constant."""
    held = tensor(value)
    assert held is not None
    return tuple(held.shape.numpy())
