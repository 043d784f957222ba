"""Attention over chosen blocks of keys, for every length at once: forwards that `patches` puts in place.

DeepSeek-V4 and Qwen4 score blocks of keys and attend to the best ones only. Their code branches on how many blocks
there are, or loops over tokens. Here some more blocks are made than the sequence fills, of padding, and masked: then no
count is ever 0 or 1, and no branch on it is left.
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


def heavily_compressed(
    self: Any,
    original: Callable[..., Any],
    hidden_states: Tensor,
    q_residual: Tensor,
    position_ids: Tensor,
    cache: Any,
    layer_idx: int,
) -> Any:
    """DeepSeek-V4's HCA compressor: one key `[batch, 1, blocks, width]` a block of tokens, and a mask of those that a
    token does not follow."""
    if cache is not None:
        return original(self, hidden_states, q_residual, position_ids, cache, layer_idx)
    keys = _blocks(self.kv_proj(hidden_states), self.compress_rate)
    gates = _blocks(self.gate_proj(hidden_states), self.compress_rate) + self.position_bias
    compressed = _compressed(self, keys, gates).unsqueeze(1)
    future = _future(position_ids, self.compress_rate, compressed.shape[2])
    batch, length, _ = hidden_states.shape
    bias = compressed.new_zeros((batch, 1, length, compressed.shape[2]))
    return compressed, bias.masked_fill(future.unsqueeze(1), -math.inf)


def sparsely_compressed(
    self: Any,
    original: Callable[..., Any],
    hidden_states: Tensor,
    q_residual: Tensor,
    position_ids: Tensor,
    cache: Any,
    layer_idx: int,
) -> Any:
    """DeepSeek-V4's CSA compressor: keys of overlapping blocks, and a mask of all that the indexer leaves out."""
    if cache is not None:
        return original(self, hidden_states, q_residual, position_ids, cache, layer_idx)
    compressed = _overlapping(self, hidden_states).unsqueeze(1)
    chosen = self.indexer(hidden_states, q_residual, position_ids, cache, layer_idx)
    count = compressed.shape[2]
    place = torch.where(chosen >= 0, chosen, torch.full_like(chosen, 0) + count)
    batch, length, _ = hidden_states.shape
    bias = compressed.new_full((batch, 1, length, count + 1), -math.inf)
    return compressed, bias.scatter(-1, place.unsqueeze(1), 0.0)[..., :count]


def indexed(
    self: Any,
    original: Callable[..., Any],
    hidden_states: Tensor,
    q_residual: Tensor,
    position_ids: Tensor,
    cache: Any,
    layer_idx: int,
) -> Tensor:
    """DeepSeek-V4's indexer: the best blocks `[batch, sequence, K]` for each token, -1 where there are fewer."""
    if cache is not None:
        return original(self, hidden_states, q_residual, position_ids, cache, layer_idx)
    source: Any = sys.modules[type(self).__module__]
    batch, length, _ = hidden_states.shape
    keys = _overlapping(self, hidden_states)
    cos, sin = self.rotary_emb(hidden_states, position_ids=position_ids, layer_type=self.rope_layer_type)
    query = self.q_b_proj(q_residual).view(batch, length, -1, self.head_dim).transpose(1, 2)
    query = source.apply_rotary_pos_emb(query, cos, sin).transpose(1, 2)
    scores = self.scorer(query, keys, hidden_states)
    scores = scores.masked_fill(_future(position_ids, self.compress_rate, keys.shape[1]), -math.inf)
    chosen = F.pad(scores, (0, self.index_topk), value=-math.inf).topk(self.index_topk, dim=-1).indices
    missing = chosen >= ((position_ids + 1) // self.compress_rate).unsqueeze(-1)
    return torch.where(missing, torch.full_like(chosen, -1), chosen)


def _blocks(states: Tensor, size: int) -> Tensor:
    """`[batch, sequence, width]` -> `[batch, blocks, size, width]`."""
    batch, length, width = states.shape
    padded = F.pad(states, (0, 0, 0, _MORE * size - length % size))
    return padded.reshape(batch, -1, size, width)


def _overlapping(self: Any, hidden_states: Tensor) -> Tensor:
    """Each block's key, of its own tokens' second half and the tokens' first half of the block before."""
    width = self.head_dim
    keys = _blocks(self.kv_proj(hidden_states), self.compress_rate)
    gates = _blocks(self.gate_proj(hidden_states), self.compress_rate) + self.position_bias
    before = F.pad(keys[:, :-1, :, :width], (0, 0, 0, 0, 1, 0))
    before_gates = F.pad(gates[:, :-1, :, :width], (0, 0, 0, 0, 1, 0), value=-math.inf)
    return _compressed(
        self,
        torch.cat([before, keys[..., width:]], dim=2),
        torch.cat([before_gates, gates[..., width:]], dim=2),
    )


def _compressed(self: Any, keys: Tensor, gates: Tensor) -> Tensor:
    """The gated mean of each block, normalised and rotated: `[batch, blocks, width]`."""
    source: Any = sys.modules[type(self).__module__]
    weights = gates.softmax(dim=2, dtype=torch.float32).to(keys.dtype)
    compressed = self.kv_norm((keys * weights).sum(dim=2))
    positions = torch.arange(keys.shape[1], device=keys.device) * self.compress_rate
    positions = positions.unsqueeze(0).expand(keys.shape[0], -1)
    cos, sin = self.rotary_emb(compressed, position_ids=positions, layer_type=self.rope_layer_type)
    return source.apply_rotary_pos_emb(compressed.unsqueeze(1), cos, sin).squeeze(1)


def _future(position_ids: Tensor, size: int, count: Any) -> Tensor:
    """Blocks `[batch, sequence, blocks]` that are not complete before a token."""
    index = torch.arange(count, device=position_ids.device)
    return index >= ((position_ids + 1) // size).unsqueeze(-1)


def chosen_tokens(
    self: Any,
    original: Callable[..., Any],
    hidden_states: Tensor,
    position_embeddings: tuple[Tensor, Tensor],
    attention_mask: Tensor,
    cache: Any,
) -> Tensor:
    """Qwen4's indexer: a mask `[batch, 1, sequence, sequence]` of the tokens in the best blocks, and of those behind
    the last whole block. Blocks are of tokens that are not padding, which every later token sees the same way."""
    if cache is not None:
        return original(self, hidden_states, position_embeddings, attention_mask, cache)
    source: Any = sys.modules[type(self).__module__]
    batch, length, _ = hidden_states.shape
    size, width, heads = self.compress_ratio, self.index_head_dim, self.index_n_heads
    cos, sin = position_embeddings
    query, keys = self.index_qk_proj(hidden_states).split(
        [heads * width, self.index_kv_heads * width], dim=-1
    )
    query = self.q_layernorm(query.reshape(batch, length, heads, width))
    query = source.apply_rotary_pos_emb(query, cos=cos, sin=sin, unsqueeze_dim=2)
    visible = (attention_mask if attention_mask.dtype == torch.bool else attention_mask == 0)[:, 0]
    complete = visible.sum(-1) // size  # [batch, query]
    real = visible[:, -1]
    index = torch.arange(length, device=keys.device)
    order = torch.where(real, index, index + length).argsort(dim=-1)  # tokens first, then padding
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
    """Key `[batch, pools, width]` and tokens `[batch, pools, size]` of each pool, which begin at the first token that is
    not padding, and whether it is whole `[batch, pools]`."""
    size, width = self.index_kpool, self.head_dim
    keys, gates, real = packed_states.split([width, width, 1], dim=-1)
    batch, length = keys.shape[:2]
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
