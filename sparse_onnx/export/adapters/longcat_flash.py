"""LongCat-Flash: the last experts give the token back as it is."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from sparse_onnx.export.adapters.packed import PackedExperts


def moe(module: Any) -> nn.Module | None:
    """`LongcatFlashMoE`. Not adapted: one whose experts all compute nothing."""
    stored = module.experts
    if not stored.num_routed_experts:
        return None
    # It keeps first matrices for the experts that compute nothing, too.
    first = stored.gate_up_proj[: stored.num_routed_experts]
    return _MoE(module.router, PackedExperts(first, stored.down_proj, stored.act_fn, gated=True))


class _MoE(nn.Module):
    def __init__(self, router: nn.Module, experts: PackedExperts) -> None:
        super().__init__()
        self.router, self.experts = router, experts

    def forward(self, hidden_states: Tensor) -> Tensor:
        """`[B, S, D] -> [B, S, D]`."""
        tokens = hidden_states.reshape(-1, hidden_states.shape[-1])
        _, weight, index = self.router(tokens)
        computing = index < self.experts.num_experts
        routed = self.experts(tokens, torch.where(computing, index, self.experts.num_experts), weight)
        kept = torch.where(computing, 0.0, weight).sum(-1, keepdim=True)
        return (routed + (tokens * kept).to(tokens.dtype)).reshape(hidden_states.shape)
