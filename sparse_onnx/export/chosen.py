"""Experts of any body in plain operators, so that only the chosen ones are computed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


def on_chosen_rows(
    tokens: Tensor,
    expert_index: Tensor,
    expert_weight: Tensor,
    *,
    experts: int,
    outputs: int,
    body: Callable[[int, Tensor], Tensor],
) -> Tensor:
    """The sum of the chosen experts' answers, each expert computed on the rows that chose it; torch.export can follow.

    Args:
        tokens: `[T, D]`.
        expert_index: `[T, K]`; what is no number of an expert, such as `experts`, is a dropped slot.
        expert_weight: `[T, K]`; the sum is taken in its type.
        experts: E.
        outputs: `D_out`.
        body: `(number of the expert, rows [n, D]) -> [n, D_out]`, row by row, right for 0 rows too.

    Returns:
        `[T, D_out]` of the tokens' type.
    """
    total = expert_weight.new_zeros(tokens.shape[0], outputs)
    for expert in range(experts):
        hit = expert_index == expert
        (row,) = torch.where(hit.any(-1))
        # Each row once, whatever its slots: what is added at one place twice is not added up everywhere.
        weight = torch.where(hit, expert_weight, 0.0).sum(-1)[row]
        answer = body(expert, tokens[row]).to(total.dtype) * weight.unsqueeze(-1)
        total = total.index_put((row,), total[row] + answer)
    return total.to(tokens.dtype)


def is_gated(module: nn.Module) -> bool:
    """Whether the first matrices of an experts module hold a gate."""
    return bool(getattr(module, "has_gate", hasattr(module, "gate_up_proj")))


def by_expert(module: nn.Module, tokens: Tensor, expert_index: Tensor, expert_weight: Tensor) -> Tensor:
    """What an experts module computes by its packed weights and what it has between them."""
    between: Any = module._apply_gate if is_gated(module) else module.act_fn
    first, last = "gate_up_proj" if is_gated(module) else "up_proj", "down_proj"
    transposed = bool(getattr(module, "is_transposed", False))
    biased = bool(getattr(module, "has_bias", hasattr(module, f"{first}_bias")))

    def linear(name: str, expert: int, rows: Tensor) -> Tensor:
        weight = getattr(module, name)[expert]
        product = rows @ (weight if transposed else weight.T)
        return product + getattr(module, f"{name}_bias")[expert] if biased else product

    def body(expert: int, rows: Tensor) -> Tensor:
        return linear(last, expert, between(linear(first, expert, rows)))

    experts, *sizes = getattr(module, last).shape
    outputs = sizes[1 if transposed else 0]
    return on_chosen_rows(tokens, expert_index, expert_weight, experts=experts, outputs=outputs, body=body)
