"""What an expert computes between its matrices, found by evaluating the elementwise nodes there."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from typing import Any

import numpy as np

from sparse_onnx.blocks.spec import Activation, GateLayout
from sparse_onnx.matching.elementwise import activate, bound, evaluate

#: Where the two functions are compared, beside the constants that occur in the graph.
_POINTS = (*np.linspace(-9, 9, 37).tolist(), *(s * 10.0**e for s in (-1, 1) for e in (-4, -2, 2, 4)))
#: Error relative to 1 + |value|. Constants of an exporter have six digits or more, in half precision three; the
#: nearest known function is taken, and any two of them lie further apart than their constants' rounding.
_TOLERANCE = 2e-6
_HALF_TOLERANCE = 4e-3


@dataclasses.dataclass(frozen=True)
class Kind:
    """What an expert computes between its matrices; terms as in `ExpertSpec`."""

    activation: Activation
    gate_layout: GateLayout
    limit: float = 0.0
    alpha: float = 1.0
    beta: float = 0.0


#: One elementwise node: operator, inputs (a step, a leaf, or a constant) and attributes.
Input = tuple[str, Any] | None
Step = tuple[str, str, tuple[Input, ...], tuple[tuple[str, Any], ...]]


@functools.lru_cache(maxsize=512)
def find_kind(
    steps: tuple[Step, ...], order: tuple[int, ...], layout: GateLayout, half: bool
) -> tuple[Kind, bool] | None:
    """The known function that the program computes, and whether its gate is the second leaf of `order`."""
    constants = _constants(steps)
    marks = [s * c * f for c in constants if 1e-6 < c < 1e30 for s in (-1, 1) for f in (0.999, 1, 1.001)]
    points = np.unique(np.array([*_POINTS, *marks]))
    candidates = _activations(constants, any(op_type == "Tanh" for _, op_type, _, _ in steps))
    best, found = _HALF_TOLERANCE if half else _TOLERANCE, None
    if layout is GateLayout.NONE:
        result = _run(steps, {0: points})
        for activation, alpha in candidates:
            error = _error(result, activate(activation, alpha, points))
            if error < best:
                best, found = error, (Kind(activation, layout, alpha=alpha), False)
        return found
    gate, up = (axis.ravel() for axis in np.meshgrid(points, points))
    shifts = (0.0, *constants, *(-c for c in constants))
    for swapped in (False, True):
        first, second = order[::-1] if swapped else order
        result = _run(steps, {first: gate, second: up})
        for limit, beta in itertools.product((0.0, *constants), shifts):
            for activation, alpha in candidates:
                g, u = bound(activation, limit, gate, up)
                error = _error(result, activate(activation, alpha, g) * (u + beta))
                if error < best:
                    best, found = error, (Kind(activation, layout, limit, alpha, beta), swapped)
            if found is not None and best < 1e-12:
                return found
    return found


def _constants(steps: tuple[Step, ...]) -> list[float]:
    """Sizes of the finite constants of a program, in inputs and attributes."""
    found = {abs(v) for _, _, inputs, _ in steps for kind, v in filter(None, inputs) if kind == "constant"}
    found |= {abs(v) for _, _, _, attributes in steps for _, v in attributes if isinstance(v, float)}
    return sorted(value for value in found if np.isfinite(value) and value > 0)


def _activations(constants: list[float], tanh: bool) -> list[tuple[Activation, float]]:
    """Activations with the alphas to try; soft caps only where there is a Tanh, for the sake of time."""
    slopes = dict.fromkeys((1.0, 1.702, *constants))
    caps = dict.fromkeys((1.0, *constants)) if tanh else ()
    others = (Activation.GELU, Activation.GELU_TANH, Activation.RELU, Activation.RELU2)
    return (
        [(Activation.SILU, slope) for slope in slopes]
        + [(activation, 1.0) for activation in others]
        + [(Activation.SILU_SOFTCAP, cap) for cap in caps]
    )


def _run(steps: tuple[Step, ...], leaves: dict[int, np.ndarray]) -> np.ndarray:
    results: list[np.ndarray] = []

    def value(item: Input) -> np.ndarray | None:
        if item is None:
            return None
        kind, content = item
        if kind == "constant":
            return np.asarray(content, np.float64)
        return leaves[content] if kind == "leaf" else results[content]

    for domain, op_type, inputs, attributes in steps:
        try:
            results.append(evaluate(domain, op_type, [value(item) for item in inputs], dict(attributes)))
        except TypeError:  # an attribute or a number of inputs that the operator does not have: nothing known
            return np.array(np.nan)
    return results[-1]


def _error(a: np.ndarray, b: np.ndarray) -> float:
    """Largest difference relative to 1 + |value|; infinite where one of them is not finite."""
    if a.shape != b.shape:
        return np.inf
    with np.errstate(all="ignore"):
        error = np.abs(a - b) / (1 + np.abs(b))
    return float(np.nan_to_num(error, nan=np.inf).max(initial=0.0))
