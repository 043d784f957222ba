"""Llama 4: the score scales what goes into an expert; and rotary embeddings by complex numbers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from sparse_onnx.export.adapters.packed import PackedExperts
from sparse_onnx.export.adapters.twins import forward_with, with_methods


def moe(module: Any) -> nn.Module | None:
    """`Llama4TextMoe`, which computes all experts on all tokens, scaled by 0 where an expert is not chosen.

    Leaving those out is right because such an expert gives 0: it has no bias, and 0 * activation(0) = 0. Not adapted:
    one for which that does not hold.
    """
    stored = module.experts
    zero = stored.act_fn(torch.zeros(1, dtype=torch.float64))
    if {name for name, _ in stored.named_parameters()} != {
        "gate_up_proj",
        "down_proj",
    } or not zero.isfinite().all():
        return None
    experts = PackedExperts(stored.gate_up_proj, stored.down_proj, stored.act_fn, gated=True, transposed=True)
    return _MoE(module.router, experts, module.shared_expert)


class _MoE(nn.Module):
    def __init__(self, router: Any, experts: PackedExperts, shared_expert: nn.Module) -> None:
        super().__init__()
        self.router, self.experts, self.shared_expert = router, experts, shared_expert

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        """`[B, S, D] -> [B * S, D]`, and the router's logits `[B * S, E]`."""
        tokens = hidden_states.reshape(-1, hidden_states.shape[-1])
        logits = nn.functional.linear(tokens, self.router.weight, self.router.bias)
        value, index = logits.topk(self.router.top_k, dim=1)
        score = value.float().sigmoid().to(value.dtype)
        # Each slot scales the token in its own way, so each slot is a row.
        scaled = (tokens.unsqueeze(1) * score.unsqueeze(-1)).reshape(-1, tokens.shape[-1])
        routed = self.experts(scaled, index.reshape(-1, 1), torch.ones_like(score).reshape(-1, 1))
        routed = routed.reshape(-1, self.router.top_k, tokens.shape[-1]).sum(1)
        return self.shared_expert(tokens) + routed, logits


def text_attention(module: Any) -> nn.Module:
    """`Llama4TextAttention`."""
    return with_methods(module, forward=forward_with(module, apply_rotary_emb=_rotate))


def vision_attention(module: Any) -> nn.Module:
    """`Llama4VisionAttention`."""
    return with_methods(module, forward=forward_with(module, vision_apply_rotary_emb=_rotate_vision))


def _rotate(xq: Tensor, xk: Tensor, freqs_cis: Tensor) -> tuple[Tensor, Tensor]:
    """`[B, S, heads, d]` by complex `[B, S, d / 2]`; named as transformers calls it."""
    turn = torch.view_as_real(freqs_cis).unsqueeze(2)
    return _turned(xq, turn), _turned(xk, turn)


def _rotate_vision(query: Tensor, key: Tensor, freqs_ci: Tensor) -> tuple[Tensor, Tensor]:
    """`[B, S, heads, d]` by complex `[S, 1, d / 2]`."""
    turn = torch.view_as_real(freqs_ci).reshape(1, query.shape[1], 1, -1, 2)
    return _turned(query, turn), _turned(key, turn)


def _turned(x: Tensor, turn: Tensor) -> Tensor:
    """The complex product of neighbours in the last axis, in real numbers."""
    pairs = x.float().reshape(*x.shape[:-1], -1, 2)
    real, imaginary, cosine, sine = pairs[..., 0], pairs[..., 1], turn[..., 0], turn[..., 1]
    turned = torch.stack([real * cosine - imaginary * sine, real * sine + imaginary * cosine], dim=-1)
    return turned.flatten(3).type_as(x)
