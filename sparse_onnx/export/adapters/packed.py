"""`PackedExperts`: what an adapter puts a module's experts into, so that the export finds them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from sparse_onnx.export.chosen import by_expert


class PackedExperts(nn.Module):
    """E feed-forward networks of one form, their weights packed: `(tokens [T, D], expert_index [T, K],
    expert_weight [T, K]) -> [T, D_out]`.

        y[t] = sum over k of expert_weight[t, k] * down[e] between(first[e] x[t]),      e = expert_index[t, k]

    An index of E is a dropped slot: it adds nothing. Indices are int64; the sum is taken in expert_weight's type.

    Args:
        first: `[E, I, D]`, or `[E, 2I, D]` with all outputs of the gate before all of up's. A `nn.Parameter` is shared.
        down: `[E, D_out, I]`.
        activation: elementwise; of the gate's outputs where there is a gate.
        gated: whether `first` holds a gate: `between(h) = activation(gate) * up`.
        between: replaces activation and gate: a function of `[n, outputs of first] -> [n, I]`, row by row. One that the
            neutral form does not know is exported in plain operators.
        first_bias, down_bias: `[E, outputs]`.
        transposed: the matrices lie the other way round, `[E, inputs, outputs]`.
    """

    def __init__(
        self,
        first: Tensor,
        down: Tensor,
        activation: Callable[[Tensor], Tensor],
        *,
        gated: bool,
        between: Callable[[Tensor], Tensor] | None = None,
        first_bias: Tensor | None = None,
        down_bias: Tensor | None = None,
        transposed: bool = False,
    ) -> None:
        super().__init__()
        if first.dim() != 3 or down.dim() != 3 or first.shape[0] != down.shape[0]:
            raise ValueError(
                f"packed weights are [experts, ., .], not {tuple(first.shape)} and {tuple(down.shape)}"
            )
        if (first_bias is None) != (down_bias is None):
            raise ValueError("both projections have a bias, or neither: give zeros for the other")
        self.num_experts = first.shape[0]
        self.has_gate, self.has_bias, self.is_transposed = gated, first_bias is not None, transposed
        self.activation, self.between = activation, between
        name = "gate_up_proj" if gated else "up_proj"
        self.register_parameter(name, _parameter(first))
        self.down_proj = _parameter(down)
        if first_bias is not None and down_bias is not None:
            self.register_parameter(f"{name}_bias", _parameter(first_bias))
            self.down_proj_bias = _parameter(down_bias)
        self._parts: list[tuple[nn.Parameter, Tensor]] = []

    @classmethod
    def of_linears(
        cls,
        up: Sequence[nn.Linear],
        down: Sequence[nn.Linear],
        activation: Callable[[Tensor], Tensor],
        *,
        gate: Sequence[nn.Linear] | None = None,
    ) -> PackedExperts:
        """Experts that are stored one by one, as `down(activation(up(x)))` or `down(activation(gate(x)) * up(x))`.

        The weights are copied once; of linears of several types the widest is kept.
        """
        parts: list[tuple[nn.Parameter, Tensor]] = []
        columns = [up] if gate is None else [gate, up]
        if len({len(linears) for linears in (*columns, down)}) != 1:
            raise ValueError("gate, up and down are lists of one length, the number of experts")
        first, first_bias = _stacked(columns, parts)
        last, last_bias = _stacked([down], parts)
        if first_bias is not None or last_bias is not None:
            first_bias = first.new_zeros(first.shape[:2]) if first_bias is None else first_bias
            last_bias = last.new_zeros(last.shape[:2]) if last_bias is None else last_bias
        packed = cls(
            first, last, activation, gated=gate is not None, first_bias=first_bias, down_bias=last_bias
        )
        packed._parts = parts
        return packed

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights; tokens are given in it."""
        return self.down_proj.dtype

    def share(self) -> None:
        """Has the modules that the weights were copied from read them in here, so that nothing is held twice. Their
        values stay."""
        for parameter, part in self._parts:
            if parameter.dtype == part.dtype:
                parameter.data = part

    def act_fn(self, hidden: Tensor) -> Tensor:
        return self.activation(hidden) if self.between is None else self.between(hidden)

    def _apply_gate(self, projected: Tensor) -> Tensor:
        if self.between is not None:
            return self.between(projected)
        gate, up = projected.chunk(2, dim=-1)
        return self.activation(gate) * up

    def forward(self, tokens: Tensor, expert_index: Tensor, expert_weight: Tensor) -> Tensor:
        return by_expert(self, tokens, expert_index, expert_weight)


def _parameter(value: Tensor) -> nn.Parameter:
    return value if isinstance(value, nn.Parameter) else nn.Parameter(value, requires_grad=False)


@torch.no_grad()
def _stacked(
    columns: Sequence[Sequence[nn.Linear]], parts: list[tuple[nn.Parameter, Tensor]]
) -> tuple[Tensor, Tensor | None]:
    """`[E, outputs of all columns, inputs]` and the biases; `parts` gets each parameter with its place."""
    experts = list(zip(*columns, strict=True))
    every = [linear for linears in experts for linear in linears]
    dtype = every[0].weight.dtype
    for linear in every:
        dtype = torch.promote_types(dtype, linear.weight.dtype)
    width = sum(linear.out_features for linear in experts[0])
    weight = torch.empty(
        len(experts), width, every[0].in_features, dtype=dtype, device=every[0].weight.device
    )
    has_bias = any(linear.bias is not None for linear in every)
    bias = weight.new_zeros(len(experts), width) if has_bias else None
    for expert, linears in enumerate(experts):
        start = 0
        for linear in linears:
            place = slice(start, start + linear.out_features)
            start += linear.out_features
            for whole, parameter in ((weight, linear.weight), (bias, linear.bias)):
                if whole is not None and parameter is not None:
                    whole[expert, place].copy_(parameter)
                    parts.append((parameter, whole[expert, place]))
    return weight, bias
