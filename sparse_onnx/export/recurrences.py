"""Layers with a state that goes from token to token, for every length and any state at the start: forwards that
`patches` puts in place."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sparse_onnx.export import scans


def lightning_attention(
    self: Any,
    original: Callable[..., Any],
    hidden_states: Tensor,
    position_embeddings: Any,
    attention_mask: Tensor | None,
    cache: Any = None,
    **kwargs: Any,
) -> Any:
    """MiniMax's linear attention: all blocks at once but for the state that goes from one to the next. The last block
    is filled up with zeros, which add nothing to a state, but let it decay: the one that is kept is summed up anew."""
    batch, length, _ = hidden_states.shape
    block, heads, width = self.block_size, self.num_attention_heads, self.head_dim
    masked = sys.modules[type(self).__module__].apply_mask_to_padding_states  # type: ignore[attr-defined]
    states = masked(self.act_fn(self.qkv_proj(hidden_states)), attention_mask)
    begun = None if cache is None else cache.get_linear_cache(self.layer_idx)
    begun = hidden_states.new_zeros(batch, heads, width, width) if begun is None else begun.clone()
    after = _after(states.reshape(batch, length, heads, 3 * width), begun, self.slope_rate)
    states = F.pad(states, (0, 0, 0, scans.padding([], length, block)))
    states = states.reshape(batch, -1, block, heads, 3 * width).permute(0, 3, 1, 2, 4)
    query, key, value = states.split(width, dim=-1)  # [batch, heads, blocks, block, width]
    within = ((query @ key.transpose(-1, -2)) * self.diagonal_decay[:, :, None]) @ value
    added = (key * self.key_decay[:, None]).transpose(-1, -2) @ value
    decay = torch.exp(-self.slope_rate * block)

    def step(before: Tensor, update: Tensor, factor: Tensor) -> tuple[tuple[Tensor], tuple[Tensor]]:
        return ((before * factor + update).to(before.dtype),), (before,)

    _, (before,) = scans.scan([], step, added.shape[2], [begun], [(added, 2)], [decay])
    across = (query * self.query_decay[:, None]) @ before.movedim(0, 2)
    attended = (within + across).permute(0, 2, 3, 1, 4).reshape(batch, -1, heads * width)[:, :length]
    attended = torch.sigmoid(self.output_gate(hidden_states)) * self.norm(attended)
    if cache is not None:
        cache.set_linear_cache(self.layer_idx, after)
    return self.out_proj(attended), after


def _after(states: Tensor, begun: Tensor, slope: Tensor) -> Tensor:
    """The state `[batch, heads, width, width]` after all tokens: each one's, decayed by what follows it.

    Args:
        states: query, key and value `[batch, length, heads, 3 * width]`.
        begun: the state before them.
        slope: of each head, `[heads, 1, 1]`.
    """
    _, key, value = states.transpose(1, 2).chunk(3, dim=-1)
    length = states.shape[1]
    following = torch.arange(length, device=states.device).flip(0).to(slope.dtype)
    decayed = key * torch.exp(-slope * following[:, None])
    return (begun * torch.exp(-slope * length) + decayed.transpose(-1, -2) @ value).to(begun.dtype)


def selective_scan(
    self: Any,
    original: Callable[..., Any],
    hidden_states: Tensor,
    cache: Any = None,
    attention_mask: Tensor | None = None,
    **kwargs: Any,
) -> Any:
    """Jamba's mixer. Its own code goes on from the state with one token only, and begins anew with several."""
    state = None if cache is None else cache.get_recurrent_state(self.layer_idx)
    if state is None or hidden_states.shape[1] == 1:
        return original(self, hidden_states, cache=cache, attention_mask=attention_mask, **kwargs)
    source: Any = sys.modules[type(self).__module__]
    begins = source.mamba_selective_scan
    source.mamba_selective_scan = functools.partial(_continued, state.clone())
    try:
        return original(self, hidden_states, cache=cache, attention_mask=attention_mask, **kwargs)
    finally:
        source.mamba_selective_scan = begins


def _continued(
    state: Tensor,
    hidden_states: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    D: Tensor,
    z: Tensor,
    delta_bias: Tensor | None = None,
    return_last_state: bool = True,
    **_: Any,
) -> tuple[Tensor, Tensor]:
    """transformers' `mamba_selective_scan` of tokens `[batch, width, length]` behind a state `[batch, width, n]`."""
    dt = F.softplus(dt if delta_bias is None else dt + delta_bias.to(dt.dtype)[..., None])
    decay = torch.exp(A[None, :, None] * dt[..., None])
    added = dt[..., None] * B.transpose(1, 2)[:, None].float() * hidden_states[..., None].float()

    def step(
        before: Tensor, factor: Tensor, update: Tensor, read: Tensor
    ) -> tuple[tuple[Tensor], tuple[Tensor]]:
        after = factor * before + update
        return (after.to(before.dtype),), ((after.to(read.dtype) @ read[..., None])[..., 0],)

    (state,), (outputs,) = scans.scan(
        [], step, hidden_states.shape[2], [state], [(decay, 2), (added, 2), (C, 2)], []
    )
    return (outputs.movedim(0, 2) + hidden_states * D[:, None]) * F.silu(z), state
