"""DeepSeek-V4's attention over compressed blocks of tokens, for every length at once: forwards that `patches` puts in
place.

Its code branches on how many blocks there are. Here some more blocks are made than the tokens fill, and masked: then no
count is ever 0 or 1, and no branch on it is left. With a cache, `layer.states` holds what `past.compressed` names.
"""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

#: Blocks of padding: with the first one cut off there are still two.
_MORE = 3


@dataclasses.dataclass(frozen=True)
class _Rows:
    """What a compressor makes of the new tokens, in blocks `[batch, blocks, rate, width]` from the first one on that
    the past has left open; gates with their bias. `first` blocks were full before, and `whole` of these are."""

    keys: Tensor
    gates: Tensor
    first: Any
    whole: Any


def heavily_compressed(
    self: Any,
    original: Callable[..., Any],
    hidden_states: Tensor,
    q_residual: Tensor,
    position_ids: Tensor,
    cache: Any,
    layer_idx: int,
) -> Any:
    """The HCA compressor: one key `[batch, 1, blocks, width]` a block of tokens, and a mask of those that a token does
    not follow. A single token sees all that are whole, whatever its position is."""
    layer = None if cache is None else cache.layers[layer_idx]
    if layer is not None and not hasattr(layer, "states"):
        return original(self, hidden_states, q_residual, position_ids, cache, layer_idx)
    rows = _rows(self, hidden_states, layer, "compressor")
    keys = _compressed(self, rows.keys, rows.gates, rows.first)
    keys = _kept(layer, "compressor", keys, rows)
    index = torch.arange(keys.shape[1], device=keys.device)
    future = _future(position_ids, self.compress_rate, index)
    if layer is not None:
        several = torch.ones_like(position_ids[:1]).sum() > 1
        future = (future & several) | (index >= rows.first + rows.whole)
    batch, length, _ = hidden_states.shape
    bias = keys.new_zeros((batch, 1, length, keys.shape[1]))
    return keys.unsqueeze(1), bias.masked_fill(future.unsqueeze(1), -math.inf)


def sparsely_compressed(
    self: Any,
    original: Callable[..., Any],
    hidden_states: Tensor,
    q_residual: Tensor,
    position_ids: Tensor,
    cache: Any,
    layer_idx: int,
) -> Any:
    """The CSA compressor: keys of overlapping blocks, and a mask of all that the indexer leaves out."""
    layer = None if cache is None else cache.layers[layer_idx]
    if layer is not None and not hasattr(layer, "states"):
        return original(self, hidden_states, q_residual, position_ids, cache, layer_idx)
    compressed = _overlapping(self, hidden_states, layer, "compressor")[0].unsqueeze(1)
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
    """The indexer: the best blocks `[batch, sequence, K]` for each token, -1 where there are fewer."""
    layer = None if cache is None else cache.layers[layer_idx]
    if layer is not None and not hasattr(layer, "states"):
        return original(self, hidden_states, q_residual, position_ids, cache, layer_idx)
    source: Any = sys.modules[type(self).__module__]
    batch, length, _ = hidden_states.shape
    keys, rows = _overlapping(self, hidden_states, layer, "indexer")
    cos, sin = self.rotary_emb(hidden_states, position_ids=position_ids, layer_type=self.rope_layer_type)
    query = self.q_b_proj(q_residual).view(batch, length, -1, self.head_dim).transpose(1, 2)
    query = source.apply_rotary_pos_emb(query, cos, sin).transpose(1, 2)
    scores = self.scorer(query, keys, hidden_states)
    index = torch.arange(keys.shape[1], device=keys.device)
    future = _future(position_ids, self.compress_rate, index) | (index >= rows.first + rows.whole)
    scores = scores.masked_fill(future, -math.inf)
    best, chosen = F.pad(scores, (0, self.index_topk), value=-math.inf).topk(self.index_topk, dim=-1)
    return torch.where(best == -math.inf, torch.full_like(chosen, -1), chosen)


