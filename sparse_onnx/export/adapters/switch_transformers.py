"""Switch Transformers: one expert a token, and each expert takes only its first tokens of a sequence."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparse_onnx.export.adapters.packed import PackedExperts


def sparse_mlp(module: Any) -> nn.Module:
    """`SwitchTransformersSparseMLP`."""
    mlps = list(module.experts.values())
    experts = PackedExperts.of_linears([mlp.wi for mlp in mlps], [mlp.wo for mlp in mlps], mlps[0].act)
    return _SparseMLP(module.router, experts)


class _SparseMLP(nn.Module):
    def __init__(self, router: Any, experts: PackedExperts) -> None:
        super().__init__()
        self.router, self.experts = router, experts

    def forward(self, hidden_states: Tensor) -> Tensor:
        """`[B, S, D] -> [B, S, D]`; a token for which its expert has no room left gets zeros."""
        router = self.router
        probabilities = routed(router, hidden_states)
        chosen = probabilities.argmax(-1)
        taken = F.one_hot(chosen, router.num_experts)
        place = (taken.cumsum(-2) * taken).sum(-1)
        index = torch.where(place <= router.expert_capacity, chosen, router.num_experts)
        tokens = hidden_states.reshape(-1, hidden_states.shape[-1]).to(self.experts.dtype)
        answer = self.experts(tokens, index.reshape(-1, 1), probabilities.amax(-1).reshape(-1, 1))
        return answer.reshape(hidden_states.shape).to(hidden_states.dtype)


def routed(router: Any, hidden_states: Tensor) -> Tensor:
    """Probabilities `[..., E]` of the tokens' type, computed in the router's. It does not convert its weights where
    they are, as transformers does, which torch.export cannot follow."""
    return router_logits(router, hidden_states).softmax(-1, dtype=router.dtype).to(hidden_states.dtype)


def router_logits(router: Any, hidden_states: Tensor) -> Tensor:
    linear, dtype = router.classifier, router.dtype
    bias = None if linear.bias is None else linear.bias.to(dtype)
    return F.linear(hidden_states.to(dtype), linear.weight.to(dtype), bias)
