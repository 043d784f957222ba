"""Other ways to bring rows to experts and back: counts repeated, bins padded, masks, low-rank experts, tables."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparse_onnx.bench.coverage.modules.common import EXPERTS, HIDDEN, INNER, MLP, TOP_K, Build, case


class Torchtitan(nn.Module):
    """torchtitan's MoE: histc, a stable argsort, rows up to the sum of the counts, scatter_add."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(HIDDEN, EXPERTS, bias=False)
        self.w1 = nn.Parameter(torch.randn(EXPERTS, INNER, HIDDEN) / 4)
        self.w2 = nn.Parameter(torch.randn(EXPERTS, HIDDEN, INNER) / 4)
        self.w3 = nn.Parameter(torch.randn(EXPERTS, INNER, HIDDEN) / 4)
        self.register_buffer("expert_bias", torch.randn(EXPERTS) * 0.05)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.view(-1, HIDDEN)
        scores = torch.sigmoid(self.gate(tokens).to(torch.float32))
        _, chosen = torch.topk(scores + self.expert_bias, k=TOP_K, dim=1)  # type: ignore[operator]
        top = scores.gather(dim=1, index=chosen)
        counts = torch.histc(chosen.view(-1).float(), bins=EXPERTS, min=0, max=EXPERTS)
        order = torch.argsort(chosen.view(-1), stable=True)
        top = top.view(-1)[order]
        index = (order // TOP_K).reshape(-1, 1).expand(-1, HIDDEN)
        routed = torch.gather(tokens, dim=0, index=index) * top.reshape(-1, 1)
        out = self.run_experts(routed, counts)
        return torch.zeros_like(tokens).scatter_add(dim=0, index=index, src=out).reshape(x.shape)

    def run_experts(self, rows: Tensor, num_tokens_per_expert: Tensor) -> Tensor:
        counts = num_tokens_per_expert.int().tolist()
        num_padding = rows.shape[0] - sum(counts)
        splits = torch.split(rows[: sum(counts)], split_size_or_sections=counts, dim=0)
        outs = []
        for e, mine in enumerate(splits):
            h = F.silu(torch.matmul(mine, self.w1[e].transpose(-2, -1)))
            h = h * torch.matmul(mine, self.w3[e].transpose(-2, -1))
            outs.append(torch.matmul(h, self.w2[e].transpose(-2, -1)))
        out = torch.cat(outs, dim=0)
        return torch.vstack((out, out.new_zeros((num_padding, out.shape[-1]))))


class CountsRepeated(nn.Module):
    """Each sorted row's expert by `repeat_interleave` of the counts, and its weights gathered."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(HIDDEN, EXPERTS)
        self.w_in = nn.Parameter(torch.randn(EXPERTS, INNER, HIDDEN) / 4)
        self.w_out = nn.Parameter(torch.randn(EXPERTS, HIDDEN, INNER) / 4)

    def forward(self, x: Tensor) -> Tensor:
        number = x.shape[0] * x.shape[1]
        tokens = x.reshape(number, HIDDEN)
        weight, index = self.gate(tokens).softmax(-1).topk(TOP_K)
        flat = index.view(-1)
        order = flat.argsort(stable=True)
        owner = torch.repeat_interleave(torch.arange(EXPERTS), flat.bincount(minlength=EXPERTS))
        rows = tokens.repeat_interleave(TOP_K, dim=0)[order]
        inner = torch.bmm(self.w_in[owner], rows.unsqueeze(-1)).squeeze(-1).relu()
        outer = torch.bmm(self.w_out[owner], inner.unsqueeze(-1)).squeeze(-1)
        out = torch.empty_like(outer)
        out[order] = outer
        return (out.view(number, TOP_K, HIDDEN) * weight.unsqueeze(-1)).sum(1).view_as(x)


class PaddedBins(nn.Module):
    """megablocks without its kernels: bins as long as the fullest, one bmm."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(HIDDEN, EXPERTS, bias=False)
        self.w1 = nn.Parameter(torch.randn(EXPERTS, HIDDEN, INNER) / 4)
        self.w2 = nn.Parameter(torch.randn(EXPERTS, INNER, HIDDEN) / 4)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.view(-1, HIDDEN)
        weights, top = torch.topk(self.router(tokens).softmax(-1), TOP_K, dim=-1)
        bin_ids, indices = torch.sort(top.flatten())
        counts = torch.histc(top.flatten().float(), bins=EXPERTS, min=0, max=EXPERTS - 1).int()
        starts = torch.cumsum(counts, 0) - counts
        capacity = int(counts.max().item())
        position = torch.arange(top.numel()) - starts[bin_ids]
        bins = tokens.new_zeros(EXPERTS, capacity, HIDDEN)
        bins[bin_ids, position] = tokens[indices // TOP_K]
        y = torch.bmm(F.gelu(torch.bmm(bins, self.w1)), self.w2)
        rows = y[bin_ids, position] * weights.flatten()[indices].unsqueeze(-1)
        return torch.zeros_like(tokens).index_add_(0, indices // TOP_K, rows).view_as(x)


class MaskedScatter(nn.Module):
    """masked_select, a view, and masked_scatter back."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(HIDDEN, EXPERTS)
        self.experts = nn.ModuleList([MLP() for _ in range(EXPERTS)])

    def forward(self, x: Tensor) -> Tensor:
        top = self.router(x).argmax(dim=-1, keepdim=True)
        out = torch.zeros_like(x)
        for i, expert in enumerate(self.experts):
            mask = (top == i).expand_as(x)
            out = out.masked_scatter(mask, expert(torch.masked_select(x, mask).view(-1, HIDDEN)))
        return out


class LoraExperts(nn.Module):
    """MoLE: low-rank experts beside a layer that all tokens use; rows by batch and position."""

    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Linear(HIDDEN, HIDDEN)
        self.router = nn.Linear(HIDDEN, EXPERTS)
        self.lora_a = nn.ParameterList([nn.Parameter(torch.randn(4, HIDDEN) / 4) for _ in range(EXPERTS)])
        self.lora_b = nn.ParameterList([nn.Parameter(torch.randn(HIDDEN, 4) / 2) for _ in range(EXPERTS)])

    def forward(self, x: Tensor) -> Tensor:
        result = self.base(x)
        weights, selected = torch.topk(self.router(x), TOP_K, dim=-1)
        weights = F.softmax(weights, dim=-1, dtype=torch.float).to(x.dtype)
        delta = torch.zeros_like(result)
        for i in range(EXPERTS):
            batch, position, nth = torch.where(selected == i)
            if batch.numel() == 0:
                continue
            low = x[batch, position] @ self.lora_a[i].t() @ self.lora_b[i].t()
            delta[batch, position] += weights[batch, position, nth, None] * low
        return result + delta


class ProductKeys(nn.Module):
    """Lample et al.: the best of all pairs of two half keys, a bag of rows of a table."""

    def __init__(self, keys: int = 6, best: int = 3) -> None:
        super().__init__()
        self.number, self.best = keys, best
        self.query = nn.Linear(HIDDEN, 12)
        self.keys = nn.Parameter(torch.randn(2, keys, 6))
        self.values = nn.EmbeddingBag(keys**2, HIDDEN, mode="sum")

    def forward(self, x: Tensor) -> Tensor:
        query = self.query(x).reshape(-1, 12)
        first, i1 = F.linear(query[:, :6], self.keys[0]).topk(self.best, dim=1)
        second, i2 = F.linear(query[:, 6:], self.keys[1]).topk(self.best, dim=1)
        scores = (first.unsqueeze(2) + second.unsqueeze(1)).flatten(1)
        rows = (i1.unsqueeze(2) * self.number + i2.unsqueeze(1)).flatten(1)
        scores, index = scores.topk(self.best, dim=1)
        out = self.values(rows.gather(1, index), per_sample_weights=F.softmax(scores, dim=-1))
        return out.view_as(x)


class SplitByUnique(nn.Module):
    """Sorted by expert, split by the counts of `unique_consecutive`, experts by name."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(HIDDEN, EXPERTS)
        self.experts = nn.ModuleDict({f"expert_{i}": MLP() for i in range(EXPERTS)})

    def forward(self, x: Tensor) -> Tensor:
        score, index = self.gate(x).softmax(-1).max(-1)
        ordered, order = index.sort(stable=True)
        ids, counts = torch.unique_consecutive(ordered, return_counts=True)
        outs = []
        for e, chunk in zip(ids.tolist(), x[order].split(counts.tolist())):  # noqa: B905
            outs.append(self.experts[f"expert_{e}"](chunk))
        out = torch.empty_like(x)
        out[order] = torch.cat(outs, dim=0)
        return out * score.unsqueeze(-1)


MODULES: dict[str, Build] = {
    "token_reorderer": case(Torchtitan),
    "counts_repeated": case(CountsRepeated),
    "padded_bins": case(PaddedBins),
    "masked_scatter": case(MaskedScatter),
    "lora_experts": case(LoraExperts),
    "product_keys": case(ProductKeys),
    "split_by_unique": case(SplitByUnique, rows=True),
}
