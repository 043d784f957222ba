"""NLLB-MoE as transformers computes it: the mask of the first choice is taken for the numbers of experts.

`NllbMoeExperts.forward` calls `one_hot(router_mask)` with a mask of zeros and ones `[T, E]`, where numbers of experts
belong. So each token goes to expert 1 with the weight of its first choice, and to expert 0 with the weights of all
others; experts from 2 on are never used.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparse_onnx.core.errors import ImpossibleError
from sparse_onnx.export.adapters.packed import PackedExperts
from sparse_onnx.export.adapters.switch_transformers import router_logits

_NOTE = (
    "transformers' NLLB-MoE has a bug: it takes the router's mask for numbers of experts, so that only experts 0 and 1 "
    "are ever used, whatever the router chooses; the export computes the same as transformers"
)


def sparse_mlp(module: Any) -> nn.Module:
    """`NllbMoeSparseMLP`.

    Raises:
        ImpossibleError: it draws random numbers, or its capacity is that of the first input it ever saw.
    """
    router = module.router
    if router.second_expert_policy in ("sampling", "random"):
        raise ImpossibleError(
            f"the router draws random numbers (second_expert_policy '{router.second_expert_policy}')",
            "set it to 'all' in the configuration",
        )
    if router.moe_eval_capacity_token_fraction <= 0 and router.expert_capacity is None:
        raise ImpossibleError(
            "the router's capacity is that of the first input it ever sees", "set expert_capacity"
        )
    mlps = [module.experts[f"expert_{number}"] for number in range(module.experts.num_experts)]
    experts = PackedExperts.of_linears([mlp.fc1 for mlp in mlps], [mlp.fc2 for mlp in mlps], mlps[0].act)
    return _SparseMLP(router, experts, 1.0 - module.experts.moe_token_dropout)


class _SparseMLP(nn.Module):
    note = _NOTE
    fraction: Tensor

    def __init__(self, router: Any, experts: PackedExperts, scale: float) -> None:
        super().__init__()
        self.router, self.experts, self.scale = router, experts, scale
        # A tensor: the exporter writes numbers of Python as float32, whose 0.3 times 40 is more than 12.
        fraction = torch.tensor(router.moe_eval_capacity_token_fraction, dtype=torch.float64)
        self.register_buffer("fraction", fraction, persistent=False)

    def forward(self, hidden_states: Tensor, padding_mask: Tensor | None = None) -> Tensor:
        """`[B, S, D] -> [B, S, D]`."""
        tokens = hidden_states.reshape(-1, hidden_states.shape[-1])
        first, weights = self._route(tokens, padding_mask)
        weight = torch.stack([(weights * (1 - first)).sum(-1), (weights * first).sum(-1)], dim=-1)
        has_first = first.sum(-1) > 0
        index = torch.stack([torch.zeros_like(has_first, dtype=torch.int64), has_first.long()], dim=-1)
        # A token without a first choice has no ones in its mask: its second slot is dropped.
        dropped = torch.stack([torch.zeros_like(has_first), ~has_first], dim=-1)
        index = torch.where(dropped, self.router.num_experts, index)
        answer = self.experts(tokens.to(self.experts.dtype), index, weight * self.scale)
        return answer.reshape(hidden_states.shape).to(hidden_states.dtype)

    def _route(self, tokens: Tensor, padding_mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """`NllbMoeTop2Router.route_tokens`: the mask of first choices and the combining weights, both `[T, E]`."""
        router = self.router
        logits = router_logits(router, tokens)
        probabilities = logits.softmax(-1, dtype=router.dtype).to(tokens.dtype)
        first = F.one_hot(probabilities.argmax(-1), router.num_experts)
        second = F.one_hot(logits.masked_fill(first.bool(), float("-inf")).argmax(-1), router.num_experts)
        if router.normalize_router_prob_before_dropping:
            gates = router.normalize_router_probabilities(probabilities, first, second)
        if padding_mask is not None and not router.router_ignore_padding_tokens:
            if padding_mask.dim() == 4:
                padding_mask = padding_mask[:, :, -1, :].reshape(-1)[-tokens.shape[0] :]
            real = (~padding_mask.bool()).reshape(-1, 1).to(first.dtype)
            first, second = first * real, second * real
        first_place, second_place = self._places(first, second, probabilities)
        capacity = self._capacity(first)
        first, second = first * (first_place < capacity), second * (second_place < capacity)
        if not router.normalize_router_prob_before_dropping:
            gates = router.normalize_router_probabilities(probabilities, first, second)
        return first, gates[0].unsqueeze(-1) * first + gates[1].unsqueeze(-1) * second

    def _places(self, first: Tensor, second: Tensor, probabilities: Tensor) -> tuple[Tensor, Tensor]:
        """How many tokens are before each at its expert; all first choices before all second ones."""
        before = first.sum(0, keepdim=True)
        if not self.router.batch_prioritized_routing:
            return first.cumsum(0) - 1, second.cumsum(0) - 1 + before
        order = (-probabilities.amax(-1)).argsort(dim=0)
        back = order.argsort(dim=0)
        firsts, seconds = first[order], second[order]
        return (
            ((firsts.cumsum(0) - 1) * firsts)[back],
            ((seconds.cumsum(0) - 1) * seconds)[back] + before,
        )

    def _capacity(self, first: Tensor) -> Tensor | int:
        if self.router.moe_eval_capacity_token_fraction <= 0:
            return int(self.router.expert_capacity)
        # By tensor operations, so that the number of tokens stays free; in double, as Python computes it.
        count = torch.ones_like(first[:, 0], dtype=torch.float64).sum()
        return (count * self.fraction).ceil().long()
