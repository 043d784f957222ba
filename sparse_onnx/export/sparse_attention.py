"""Attention over chosen blocks of keys, for every length at once: forwards that `patches` puts in place.

Qwen4 and GLM-5-Next score blocks of keys and attend to the best ones only. Their code branches on how many blocks there
are, or loops over tokens. Here some more blocks are made than the sequence fills, of padding, and masked: then no count
is ever 0 or 1, and no branch on it is left.
"""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

#: Blocks of padding: with the first one cut off there are still two.
_MORE = 3


def _blocks(states: Tensor, size: int) -> Tensor:
    """`[batch, sequence, width]` -> `[batch, blocks, size, width]`."""
    batch, length, width = states.shape
    padded = F.pad(states, (0, 0, 0, _MORE * size - length % size))
    return padded.reshape(batch, -1, size, width)


def with_new_positions(
    self: Any,
    original: Callable[..., Any],
    hidden_states: Tensor,
    position_embeddings: tuple[Tensor, Tensor],
    attention_mask: Tensor,
    cache: Any = None,
    **kwargs: Any,
) -> Any:
    """Qwen4's attention: the indexer takes the rotary embedding of all tokens, the rest that of the new ones. Taken by
    index, since a slice is contiguous only where there is no past, and the trace would assert that there is one."""
    length = hidden_states.shape[1]
    new = torch.arange(length, device=hidden_states.device) + (position_embeddings[0].shape[1] - length)
    self.indexer.all_positions = position_embeddings
    try:
        embeddings = tuple(each.index_select(1, new) for each in position_embeddings)
        return original(self, hidden_states, embeddings, attention_mask, cache, **kwargs)
    finally:
        del self.indexer.all_positions


def chosen_tokens(
    self: Any,
    original: Callable[..., Any],
    hidden_states: Tensor,
    position_embeddings: tuple[Tensor, Tensor],
    attention_mask: Tensor,
    cache: Any,
) -> Tensor:
    """Qwen4's indexer: a mask `[batch, 1, sequence, past + sequence]` of the tokens in the best blocks, and of those
    behind the last whole block. Blocks are of tokens that are not padding, which every later token sees the same
    way."""
    source: Any = sys.modules[type(self).__module__]
    batch, length, _ = hidden_states.shape
    size, width, heads = self.compress_ratio, self.index_head_dim, self.index_n_heads
    query, keys = self.index_qk_proj(hidden_states).split(
        [heads * width, self.index_kv_heads * width], dim=-1
    )
    if cache is not None:
        keys = cache.update_indexer(keys, self.layer_idx)
    total = keys.shape[1]
    query = self.q_layernorm(query.reshape(batch, length, heads, width))
    cos, sin = position_embeddings
    query = source.apply_rotary_pos_emb(query, cos=cos, sin=sin, unsqueeze_dim=2)
    cos, sin = self.all_positions
    visible = (attention_mask if attention_mask.dtype == torch.bool else attention_mask == 0)[:, 0]
    complete = visible.sum(-1) // size  # [batch, query]
    real = visible[:, -1]
    index = torch.arange(total, device=keys.device)
    order = torch.where(real, index, index + total).argsort(dim=-1)  # tokens first, then padding
    rank = real.cumsum(-1) - 1
    pooled = (
        _blocks(keys.gather(1, order.unsqueeze(-1).expand(-1, -1, width)), size)
        .float()
        .mean(2)
        .to(keys.dtype)
    )
    starts = _blocks(order.unsqueeze(-1), size)[:, :, 0]
    block_cos, block_sin = (
        each.expand(batch, -1, -1).gather(1, starts.expand(-1, -1, each.shape[-1])) for each in (cos, sin)
    )
    pooled = source.apply_rotary_pos_emb(
        self.k_layernorm(pooled).unsqueeze(2), cos=block_cos, sin=block_sin, unsqueeze_dim=2
    ).squeeze(2)
    scores = torch.relu(query.float().flatten(1, 2) @ pooled.float().transpose(-1, -2))
    scores = scores.unflatten(1, (length, heads)).sum(2) / math.sqrt(width)
    blocks = torch.arange(pooled.shape[1], device=keys.device)
    scores = scores.masked_fill(blocks >= complete.unsqueeze(-1), -math.inf)
    best = F.pad(scores, (0, self.block_topk), value=-math.inf).topk(self.block_topk, dim=-1).indices
    count = pooled.shape[1]
    best = torch.where(best < complete.unsqueeze(-1), best, torch.full_like(best, 0) + count)
    taken = torch.zeros_like(F.pad(scores, (0, 1)), dtype=torch.bool).scatter(-1, best, True)
    block = (rank.clamp(min=0) // size).unsqueeze(1).expand(-1, length, -1)
    behind = block >= complete.unsqueeze(-1)
    return ((taken.gather(-1, block) | behind) & visible).unsqueeze(1)


def pooled_tokens(
    self: Any,
    original: Callable[..., Any],
    hidden_states: Tensor,
    q_resid: Tensor,
    attention_mask: Tensor,
    cache: Any,
) -> Any:
    """GLM-5-Next's indexer, with pools of padding behind the tokens': always more than it chooses, none of which is
    valid."""
    self.get_pooled_states = functools.partial(_pools, self)
    try:
        return original(self, hidden_states, q_resid, attention_mask, cache)
    finally:
        del self.get_pooled_states


def _pools(self: Any, packed_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Key `[batch, pools, width]` and tokens `[batch, pools, size]` of each pool, the first of which begins where the
    padding ends, and whether it is whole `[batch, pools]`."""
    size, width = self.index_kpool, self.head_dim
    keys, gates, real = packed_states.split([width, width, 1], dim=-1)
    length = keys.shape[1]
    count = (length + size - 1) // size + self.index_topk // size + _MORE
    real = real[..., 0].bool()
    first = torch.where(real.any(-1), real.long().argmax(-1), torch.zeros_like(real[:, 0].long()) + length)
    index = first[:, None] + torch.arange(count * size, device=keys.device)
    place = index.clamp(0, length - 1)
    kept = (real.gather(1, place) & (index < length)).unflatten(1, (count, size))
    place = place.unsqueeze(-1).expand(-1, -1, width)
    keys, gates = (each.gather(1, place).unflatten(1, (count, size)) for each in (keys, gates))
    scores = (gates.float() + self.index_kpool_compress_ape.float()).masked_fill(~kept[..., None], -math.inf)
    weights = torch.nan_to_num(scores.softmax(dim=2)).to(keys.dtype)
    index = index.unflatten(1, (count, size)).masked_fill(~kept, -1)
    return (weights * keys).sum(dim=2), index, kept.all(-1)
