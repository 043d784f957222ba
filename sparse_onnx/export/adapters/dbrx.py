"""DBRX: the matrices of all experts under each other, in two axes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from sparse_onnx.export.adapters.packed import PackedExperts


@torch.no_grad()
def ffn(module: Any) -> nn.Module:
    """`DbrxFFN`."""
    mlp = module.experts.mlp
    shape = (module.experts.num_experts, mlp.ffn_hidden_size, mlp.hidden_size)
    first = torch.cat([mlp.w1.view(shape), mlp.v1.view(shape)], dim=1)
    # The last matrix lies [inputs, outputs], unlike the first two.
    down = mlp.w2.view(shape).transpose(1, 2).contiguous()
    experts = PackedExperts(first, down, mlp.activation_fn, gated=True)
    return _FFN(module.router, experts, module.top_k, module.moe_normalize_expert_weights)


class _FFN(nn.Module):
    def __init__(self, router: nn.Module, experts: PackedExperts, top_k: int, power: float | None) -> None:
        super().__init__()
        self.router, self.experts, self.top_k, self.power = router, experts, top_k, power

    def forward(self, hidden_states: Tensor) -> Tensor:
        """`[B, S, D] -> [B, S, D]`."""
        tokens = hidden_states.reshape(-1, hidden_states.shape[-1])
        weight, index = self.router(tokens).softmax(-1).topk(self.top_k, dim=-1)
        if self.power is not None:
            weight = weight / torch.norm(weight, p=self.power, dim=-1, keepdim=True)
        return self.experts(tokens, index, weight).reshape(hidden_states.shape)
