"""Experts of any body in plain operators, so that only the chosen ones are computed."""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

_PARTS = (
    *("gate_up_proj", "gate_up_proj_bias", "up_proj", "up_proj_bias", "down_proj", "down_proj_bias"),
    *("_apply_gate", "act_fn", "post_expert_norm"),
)


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
    normed = getattr(module, "has_post_expert_norm", False)
    after: Any = module.post_expert_norm if normed else lambda rows: rows

    def linear(name: str, expert: int, rows: Tensor) -> Tensor:
        weight = getattr(module, name)[expert]
        product = rows @ (weight if transposed else weight.T)
        return product + getattr(module, f"{name}_bias")[expert] if biased else product

    def body(expert: int, rows: Tensor) -> Tensor:
        return after(linear(last, expert, between(linear(first, expert, rows))))

    experts, *sizes = getattr(module, last).shape
    outputs = sizes[1 if transposed else 0]
    return on_chosen_rows(tokens, expert_index, expert_weight, experts=experts, outputs=outputs, body=body)


def grouped_form(module: nn.Module, tokens: Tensor, expert_index: Tensor, expert_weight: Tensor) -> Tensor:
    """The same by transformers' grouped products, for experts modules that its decorator does not know as well."""
    from transformers.integrations.moe import grouped_mm_experts_forward

    first = "gate_up_proj" if is_gated(module) else "up_proj"
    last: Any = module.down_proj
    settings: Any = types.SimpleNamespace(
        num_experts=last.shape[0],
        has_gate=is_gated(module),
        has_bias=bool(getattr(module, "has_bias", hasattr(module, f"{first}_bias"))),
        is_transposed=bool(getattr(module, "is_transposed", False)),
        has_post_expert_norm=bool(getattr(module, "has_post_expert_norm", False)),
        # Indices of no expert are dropped then, as everywhere here.
        _is_expert_parallel=not hasattr(module, "_is_expert_parallel"),
        **{name: getattr(module, name) for name in _PARTS if hasattr(module, name)},
    )
    return grouped_mm_experts_forward(settings, tokens, expert_index, expert_weight)
