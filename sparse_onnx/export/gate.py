"""What an experts module does between its two matrices, found by evaluating it: no class or attribute names.

The neutral form expresses::

    gated:      f(g, u) = act(min(g, limit)) * (clip(u, -limit, limit) + beta)
    not gated:  f(h)    = act(h)
    act:        x * sigmoid(alpha * x), gelu, gelu with tanh, relu, relu²

    softcapped: f(g, u) = act(g) * (limit * tanh(u / limit) + beta), f(h) = act(h)
    act:        alpha * tanh(x / alpha) * sigmoid(x)

The parameters are read off at a few points, then the whole function is compared on thousands more. What
differs anywhere has no neutral form and is not guessed at.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from sparse_onnx.blocks import Activation, ExpertSpec, GateLayout, WeightLayout

#: Points to read parameters off: far outside any limit, and within one. Nearer to 0 float32 is too coarse.
_FAR, _NEAR = 1e4, (1.0, 1 / 4)
_ROWS = 2048


def evaluate(spec: ExpertSpec, projected: Tensor) -> Tensor:
    """`[..., 2I]` (`[..., I]` when not gated) -> `[..., I]`."""
    if spec.gate_layout == GateLayout.NONE:
        return _activate(spec, projected)
    gate, up = _halves(projected, spec.gate_layout)
    if spec.limit and spec.activation == Activation.SILU_SOFTCAP:
        up = spec.limit * torch.tanh(up / spec.limit)
    elif spec.limit:
        gate, up = gate.clamp(max=spec.limit), up.clamp(-spec.limit, spec.limit)
    return _activate(spec, gate) * (up + spec.beta)


def _activate(spec: ExpertSpec, x: Tensor) -> Tensor:
    if spec.activation == Activation.SILU:
        return x * torch.sigmoid(spec.alpha * x)
    if spec.activation == Activation.SILU_SOFTCAP:
        return spec.alpha * torch.tanh(x / spec.alpha) * torch.sigmoid(x)
    if spec.activation == Activation.GELU:
        return F.gelu(x)
    if spec.activation == Activation.GELU_TANH:
        return F.gelu(x, approximate="tanh")
    positive = F.relu(x)
    return positive if spec.activation == Activation.RELU else positive * positive


def _halves(projected: Tensor, layout: GateLayout) -> tuple[Tensor, Tensor]:
    """Gate and up, views of `[..., 2I]`."""
    if layout == GateLayout.INTERLEAVED:
        return projected[..., ::2], projected[..., 1::2]
    gate, up = projected.chunk(2, dim=-1)
    return gate, up


@torch.no_grad()
def classify(
    function: Callable[[Tensor], Tensor], gated: bool, weight_layout: WeightLayout
) -> ExpertSpec | None:
    """The neutral form of `function`, or None when it has none.

    Args:
        function: `[n, 2I] -> [n, I]` when gated, else `[n, I] -> [n, I]`, for any I.
        gated: whether one half of the columns gates the other.
        weight_layout: goes into the result as it is.
    """
    layouts = (GateLayout.CONCATENATED, GateLayout.INTERLEAVED) if gated else (GateLayout.NONE,)
    try:
        for layout in layouts:
            for candidate in _candidates(function, layout, weight_layout):
                if _same(function, candidate):
                    return candidate
    except (
        ArithmeticError,
        RuntimeError,
        TypeError,
        ValueError,
    ):  # one that needs another width, type or argument
        return None
    return None


def _candidates(
    function: Callable[[Tensor], Tensor], layout: GateLayout, weight_layout: WeightLayout
) -> Iterator[ExpertSpec]:
    """Forms with the parameters that a few points of the function imply."""

    def at(gate: float, up: float = 0.0) -> float:
        if layout == GateLayout.NONE:
            row = torch.full((1, 4), gate, dtype=torch.float64)
        else:
            row = torch.empty(1, 8, dtype=torch.float64)
            for half, value in zip(_halves(row, layout), (gate, up), strict=True):
                half.fill_(value)
        return float(function(row).reshape(-1)[0])

    yield from _clamped(at, layout, weight_layout)
    yield from _softcapped(at, layout, weight_layout)


def _clamped(
    at: Callable[..., float], layout: GateLayout, weight_layout: WeightLayout
) -> Iterator[ExpertSpec]:
    for near in _NEAR:
        limit = beta = 0.0
        if layout == GateLayout.NONE:
            activated = at(near)
        else:
            activated = (at(near, near) - at(near, 0.0)) / near  # f is affine in u near 0
            if not math.isfinite(activated) or activated == 0:
                continue
            beta = _rounded(at(near, 0.0) / activated)
            far = at(near, _FAR) / activated - beta
            limit = 0.0 if math.isclose(far, _FAR, rel_tol=1e-3) else _rounded(far)
            if limit < 0:
                continue
        slopes = [1.0]
        if 0.5 < activated / near < 1:
            slopes.append(_rounded(math.log(activated / (near - activated)) / near))
        for slope in slopes:
            yield ExpertSpec(Activation.SILU, layout, weight_layout, limit, slope, beta)
        for activation in (Activation.GELU, Activation.GELU_TANH, Activation.RELU, Activation.RELU2):
            yield ExpertSpec(activation, layout, weight_layout, limit, 1.0, beta)


def _softcapped(
    at: Callable[..., float], layout: GateLayout, weight_layout: WeightLayout
) -> Iterator[ExpertSpec]:
    """Far from 0 the gate's factor is alpha itself, and up's is limit."""
    limit = beta = 0.0
    if layout == GateLayout.NONE:
        alpha = at(_FAR)
    else:
        zero, step, far = at(_FAR, 0.0), at(_FAR, 1.0), at(_FAR, _FAR)
        alpha, bounded = step - zero, far - zero  # without a limit; with one alpha * limit * tanh(u / limit)
        if 0 < alpha < bounded < alpha * _FAR * (1 - 1e-6):
            limit = 1 / math.atanh(alpha / bounded)
            alpha = bounded / limit
        beta = zero / alpha if alpha > 0 else 0.0
    if math.isfinite(alpha + beta) and _rounded(alpha) > 0:
        spec = (_rounded(limit), _rounded(alpha), _rounded(beta))
        yield ExpertSpec(Activation.SILU_SOFTCAP, layout, weight_layout, *spec)


def _rounded(value: float) -> float:
    """Six digits: what a person wrote, read through the rounding of float32."""
    return float(f"{value:.6g}") if abs(value) > 1e-6 else 0.0


def _same(function: Callable[[Tensor], Tensor], candidate: ExpertSpec) -> bool:
    generator = torch.Generator().manual_seed(0)
    width = 16 if candidate.gated else 8
    normal = torch.randn(_ROWS, width, dtype=torch.float64, generator=generator)
    for scale in (0.05, 1.0, 6.0, 60.0, _FAR):  # in the activation's bend, and past any clamp
        expected, actual = function(normal * scale), evaluate(candidate, normal * scale)
        if expected.shape != actual.shape:
            return False
        if not torch.allclose(actual, expected.to(torch.float64), rtol=1e-5, atol=1e-5 * scale):
            return False
    return True