def _rows(self: Any, hidden_states: Tensor, layer: Any, name: str) -> _Rows:
    """With a cache, what the tokens of an unfinished block have left goes first, and what is left now is kept."""
    keys, gates, size = self.kv_proj(hidden_states), self.gate_proj(hidden_states), self.compress_rate
    batch, length, _ = keys.shape
    if layer is None:
        padding = (0, 0, 0, _MORE * size - length % size)
        keys, gates = (
            F.pad(each, padding).reshape(batch, -1, size, each.shape[-1]) for each in (keys, gates)
        )
        return _Rows(keys, gates + self.position_bias, 0, length // size)
    states, rest = layer.states, (layer.keys.shape[2] - length) % size
    whole = (rest + length) // size

    def place(token: Tensor) -> Tensor:
        """In buffer and new tokens, `size - 1` and `length` of them."""
        return torch.where(token < rest, token, token - rest + size - 1).clamp(max=length + size - 2)

    blocks = length // size + _MORE
    taken = place(torch.arange(blocks * size, device=keys.device))
    left = torch.arange(size - 1, device=keys.device)
    valid = (left < (rest + length) % size)[:, None]
    left = place(left + whole * size)
    first = states[f"{name}_compressed"].shape[1]
    both = []
    for kind, new in (("buffer", keys), ("gate", gates)):
        tokens = torch.cat([states[f"{name}_{kind}"], new], dim=1)
        kept = tokens.index_select(1, left)
        states[f"{name}_{kind}"] = torch.where(valid, kept, torch.zeros_like(kept))
        both.append(tokens.index_select(1, taken).reshape(batch, blocks, size, -1))
    return _Rows(both[0], both[1] + self.position_bias, first, whole)


def _overlapping(self: Any, hidden_states: Tensor, layer: Any, name: str) -> tuple[Tensor, _Rows]:
    """Each block's key, of its own tokens' second half and the tokens' first half of the block before."""
    width = self.head_dim
    rows = _rows(self, hidden_states, layer, name)
    keys, gates = rows.keys, rows.gates
    begun = [
        keys.new_zeros(keys[:, :1, :, :width].shape),
        gates.new_full(gates[:, :1, :, :width].shape, -math.inf),
    ]
    if layer is not None:
        any_before = torch.arange(1, device=keys.device) + rows.first > 0
        last = torch.arange(1, device=keys.device) + rows.whole
        for at, (kind, values) in enumerate((("overlap", keys), ("overlap_gate", gates))):
            before = layer.states[f"{name}_{kind}"].unsqueeze(1)
            begun[at] = torch.where(any_before, before, begun[at])
            layer.states[f"{name}_{kind}"] = torch.cat([before, values[..., :width]], 1).index_select(
                1, last
            )[:, 0]
    before, before_gates = (
        torch.cat([first.to(values.dtype), values[:, :-1, :, :width]], dim=1)
        for first, values in zip(begun, (keys, gates), strict=True)
    )
    compressed = _compressed(
        self,
        torch.cat([before, keys[..., width:]], dim=2),
        torch.cat([before_gates, gates[..., width:]], dim=2),
        rows.first,
    )
    return _kept(layer, name, compressed, rows), rows


def _compressed(self: Any, keys: Tensor, gates: Tensor, first: Any) -> Tensor:
    """The gated mean of each block, normalised and rotated: `[batch, blocks, width]`."""
    source: Any = sys.modules[type(self).__module__]
    weights = gates.softmax(dim=2, dtype=torch.float32).to(keys.dtype)
    compressed = self.kv_norm((keys * weights).sum(dim=2))
    positions = (torch.arange(keys.shape[1], device=keys.device) + first) * self.compress_rate
    positions = positions.unsqueeze(0).expand(keys.shape[0], -1)
    cos, sin = self.rotary_emb(compressed, position_ids=positions, layer_type=self.rope_layer_type)
    return source.apply_rotary_pos_emb(compressed.unsqueeze(1), cos, sin).squeeze(1)


def _kept(layer: Any, name: str, compressed: Tensor, rows: _Rows) -> Tensor:
    """Behind the blocks of the past; the whole ones are the cache's."""
    if layer is None:
        return compressed
    everything = torch.cat([layer.states[f"{name}_compressed"], compressed], dim=1)
    whole = torch.arange(rows.first + rows.whole, device=compressed.device)
    layer.states[f"{name}_compressed"] = everything.index_select(1, whole)
    return everything


def _future(position_ids: Tensor, size: int, index: Tensor) -> Tensor:
    """Blocks `[batch, sequence, blocks]` that are not complete before a token."""
    return index >= ((position_ids + 1) // size).unsqueeze(-1)
