"""Routers and layers as papers' repositories have them: fairseq, DeepSpeed, lucidrains, BASE, SwitchHead, PEER."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparse_onnx.bench.coverage.modules.common import EXPERTS, HIDDEN, INNER, MLP, TOP_K, Build, case


def _one_hot(indices: Tensor, num_classes: Any, unsqueeze_indices: bool = False) -> Tensor:
    if unsqueeze_indices:
        indices = indices.unsqueeze(-1)
    assert indices.shape[-1] == 1, "last dimension of indices must be have size 1"
    output = torch.zeros((*indices.shape[:-1], num_classes), device=indices.device, dtype=indices.dtype)
    output.scatter_(len(output.shape) - 1, indices, 1)
    return output


class FairseqTop2(nn.Module):
    """fairseq's Top2Gate in eval: a share of all tokens as capacity, numbers for a log, combined by bmm."""

    def __init__(self) -> None:
        super().__init__()
        self.wg_router = nn.Linear(HIDDEN, EXPERTS, bias=False)
        self.experts = nn.ModuleList([MLP() for _ in range(EXPERTS)])
        self.eval_capacity_token_fraction = 0.5
        self.metadata: dict[str, Tensor] = {}

    def top2gating(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        gates = F.softmax(logits, dim=1, dtype=torch.float)
        num_tokens, num_experts = gates.shape[0], gates.shape[1]
        if self.eval_capacity_token_fraction > 0.0 and not self.training:
            capacity = math.ceil(self.eval_capacity_token_fraction * num_tokens)
        else:
            capacity = 2 * math.ceil(num_tokens / num_experts)
        mask1 = _one_hot(torch.argmax(gates, dim=1, keepdim=True), num_experts)
        logits_except1 = logits.masked_fill(mask1.bool(), float("-inf"))
        mask2 = _one_hot(torch.argmax(logits_except1, dim=1, keepdim=True), num_experts)
        locations1 = torch.cumsum(mask1, dim=0) - 1
        locations2 = torch.cumsum(mask2, dim=0) - 1
        locations2 += torch.sum(mask1, dim=0, keepdim=True)
        overflow = torch.sum(mask1 * torch.ge(locations1, capacity)) / torch.sum(mask1)
        self.metadata["overflow_expert1"] = 100 * overflow
        mask1, mask2 = mask1 * torch.lt(locations1, capacity), mask2 * torch.lt(locations2, capacity)
        gates1_s, gates2_s = (gates * mask1).sum(dim=1), (gates * mask2).sum(dim=1)
        denom_s = torch.clamp(gates1_s + gates2_s, min=torch.finfo(gates1_s.dtype).eps)
        combine: Any = 0
        for gate, mask, place in ((gates1_s, mask1, locations1), (gates2_s, mask2, locations2)):
            slot = _one_hot(torch.sum(place * mask, dim=1), capacity, unsqueeze_indices=True)
            share = (gate / denom_s).unsqueeze(-1) * mask.to(gate.dtype)
            combine = combine + torch.bmm(share.unsqueeze(-1), slot.to(gate.dtype).unsqueeze(1))
        return combine, combine.bool()

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.reshape(-1, x.shape[-1])
        combine, dispatch = self.top2gating(self.wg_router(tokens))
        s, e, c = dispatch.shape
        rows = torch.mm(dispatch.to(x.dtype).permute(1, 2, 0).reshape(e * c, s), tokens)
        chunks = rows.reshape(e, c, -1).chunk(e, dim=0)
        out = torch.cat([expert(chunk) for chunk, expert in zip(chunks, self.experts, strict=True)], dim=0)
        return combine.view(s, e * c).mm(out.view(e * c, -1)).reshape(x.shape)


class DeepSpeedTop1(nn.Module):
    """DeepSpeed's top1gating: the capacity is a tensor, computed from a Python size; the loss is an output."""

    def __init__(self) -> None:
        super().__init__()
        self.wg_router = nn.Linear(HIDDEN, EXPERTS, bias=False)
        self.experts = nn.ModuleList([MLP() for _ in range(EXPERTS)])

    def _capacity(self, gates: Tensor, capacity_factor: Tensor, min_capacity: Tensor) -> Tensor:
        num_tokens, num_experts = gates.shape[0], gates.shape[1]
        capacity = torch.ceil((num_tokens / num_experts) * capacity_factor).to(torch.int64)
        if capacity < min_capacity:
            capacity = min_capacity.to(torch.int64)
        return capacity

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        tokens = x.reshape(-1, x.shape[-1])
        gates = F.softmax(self.wg_router(tokens.float()), dim=1)
        capacity = self._capacity(gates, torch.tensor(1.0), torch.tensor(4))
        mask1 = F.one_hot(torch.argmax(gates, dim=1), num_classes=EXPERTS)
        l_aux = torch.sum(torch.mean(gates, dim=0) * torch.mean(mask1.float(), dim=0)) * EXPERTS
        locations1 = torch.cumsum(mask1, dim=0) - 1
        mask1 = mask1 * torch.lt(locations1, capacity)
        locations1_s = torch.sum(locations1 * mask1, dim=1)
        slots = F.one_hot(locations1_s, num_classes=int(capacity)).float()
        combine = torch.einsum("se,sc->sec", gates * mask1.float(), slots)
        dispatched = torch.einsum("sec,sm->ecm", combine.bool().type_as(x), tokens)
        out = torch.stack([expert(rows) for expert, rows in zip(self.experts, dispatched, strict=True)])
        return torch.einsum("sec,ecm->sm", combine.type_as(x), out).reshape(x.shape), l_aux


def _safe_one_hot(indexes: Tensor, max_length: Any) -> Tensor:
    max_index: Any = indexes.max() + 1
    one_hot_classes = max(max_index + 1, max_length)
    return F.one_hot(indexes, one_hot_classes)[..., :max_length]


class LucidrainsTop2(nn.Module):
    """lucidrains' mixture-of-experts: a capacity for each sequence, one-hot of a largest position."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Parameter(torch.randn(HIDDEN, EXPERTS) / HIDDEN**0.5)
        self.w1 = nn.Parameter(torch.randn(EXPERTS, HIDDEN, INNER) / HIDDEN**0.5)
        self.w2 = nn.Parameter(torch.randn(EXPERTS, INNER, HIDDEN) / INNER**0.5)

    def forward(self, x: Tensor) -> Tensor:
        raw_gates = torch.einsum("bnd,de->bne", x, self.router).softmax(dim=-1)
        gate_1, index_1 = (each.squeeze(dim=-1) for each in raw_gates.topk(k=1, dim=-1))
        mask_1 = F.one_hot(index_1, EXPERTS).float()
        gate_2, index_2 = (each.squeeze(dim=-1) for each in (raw_gates * (1 - mask_1)).topk(k=1, dim=-1))
        mask_2 = F.one_hot(index_2, EXPERTS).float()
        total = gate_1 + gate_2 + 1e-9
        mask_2 = mask_2 * (gate_2 / total > 0.2).unsqueeze(-1).float()
        capacity = max(min(x.shape[1], int(x.shape[1] * 2.0 / EXPERTS)), 4)
        before: Any = 0
        combine: Any = 0
        for gate, index, mask in ((gate_1 / total, index_1, mask_1), (gate_2 / total, index_2, mask_2)):
            position = (F.pad(mask, (0, 0, 1, -1)).cumsum(dim=-2) + before) * mask
            mask = mask * (position < float(capacity)).float()
            before, place = mask.sum(dim=-2, keepdim=True), position.sum(dim=-1)
            kept = mask.sum(dim=-1)
            slots = _safe_one_hot(place.long(), capacity)[..., None, :]
            combine = combine + (gate * kept)[..., None, None] * F.one_hot(index, EXPERTS)[..., None] * slots
        inputs = torch.einsum("bnd,bnec->ebcd", x, combine.bool().to(combine))
        hidden = F.gelu(torch.einsum("end,edh->enh", inputs.reshape(EXPERTS, -1, HIDDEN), self.w1))
        outputs = torch.einsum("enh,ehd->end", hidden, self.w2).reshape(*inputs.shape)
        return torch.einsum("ebcd,bnec->bnd", outputs, combine)


class BaseLayer(nn.Module):
    """fairseq's BASE layer at inference: the nearest centroid, splits by `unique_consecutive`, a gated residual."""

    def __init__(self) -> None:
        super().__init__()
        self.expert_centroids = nn.Parameter(torch.randn(EXPERTS, HIDDEN))
        self.experts = nn.ModuleList([nn.Sequential(nn.LayerNorm(HIDDEN), MLP()) for _ in range(EXPERTS)])

    def greedy_assignment(self, scores: Tensor) -> tuple[Tensor, list[int]]:
        token_to_workers = torch.topk(scores, dim=1, k=1, largest=True).indices.view(-1)
        token_to_workers, sort_ordering = torch.sort(token_to_workers)
        output_splits = torch.zeros((EXPERTS,), dtype=torch.long, device=scores.device)
        workers, counts = torch.unique_consecutive(token_to_workers, return_counts=True)
        output_splits[workers] = counts
        return sort_ordering, output_splits.tolist()

    def forward(self, x: Tensor) -> Tensor:
        features = x.reshape(-1, x.size(-1))
        with torch.no_grad():
            affinities = torch.matmul(features, self.expert_centroids.transpose(0, 1))
        sort_by_expert, splits = self.greedy_assignment(affinities)
        parts = []
        for e, part in enumerate(torch.split(features[sort_by_expert], splits)):
            if part.size(0) > 0:
                alpha = torch.sigmoid(part.mv(self.expert_centroids[e])).unsqueeze(1)
                part = alpha * (part + self.experts[e](part)) + (1 - alpha) * part
            parts.append(part)
        inverse = torch.empty_like(sort_by_expert)
        inverse[sort_by_expert] = torch.arange(sort_by_expert.size(0))
        return torch.cat(parts, dim=0)[inverse].view(x.size())


class SwitchHead(nn.Module):
    """SwitchHead: each attention head chooses experts for its values and outputs by sigmoid scores."""

    def __init__(self, heads: int = 2, experts: int = 3, size: int = 8) -> None:
        super().__init__()
        self.heads, self.number, self.size = heads, experts, size
        self.q, self.k = (nn.Linear(HIDDEN, heads * size, bias=False) for _ in range(2))
        self.v = nn.Parameter(torch.randn(heads * experts, HIDDEN, size) / 4)
        self.o = nn.Parameter(torch.randn(heads * experts, size, HIDDEN) / 4)
        self.router_v, self.router_o = (nn.Linear(HIDDEN, heads * experts, bias=False) for _ in range(2))

    def choose(self, scores: Tensor) -> tuple[Tensor, Tensor]:
        value, index = scores.unflatten(-1, (self.heads, -1)).sigmoid().topk(TOP_K, dim=-1, sorted=False)
        return value, index + (torch.arange(self.heads) * self.number).unsqueeze(-1)

    def forward(self, x: Tensor) -> Tensor:
        q, k = (each(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for each in (self.q, self.k))
        (v_weight, v_index), (o_weight, o_index) = (
            self.choose(self.router_v(x)),
            self.choose(self.router_o(x)),
        )
        v = (torch.einsum("btd,bthkde->bthke", x, self.v[v_index]) * v_weight.unsqueeze(-1)).sum(-2)
        mixed = F.scaled_dot_product_attention(q, k, v.transpose(1, 2), is_causal=True).transpose(1, 2)
        out = torch.einsum("bthe,bthked->bthkd", mixed, self.o[o_index]) * o_weight.unsqueeze(-1)
        return out.sum((-2, -3))


class Peer(nn.Module):
    """PEER: many experts of one neuron, found by product keys, their weights in embeddings."""

    def __init__(self, heads: int = 2, keys: int = 5, best: int = 3, size: int = 8) -> None:
        super().__init__()
        self.heads, self.number, self.best = heads, keys, best
        self.queries = nn.Linear(HIDDEN, 2 * heads * size, bias=False)
        self.keys = nn.Parameter(torch.randn(heads, keys, 2, size))
        self.down, self.up = nn.Embedding(keys**2, HIDDEN), nn.Embedding(keys**2, HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        queries = self.queries(x).unflatten(-1, (2, self.heads, -1)).permute(2, 0, 1, 3, 4)
        similar = torch.einsum("pbnhk,hepk->pbnhe", queries, self.keys)
        (sx, sy), (ix, iy) = zip(*(each.topk(self.best, dim=-1) for each in similar), strict=True)
        every = (sx.unsqueeze(-1) + sy.unsqueeze(-2)).flatten(-2)
        pairs = (ix.unsqueeze(-1) * self.number + iy.unsqueeze(-2)).flatten(-2)
        scores, place = every.topk(self.best, dim=-1)
        index = pairs.gather(-1, place)
        hidden = F.gelu(torch.einsum("bnd,bnhkd->bnhk", x, self.down(index))) * scores.softmax(-1)
        return torch.einsum("bnhk,bnhkd->bnd", hidden, self.up(index))


MODULES: dict[str, Build] = {
    "fairseq_top2": case(FairseqTop2),
    "deepspeed_top1": case(DeepSpeedTop1),
    "lucidrains_top2": case(LucidrainsTop2),
    "base_layer": case(BaseLayer),
    "switch_head": case(SwitchHead),
    "peer": case(Peer),
}
