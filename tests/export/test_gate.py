"""Every gate of the neutral form is recognised by what it computes, and no other is."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")
import torch.nn.functional as F  # noqa: E402

from sparse_onnx.blocks import Activation, ExpertSpec, GateLayout, WeightLayout  # noqa: E402
from sparse_onnx.export import gate  # noqa: E402

SHAPES = [
    (1.0, 0.0, 0.0),
    (1.702, 1.0, 7.0),
    (1.0, 0.0, 2.5),
    (1.0, 0.25, 0.0),
    (1.0, 0.0, 0.5),
    (1.702, 1.0, 0.3),
]


def _specs() -> list[ExpertSpec]:
    specs = [ExpertSpec(act, GateLayout.NONE, WeightLayout.OUT_IN) for act in Activation]
    for activation in (Activation.SILU, Activation.SILU_SOFTCAP):
        specs.append(ExpertSpec(activation, GateLayout.NONE, WeightLayout.OUT_IN, alpha=1.702))
    for layout in (GateLayout.CONCATENATED, GateLayout.INTERLEAVED):
        for activation in Activation:
            for alpha, beta, limit in SHAPES:
                slope = alpha if activation in (Activation.SILU, Activation.SILU_SOFTCAP) else 1.0
                specs.append(ExpertSpec(activation, layout, WeightLayout.IN_OUT, limit, slope, beta))
    return list(dict.fromkeys(specs))


@pytest.mark.parametrize("spec", _specs(), ids=str)
def test_each_form_is_found(spec: ExpertSpec) -> None:
    found = gate.classify(lambda h: gate.evaluate(spec, h), spec.gated, spec.weight_layout)
    assert found == spec


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("limit", [7.0, 0.4, 0.25])
def test_gpt_oss_written_its_own_way(dtype: torch.dtype, limit: float) -> None:
    def gpt_oss(projected: torch.Tensor) -> torch.Tensor:
        projected = projected.to(dtype)
        gate_, up = projected[..., ::2], projected[..., 1::2]
        gate_, up = gate_.clamp(min=None, max=limit), up.clamp(min=-limit, max=limit)
        return (up + 1) * (gate_ * torch.sigmoid(gate_ * 1.702))

    found = gate.classify(gpt_oss, True, WeightLayout.IN_OUT)
    assert found == ExpertSpec(
        Activation.SILU, GateLayout.INTERLEAVED, WeightLayout.IN_OUT, limit, 1.702, 1.0
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("caps", [(4.0, 25.0), (30.0, 0.5), (1.5, 200.0)])
def test_soft_caps_written_their_own_way(caps: tuple[float, float], dtype: torch.dtype) -> None:
    """As transformers' Inkling2SoftcappedSwiGLU computes it."""
    a, b = caps

    def inkling2(projected: torch.Tensor) -> torch.Tensor:
        gate_, up = projected.to(dtype).chunk(2, dim=-1)
        return (torch.tanh(gate_ / a) * a * torch.sigmoid(gate_) * (torch.tanh(up / b) * b)).to(
            projected.dtype
        )

    found = gate.classify(inkling2, True, WeightLayout.OUT_IN)
    assert found == ExpertSpec(Activation.SILU_SOFTCAP, GateLayout.CONCATENATED, WeightLayout.OUT_IN, b, a)


def _soft(x: torch.Tensor, cap: float) -> torch.Tensor:
    return torch.tanh(x / cap) * cap


def _halves(h: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    first, second = h.chunk(2, dim=-1)
    return first, second


UNKNOWN = {
    "softcap": lambda h: torch.tanh(F.silu(_halves(h)[0])) * _halves(h)[1],
    "softcap of the sigmoid's argument too": lambda h: (
        F.silu(_soft(_halves(h)[0], 4)) * _soft(_halves(h)[1], 25)
    ),
    "only up softcapped": lambda h: F.silu(_halves(h)[0]) * _soft(_halves(h)[1], 25),
    "up softcapped far away": lambda h: F.silu(_halves(h)[0]) * _soft(_halves(h)[1], 5e4),
    "gate softcapped far away": lambda h: (
        _soft(_halves(h)[0], 5e4) * torch.sigmoid(_halves(h)[0]) * _halves(h)[1]
    ),
    "softcap and clamp": lambda h: (
        _soft(_halves(h)[0], 4) * torch.sigmoid(_halves(h)[0]) * _halves(h)[1].clamp(-7, 7)
    ),
    "softcap with a slope": lambda h: (
        _soft(_halves(h)[0], 4) * torch.sigmoid(1.702 * _halves(h)[0]) * _soft(_halves(h)[1], 25)
    ),
    "clamp after the activation": lambda h: F.silu(_halves(h)[0]).clamp(max=7) * _halves(h)[1].clamp(-7, 7),
    "up before gate": lambda h: F.silu(_halves(h)[1]) * _halves(h)[0],
    "only up clamped": lambda h: F.silu(_halves(h)[0]) * _halves(h)[1].clamp(-7, 7),
    "gate clamped below too": lambda h: F.silu(_halves(h)[0].clamp(-1, 7)) * _halves(h)[1].clamp(-7, 7),
    "mish": lambda h: F.mish(_halves(h)[0]) * _halves(h)[1],
    "no activation": lambda h: _halves(h)[0] * _halves(h)[1],
    "zero": lambda h: _halves(h)[0] * 0,
    "ungated in disguise": lambda h: F.silu(h),
    "of a fixed width": lambda h: h @ torch.ones(7, 3),
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_others_are_refused(name: str) -> None:
    assert gate.classify(UNKNOWN[name], True, WeightLayout.OUT_IN) is None


def test_an_unknown_activation_without_gate_is_refused() -> None:
    assert gate.classify(F.mish, False, WeightLayout.OUT_IN) is None
    assert gate.classify(lambda h: F.silu(h) * 1.01, False, WeightLayout.OUT_IN) is None
