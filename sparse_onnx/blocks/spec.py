"""What an expert computes, as data: the attributes of `sparse_onnx::MoE` and `sparse_onnx::GatedMoE`.

For one token x (biases left out):

    no gate      y = fc2 act(fc1 x)
    with a gate  g = gate x, u = up x
                 limit > 0: g = min(g, limit), u = clip(u, -limit, limit);
                            with silu_softcap instead u = limit * tanh(u / limit), and g as it is
                 y = down (act(g) * (u + beta))

gpt-oss's clamped SwiGLU is silu with alpha 1.702, beta 1 and limit 7; plain SwiGLU is silu with the defaults.
Inkling 2's softcapped SwiGLU is silu_softcap with alpha 4 (its gate's cap) and limit 25 (that of up).
"""

from __future__ import annotations

import dataclasses
import enum
import math

import numpy as np

DOMAIN = "sparse_onnx"
"""Of the neutral operators, their definitions and their native kernels."""
DOMAIN_VERSION = 1


class Activation(enum.IntEnum):
    """Elementwise functions of an expert. The numbers are those of the node attribute `activation`."""

    SILU = 0
    """x * sigmoid(alpha * x); alpha 1 is SiLU (swish), 1.702 the quick GELU."""
    GELU = 1
    """x/2 * (1 + erf(x / sqrt 2))."""
    GELU_TANH = 2
    """x/2 * (1 + tanh(sqrt(2/pi) * (x + 0.044715 x^3)))."""
    RELU = 3
    """max(x, 0)."""
    RELU2 = 4
    """max(x, 0)^2."""
    SILU_SOFTCAP = 5
    """alpha * tanh(x / alpha) * sigmoid(x): silu whose linear factor is bounded; alpha > 0."""

    @property
    def label(self) -> str:
        """The name in reports: ``silu``, ``gelu``, ``gelu_tanh``, ``relu``, ``relu2``, ``silu_softcap``."""
        return self.name.lower()


class GateLayout(enum.IntEnum):
    """Where an expert's gate is. The first three are values of `MoE`'s attribute `gate_layout`."""

    NONE = 0
    """No gate: fc1 is the up projection alone."""
    CONCATENATED = 1
    """fc1's outputs are all of the gate's, then all of up's."""
    INTERLEAVED = 2
    """fc1's even outputs are the gate's, its odd ones up's."""
    SEPARATE = 3
    """Gate and up are matrices of their own: the operator is `GatedMoE`, which has no attribute for it."""


class WeightLayout(enum.IntEnum):
    """How one expert's matrix lies in memory. The numbers are those of the node attribute `weight_layout`."""

    OUT_IN = 0
    """``[outputs, inputs]``, torch's Linear: y = x Wᵀ."""
    IN_OUT = 1
    """``[inputs, outputs]``, ONNX's MatMul: y = x W."""


@dataclasses.dataclass(frozen=True)
class ExpertSpec:
    """The function that every expert of a block computes, and how its weights lie.

    Args:
        activation: elementwise function of the gate, or of fc1's output where there is no gate.
        gate_layout: where the gate is; it also decides the operator.
        weight_layout: orientation of every matrix of the block.
        limit: clamp of gate (from above) and up (both sides), with silu_softcap the soft cap of up alone; 0 for none.
        alpha: slope of the sigmoid in silu, cap in silu_softcap; the other activations ignore it.
        beta: added to up.

    Raises:
        ValueError: a value that is not finite, a negative limit, a soft cap that is not above 0, or a limit or beta
            where there is no gate.
    """

    activation: Activation
    gate_layout: GateLayout
    weight_layout: WeightLayout
    limit: float = 0.0
    alpha: float = 1.0
    beta: float = 0.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "activation", Activation(self.activation))
        object.__setattr__(self, "gate_layout", GateLayout(self.gate_layout))
        object.__setattr__(self, "weight_layout", WeightLayout(self.weight_layout))
        for name in ("limit", "alpha", "beta"):
            # Attributes are float32; by the shortest text of one, a spec read back equals the one written.
            with np.errstate(over="ignore"):
                value = float(str(np.float32(getattr(self, name))))
            if not math.isfinite(value):
                raise ValueError(f"{name}={getattr(self, name)} is not finite in float32")
            object.__setattr__(self, name, value)
        if self.limit < 0:
            raise ValueError(f"limit={self.limit} is negative; 0 means no clamp")
        if self.activation is Activation.SILU_SOFTCAP and self.alpha <= 0:
            raise ValueError(f"alpha={self.alpha} is a soft cap, which is above 0")
        if not self.gated and (self.limit or self.beta):
            raise ValueError(f"limit={self.limit}, beta={self.beta} act on gate and up, and there is no gate")

    @property
    def name(self) -> str:
        """The activation's name in reports."""
        return self.activation.label

    @property
    def gated(self) -> bool:
        return self.gate_layout is not GateLayout.NONE

    @property
    def op(self) -> str:
        """The neutral operator: ``MoE`` or ``GatedMoE``."""
        return "GatedMoE" if self.gate_layout is GateLayout.SEPARATE else "MoE"

    @property
    def roles(self) -> tuple[str, ...]:
        """Names of the matrices, in input order: ``fc1, fc2`` or ``gate, up, down``."""
        return ROLES[self.op]

    def attributes(self) -> dict[str, int | float]:
        """The node's attributes, all of them, in a fixed order."""
        values: dict[str, int | float] = {"activation": int(self.activation)}
        if self.gate_layout is not GateLayout.SEPARATE:
            values["gate_layout"] = int(self.gate_layout)
        values["weight_layout"] = int(self.weight_layout)
        return values | {"limit": self.limit, "alpha": self.alpha, "beta": self.beta}


ROLES: dict[str, tuple[str, ...]] = {"MoE": ("fc1", "fc2"), "GatedMoE": ("gate", "up", "down")}
"""Matrices of each operator in input order; every one is followed by its bias, ``<role>_bias``."""

INTEGER_ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "MoE": ("activation", "gate_layout", "weight_layout"),
    "GatedMoE": ("activation", "weight_layout"),
}
FLOAT_ATTRIBUTES = ("limit", "alpha", "beta")


def input_names(op: str) -> tuple[str, ...]:
    """All inputs of a neutral operator, in order."""
    weights = (name for role in ROLES[op] for name in (role, f"{role}_bias"))
    return ("tokens", "expert_index", "expert_weight", *weights)
