"""ZAYA: the router may skip a token. transformers computes expert 0 for it, and weighs that with 0."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from sparse_onnx.export.adapters.packed import PackedExperts


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
