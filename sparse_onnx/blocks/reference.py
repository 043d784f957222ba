"""The neutral operators in numpy: the oracle of verification, which shares nothing with what ORT runs."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from sparse_onnx.blocks.spec import Activation, ExpertSpec, GateLayout, WeightLayout

_PART_BYTES = 32 << 20
"""Bytes of a matrix that are converted at once."""


def reference(
    spec: ExpertSpec,
    tokens: np.ndarray,
    expert_index: np.ndarray,
    expert_weight: np.ndarray,
    *,
    accumulate: npt.DTypeLike = np.float64,
    **weights: np.ndarray,
) -> np.ndarray:
    """``y[t] = sum_k expert_weight[t, k] * expert_{expert_index[t, k]}(tokens[t])``, one expert at a time.

    Weights may be memory-mapped: only experts that a token is sent to are read, and of each only a part at a
    time, so that memory is bounded by the activations and not by the weights.

    Args:
        spec: what each expert computes.
        tokens: ``[T, D]``.
        expert_index: ``[T, K]`` integers in [0, E]; a slot with E adds nothing, whatever it holds.
        expert_weight: ``[T, K]``.
        accumulate: type of all arithmetic; nothing is rounded to the tokens' type before the end.
        weights: matrices and biases by role, all of them: ``fc1, fc1_bias, fc2, fc2_bias`` or
            ``gate, gate_bias, up, up_bias, down, down_bias``.

    Returns:
        ``[T, D_out]`` in the tokens' type.

    Raises:
        ValueError: a role that is missing or unknown, or an index outside [0, E].
    """
    names = [name for role in spec.roles for name in (role, f"{role}_bias")]
    if set(weights) != set(names):
        raise ValueError(f"{spec.op} has the weights {', '.join(names)}, not {', '.join(weights)}")
    experts, outputs = weights[f"{spec.roles[-1]}_bias"].shape
    if expert_index.size and not (expert_index.min() >= 0 and expert_index.max() <= experts):
        raise ValueError(f"expert_index outside [0, {experts}]")
    result = np.zeros((len(tokens), outputs), accumulate)
    with np.errstate(all="ignore"):
        for expert in np.unique(expert_index[expert_index < experts]):
            token, slot = np.nonzero(expert_index == expert)
            rows = tokens[token].astype(accumulate)
            own = {name: value[expert] for name, value in weights.items()}
            rows = _feed_forward(spec, rows, own) * expert_weight[token, slot, None].astype(accumulate)
            for k in np.unique(slot):  # within one slot no token comes twice, so += loses nothing
                result[token[slot == k]] += rows[slot == k]
        return result.astype(tokens.dtype)


def _feed_forward(spec: ExpertSpec, rows: np.ndarray, own: Mapping[str, np.ndarray]) -> np.ndarray:
    return _linear(spec, inner_rows(spec, rows, own), own, spec.roles[-1])


def inner_rows(spec: ExpertSpec, rows: np.ndarray, own: Mapping[str, np.ndarray]) -> np.ndarray:
    """What one expert's last matrix reads: ``[n, D] -> [n, I]``, in the rows' type.

    Args:
        spec: what the expert computes.
        rows: tokens that it gets.
        own: its matrices and biases by role, those in front of the last.
    """
    if spec.gate_layout is GateLayout.NONE:
        return _activate(spec, _linear(spec, rows, own, spec.roles[0]))
    activated, up = gated_rows(spec, rows, own)
    return activated * up


def gated_rows(
    spec: ExpertSpec, rows: np.ndarray, own: Mapping[str, np.ndarray]
) -> tuple[np.ndarray, np.ndarray]:
    """The activation of one expert's gate and what it is multiplied by, ``[n, I]`` each; as `inner_rows`."""
    projected = [_linear(spec, rows, own, role) for role in spec.roles[:-1]]
    if spec.gate_layout is GateLayout.SEPARATE:
        gate, up = projected
    elif spec.gate_layout is GateLayout.INTERLEAVED:
        gate, up = projected[0][:, 0::2], projected[0][:, 1::2]
    else:
        gate, up = np.split(projected[0], 2, axis=1)
    if spec.limit > 0 and spec.activation is Activation.SILU_SOFTCAP:
        up = spec.limit * np.tanh(up / spec.limit)
    elif spec.limit > 0:
        gate, up = np.minimum(gate, spec.limit), np.clip(up, -spec.limit, spec.limit)
    return _activate(spec, gate), up + spec.beta


def _linear(spec: ExpertSpec, rows: np.ndarray, own: Mapping[str, np.ndarray], role: str) -> np.ndarray:
    """``[n, in] -> [n, out]``, converting the matrix part by part in the order that it lies in."""
    matrix, bias = own[role], own[f"{role}_bias"].astype(rows.dtype)
    result = np.tile(bias, (len(rows), 1))
    step = max(1, _PART_BYTES // max(1, matrix.shape[1] * rows.dtype.itemsize))
    for start in range(0, len(matrix), step):
        part = matrix[start : start + step].astype(rows.dtype, copy=False)
        if spec.weight_layout is WeightLayout.OUT_IN:
            result[:, start : start + step] += rows @ part.T
        else:
            result += rows[:, start : start + step] @ part
    return result


def _activate(spec: ExpertSpec, x: np.ndarray) -> np.ndarray:
    if spec.activation is Activation.SILU:
        return x / (1 + np.exp(-spec.alpha * x))
    if spec.activation is Activation.SILU_SOFTCAP:
        return spec.alpha * np.tanh(x / spec.alpha) / (1 + np.exp(-x))
    if spec.activation is Activation.GELU:
        return x * 0.5 * (1 + _erf(x * math.sqrt(0.5)).astype(x.dtype))
    if spec.activation is Activation.GELU_TANH:
        return x * 0.5 * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    positive = np.maximum(x, 0)
    return positive if spec.activation is Activation.RELU else positive * positive


_erf = np.vectorize(math.erf, otypes=[np.float64])
