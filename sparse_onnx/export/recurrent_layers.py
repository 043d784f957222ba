"""torch's GRU, LSTM and RNN for sequences of any length: torch.export unrolls them for the traced one.

Within `replaced` each layer and direction is one operator of our own, which torch runs as it runs the layer, and which
becomes ONNX's GRU, LSTM or RNN. Packed sequences, projected states (`proj_size`) and dropout stay as they are.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest import mock

import onnxscript
import torch
from torch import Tensor

from sparse_onnx.export.lifting.program import data_dependent

_op: Any = onnxscript.opset18
#: Kind -> ONNX's operator, the order of its gates among torch's, its attributes.
_KINDS: dict[str, tuple[str, tuple[int, ...], dict[str, Any]]] = {
    "gru": ("GRU", (1, 0, 2), {"linear_before_reset": 1}),
    "lstm": ("LSTM", (0, 3, 1, 2), {}),
    "rnn_tanh": ("RNN", (0,), {"activations": ["Tanh"]}),
    "rnn_relu": ("RNN", (0,), {"activations": ["Relu"]}),
}


@torch.library.custom_op("sparse_onnx::recurrent", mutates_args=())
def _layer(
    x: Tensor, h: Tensor, c: Tensor, weights: list[Tensor], kind: str
) -> tuple[Tensor, Tensor, Tensor]:
    """One layer, forwards.

    Args:
        x: `[length, batch, inputs]`.
        h: the state at the start, `[batch, hidden]`.
        c: an LSTM's cell state, alike; others give it back.
        weights: of the inputs `[gates * hidden, inputs]`, of the state `[gates * hidden, hidden]`, and both biases.
        kind: the name of torch's function.

    Returns:
        All states `[length, batch, hidden]`, and `h` and `c` at the end.
    """
    state = (h[None], c[None]) if kind == "lstm" else h[None]
    results = getattr(torch, kind)(x, state, weights, len(weights) == 4, 1, 0.0, False, False, False)
    return results[0], results[1][0], results[2][0] if kind == "lstm" else c.clone()


@_layer.register_fake
def _(x: Tensor, h: Tensor, c: Tensor, weights: list[Tensor], kind: str) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape[0], *h.shape), torch.empty_like(h), torch.empty_like(c)


def _translated(x: Any, h: Any, c: Any, weights: Sequence[Any], kind: str) -> tuple[Any, Any, Any]:
    name, order, attributes = _KINDS[kind]
    parts = [_arranged(each, order) for each in weights]
    bias = _op.Concat(*parts[2:], axis=1) if parts[2:] else None
    first = [_op.Constant(value_ints=[0])]
    states = [_op.Unsqueeze(each, *first) for each in ((h, c) if kind == "lstm" else (h,))]
    size = int(h.shape[-1])
    results = getattr(_op, name)(x, *parts[:2], bias, None, *states, hidden_size=size, **attributes)
    axis = [_op.Constant(value_ints=[1])]
    last = [_op.Squeeze(each, *first) for each in results[1:]]
    return _op.Squeeze(results[0], *axis), last[0], last[1] if kind == "lstm" else _op.Identity(c)


def _arranged(weight: Any, order: tuple[int, ...]) -> Any:
    """In ONNX's order of the gates, with its axis of directions."""
    if order != (0,):
        gates = _op.Split(weight, num_outputs=len(order), axis=0)
        weight = _op.Concat(*(gates[place] for place in order), axis=0)
    return _op.Unsqueeze(weight, _op.Constant(value_ints=[0]))


TABLE: dict[Any, Callable[..., Any]] = {torch.ops.sparse_onnx.recurrent.default: _translated}


@contextlib.contextmanager
def replaced() -> Iterator[None]:
    """Within the block `torch.nn.GRU`, `LSTM` and `RNN` are traced for any length."""
    functions: Any = torch._VF
    with contextlib.ExitStack() as stack:
        for kind in _KINDS:
            other = _function(kind, getattr(functions, kind))
            stack.enter_context(mock.patch.object(functions, kind, other, create=True))
        yield


def _function(kind: str, original: Callable[..., Any]) -> Callable[..., Any]:
    def function(x: Tensor, state: Any, weights: Any, *settings: Any) -> Any:
        """Of `torch.gru(input, hx, params, has_biases, num_layers, dropout, train, bidirectional, batch_first)`."""
        packed = not isinstance(settings[0], bool)  # then weights come there, behind sizes and states
        states = state if isinstance(state, (tuple, list)) else (state, state)
        if packed or states[0].shape[-1] != states[-1].shape[-1]:
            return original(x, state, weights, *settings)
        biased, layers, dropout, train, both, batch_first = settings
        if dropout and train:
            return original(x, state, weights, *settings)
        return _stacked(
            kind, x.transpose(0, 1) if batch_first else x, states, weights, biased, layers, both, batch_first
        )

    return function


def _one_more(value: Tensor) -> Tensor:
    """A tensor `[length or layers, batch, features]` with zeros behind its batch."""
    return torch.cat([value, value.new_zeros(value.shape[0], 1, value.shape[2])], 1)


def _stacked(
    kind: str, x: Tensor, states: Any, weights: Any, biased: bool, layers: int, both: bool, batch_first: bool
) -> Any:
    rows = x.shape[1]
    if data_dependent(rows):  # ONNX Runtime crashes on no sequences: there is one more, and left out again
        x, *states = (_one_more(each) for each in (x, *states))
    count = 4 if biased else 2
    ends: list[list[Tensor]] = []
    for _ in range(layers):
        outputs = []
        for backwards in (False, True) if both else (False,):
            place = len(ends)
            own = list(weights[place * count : (place + 1) * count])
            given = x.flip(0) if backwards else x
            out, *end = torch.ops.sparse_onnx.recurrent(given, states[0][place], states[-1][place], own, kind)
            outputs.append(out.flip(0) if backwards else out)
            ends.append(end)
        x = torch.cat(outputs, -1) if both else outputs[0]
    last = [torch.stack(each) for each in zip(*ends, strict=True)]
    if data_dependent(rows):
        x, *last = (each.narrow(1, 0, rows) for each in (x, *last))
    return (x.transpose(0, 1) if batch_first else x, *last[: 2 if kind == "lstm" else 1])
