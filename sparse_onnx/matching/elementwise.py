"""Elementwise operators evaluated in float64, to recognise an activation by what it computes."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from sparse_onnx.blocks.spec import Activation

Array = np.ndarray
_erf = np.vectorize(math.erf, otypes=[np.float64])


def _sigmoid(x: Array) -> Array:
    return 0.5 * (1 + np.tanh(0.5 * x))


def _softplus(x: Array) -> Array:
    return np.logaddexp(x, 0)


def _gelu(x: Array, approximate: Any = "none") -> Array:
    if approximate == "tanh":
        return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    return 0.5 * x * (1 + _erf(x * math.sqrt(0.5)))


def _clip(x: Array, low: Array | None = None, high: Array | None = None) -> Array:
    x = x if low is None else np.maximum(x, low)
    return x if high is None else np.minimum(x, high)


def _hard_sigmoid(x: Array, alpha: float = 0.2, beta: float = 0.5) -> Array:
    return np.clip(alpha * x + beta, 0, 1)


#: (domain, operator) -> function of the inputs (None for an omitted one) and of the attributes by name.
_OPERATORS: dict[tuple[str, str], Callable[..., Array]] = {
    ("", "Add"): np.add,
    ("", "Sub"): np.subtract,
    ("", "Mul"): np.multiply,
    ("", "Div"): np.divide,
    ("", "Pow"): np.power,
    ("", "Neg"): np.negative,
    ("", "Abs"): np.abs,
    ("", "Exp"): np.exp,
    ("", "Reciprocal"): np.reciprocal,
    ("", "Sqrt"): np.sqrt,
    ("", "Tanh"): np.tanh,
    ("", "Erf"): _erf,
    ("", "Sigmoid"): _sigmoid,
    ("", "Softplus"): _softplus,
    ("", "Relu"): lambda x: np.maximum(x, 0),
    ("", "LeakyRelu"): lambda x, alpha=0.01: np.where(x < 0, alpha * x, x),
    ("", "Elu"): lambda x, alpha=1.0: np.where(x < 0, alpha * np.expm1(np.minimum(x, 0)), x),
    ("", "HardSigmoid"): _hard_sigmoid,
    ("", "HardSwish"): lambda x: x * _hard_sigmoid(x, 1 / 6, 0.5),
    ("", "Mish"): lambda x: x * np.tanh(_softplus(x)),
    ("", "Swish"): lambda x, alpha=1.0: x * _sigmoid(alpha * x),
    ("", "Gelu"): _gelu,
    ("", "Clip"): _clip,
    ("", "Identity"): lambda x: x,
    ("", "Cast"): lambda x, **_: x,
    ("com.microsoft", "Gelu"): _gelu,
    ("com.microsoft", "FastGelu"): lambda x: _gelu(x, "tanh"),
    ("com.microsoft", "QuickGelu"): lambda x, alpha=1.702: x * _sigmoid(alpha * x),
}
_VARIADIC: dict[str, Callable[[Array, Array], Array]] = {"Min": np.minimum, "Max": np.maximum, "Sum": np.add}


def activate(activation: Activation, alpha: float, x: Array) -> Array:
    """An activation of the neutral operators."""
    with np.errstate(all="ignore"):
        if activation is Activation.SILU:
            return x * _sigmoid(alpha * x)
        if activation is Activation.SILU_SOFTCAP:
            return alpha * np.tanh(x / alpha) * _sigmoid(x)
        if activation in (Activation.GELU, Activation.GELU_TANH):
            return _gelu(x, "tanh" if activation is Activation.GELU_TANH else "none")
        positive = np.maximum(x, 0)
        return positive if activation is Activation.RELU else positive * positive


def bound(activation: Activation, limit: float, gate: Array, up: Array) -> tuple[Array, Array]:
    """Gate and up within the limit of an `ExpertSpec`; 0 for none."""
    if not limit:
        return gate, up
    if activation is Activation.SILU_SOFTCAP:
        return gate, limit * np.tanh(up / limit)
    return np.minimum(gate, limit), np.clip(up, -limit, limit)


def known(domain: str, op_type: str) -> bool:
    """Whether `evaluate` takes the operator."""
    return (domain, op_type) in _OPERATORS or (domain == "" and op_type in _VARIADIC)


def evaluate(
    domain: str, op_type: str, inputs: Sequence[Array | None], attributes: Mapping[str, Any]
) -> Array:
    """The operator on float64 arrays. NaN and infinities come out without a warning."""
    with np.errstate(all="ignore"):
        if domain == "" and op_type in _VARIADIC:
            result = inputs[0]
            assert result is not None
            for other in inputs[1:]:
                assert other is not None
                result = _VARIADIC[op_type](result, other)
            return result
        return _OPERATORS[domain, op_type](*inputs, **attributes)
