"""Doge: experts of one row each, chosen by product keys; and attention that keeps the keys which score best, and leaves
that out in Python where all have room."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from sparse_onnx.export.adapters.twins import forward_with, with_methods


def moe(module: Any) -> nn.Module:
    """`DogeCDMoE`. Its experts stay rows of embeddings, of which each token gathers its own: a block of thousands of
    experts would be slower than that."""
    twin = with_methods(module, forward=_mixture)
    vars(twin)["note"] = (
        "experts of one row each have no neutral form; each token gathers its own, operator by operator"
    )
    return twin


def _mixture(self: Any, hidden_states: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor]:
    """`[B, S, D] -> [B, S, D]`, and the router's logits `[2, B * S, keys]`: the first half of all tokens' is taken for
    the first keys, as transformers does it."""
    tokens = hidden_states.reshape(-1, hidden_states.shape[-1])
    # Flat first: torch.export asks whether the batch is 2, of what transformers views as [2, ...].
    logits = self.router_gate(tokens).reshape(-1).reshape(2, tokens.shape[0], self.num_keys)
    score, key = logits.topk(self.num_keys, dim=-1)
    scores = (score[0].unsqueeze(-1) + score[1].unsqueeze(-2)).flatten(1)
    experts = (key[0].unsqueeze(-1) * self.num_keys + key[1].unsqueeze(-2)).flatten(1)
    best, place = scores.topk(self.top_k, dim=-1)
    index, weight = experts.gather(-1, place), best.softmax(-1)
    if self.norm_topk_prob:
        weight = weight / weight.sum(-1, keepdim=True)
    inner = torch.matmul(self.down_embed(index), tokens.unsqueeze(-1)).squeeze(-1)
    routed = torch.matmul((self.act_fn(inner) * weight).unsqueeze(1), self.up_embed(index)).squeeze(1)
    shared = self.down_proj(self.act_fn(self.gate_proj(hidden_states)) * self.up_proj(hidden_states))
    return shared + routed.reshape(hidden_states.shape), logits


def attention(module: Any) -> nn.Module:
    """`DogeAttention`, by its own plain operators: transformers' exporter gives zeros where a fused attention has no
    key to look at, and torch the mean. Elsewhere that is padding; here the experts mix it into other tokens."""
    forward = forward_with(module, ALL_ATTENTION_FUNCTIONS=_PlainAttention())
    return with_methods(module, forward=forward, prepare_dynamic_mask=_dynamic_mask)


class _PlainAttention:
    def get_interface(self, name: str, default: Callable[..., Any]) -> Callable[..., Any]:
        return default if name == "eager" else lambda *args, **kwargs: (default(*args, **kwargs)[0], None)


def _dynamic_mask(
    self: Any,
    hidden_states: Tensor,
    dt_states: Tensor,
    keep_window_size: int = 2048,
    attention_mask: Tensor | None = None,
) -> Tensor:
    """`[B, heads, queries, keys]`: scores of the best `keep_window_size` keys of each query, the least number
    elsewhere; transformers' answer where there are no more keys than that, too."""
    least = torch.finfo(hidden_states.dtype).min
    mask = dt_states[:, :, None, :].expand(-1, -1, hidden_states.shape[1], -1)
    if attention_mask is not None:
        if attention_mask.dtype == torch.bool:
            attention_mask = torch.where(attention_mask, 0.0, least).to(hidden_states.dtype)
        mask = mask.masked_fill(attention_mask[:, :, :, : mask.shape[-1]] != 0, least)
    order = mask.sort(dim=-1, descending=True).indices
    rank = order.sort(dim=-1).indices
    return mask.masked_fill(rank >= keep_window_size, least)
