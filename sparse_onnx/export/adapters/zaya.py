"""ZAYA: the router may skip a token, for which transformers computes expert 0 and weighs that with 0; and attention
whose values come from the token before."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparse_onnx.export.adapters.packed import PackedExperts
from sparse_onnx.export.adapters.twins import with_methods


def sparse_moe(module: Any) -> nn.Module:
    """`ZayaSparseMoeBlock`: slots of weight 0 are dropped."""
    stored = module.experts
    return _SparseMoE(
        module.gate, PackedExperts(stored.gate_up_proj, stored.down_proj, stored.act_fn, gated=True)
    )


class _SparseMoE(nn.Module):
    def __init__(self, gate: nn.Module, experts: PackedExperts) -> None:
        super().__init__()
        self.gate, self.experts = gate, experts

    def forward(
        self, hidden_states: Tensor, prev_router_hidden_states: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """`[B, S, D] -> [B, S, D]`, and the state of the router for the next layer."""
        _, weight, index, state = self.gate(hidden_states, router_states=prev_router_hidden_states)
        tokens = hidden_states.reshape(-1, hidden_states.shape[-1])
        index = torch.where(weight == 0, self.experts.num_experts, index)
        return self.experts(tokens, index, weight).reshape(hidden_states.shape), state


def projection(module: Any) -> nn.Module:
    """`ZayaCCAProjection`. Its `x[:, :-1]` makes torch.export take a sequence of 2 for another model."""
    return with_methods(module, forward=_project)


def _project(
    self: Any, hidden_states: Tensor, cache: Any = None, conv_mask: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values `[B, S, heads, d]` of `[B, S, D]`."""
    if cache is not None:
        return type(self).forward(self, hidden_states, cache, conv_mask)
    if conv_mask is not None:
        hidden_states = hidden_states * conv_mask[:, :, None].to(hidden_states.dtype)
    shape = (*hidden_states.shape[:-1], -1, self.head_dim)
    query, key = self.q_proj(hidden_states), self.k_proj(hidden_states)
    mixed = F.pad(torch.cat([query, key], dim=-1).transpose(1, 2), (self.conv_kernel_size, 0))
    mixed = self.conv_qk_grouped(self.conv_qk_depthwise(mixed)).transpose(1, 2)
    split = query.shape[-1]
    repeated = key.view(shape).repeat_interleave(self.num_key_value_groups, dim=2)
    residual = (query.view(shape) + repeated) * 0.5
    grouped = residual.unflatten(2, (-1, self.num_key_value_groups)).mean(dim=-2)
    before = self.v_proj_delayed(F.pad(hidden_states, (0, 0, 1, -1)))
    value = torch.cat([self.v_proj_current(hidden_states), before], dim=-1).view(shape)
    return mixed[..., :split].reshape(shape) + residual, mixed[..., split:].reshape(shape) + grouped, value
