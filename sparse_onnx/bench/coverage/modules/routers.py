"""Other ways to choose experts: by a table, by the experts, in two steps, by sign, by probability mass."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparse_onnx.bench.coverage.modules.common import (
    BATCH,
    EXPERTS,
    HIDDEN,
    MLP,
    SEQUENCE,
    TOKENS,
    Build,
    Case,
    SwiGLU,
    case,
)

_VOCABULARY = 50


class HashRouting(nn.Module):
    """Roller et al.: a fixed table from a token's id to its expert; only experts that occur are run."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(_VOCABULARY, HIDDEN)
        self.register_buffer("table", torch.randint(0, EXPERTS, (_VOCABULARY,)))
        self.experts = nn.ModuleList([MLP() for _ in range(EXPERTS)])

    def forward(self, x: Tensor) -> Tensor:
        flat = self.embedding(x).reshape(-1, HIDDEN)
        expert_ids = self.table[x].reshape(-1)  # type: ignore[index]
        out = torch.zeros_like(flat)
        for e in expert_ids.unique():
            mask = expert_ids == e
            out[mask] = self.experts[e](flat[mask])  # type: ignore[index]
        return out.reshape(*x.shape, HIDDEN)


class SparseMixer(nn.Module):
    """Phi-3.5-MoE's router, and its first experts loop: rows as Python lists."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(HIDDEN, EXPERTS, bias=False)
        self.experts = nn.ModuleList([SwiGLU() for _ in range(EXPERTS)])

    def choose(self, scores: Tensor, left: Tensor, jitter_eps: float = 0.01) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            threshold, index = left.max(dim=-1, keepdim=True)
            factor = scores.abs().clamp(min=threshold)
            mask = ((threshold - scores) / factor) > (2 * jitter_eps)
        weight = torch.softmax(left.masked_fill(mask, float("-inf")), dim=-1).gather(dim=-1, index=index)
        return weight, index

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.view(-1, HIDDEN)
        scores = self.gate(tokens)
        first, chosen = self.choose(scores, scores)
        second, other = self.choose(scores, torch.scatter(scores, -1, chosen, float("-inf")))
        weights = torch.concat((first, second), dim=-1)
        expert_mask = F.one_hot(torch.concat((chosen, other), dim=-1), num_classes=EXPERTS).permute(2, 1, 0)
        final = torch.zeros_like(tokens)
        for expert_idx in range(EXPERTS):
            idx, top_x = torch.where(expert_mask[expert_idx])
            if top_x.shape[0] == 0:
                continue
            top_x_list = top_x.tolist()
            idx_list = idx.tolist()
            current = tokens[None, top_x_list].reshape(-1, HIDDEN)
            current = self.experts[expert_idx](current) * weights[top_x_list, idx_list, None]
            final.index_add_(0, top_x, current.to(tokens.dtype))
        return final.reshape(x.shape)


class ExpertChoiceCapped(nn.Module):
    """Experts take their best tokens of all: at least one, at most what there is."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(HIDDEN, EXPERTS, bias=False)
        self.experts = nn.ModuleList([MLP() for _ in range(EXPERTS)])

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.view(-1, HIDDEN)
        number = tokens.shape[0]
        capacity = min(number, max(1, int(2.0 * number / EXPERTS)))
        gates, indices = torch.topk(F.softmax(self.router(tokens), dim=-1).t(), k=capacity, dim=-1)
        output = torch.zeros_like(tokens)
        for i, expert in enumerate(self.experts):
            output.index_add_(0, indices[i], expert(tokens[indices[i]]) * gates[i].unsqueeze(-1))
        return output.view_as(x)


class TwoLevels(nn.Module):
    """A group of experts first, then two of its experts: a loop in a loop, each left early."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(HIDDEN, 2)
        self.gates = nn.ModuleList([nn.Linear(HIDDEN, EXPERTS) for _ in range(2)])
        self.groups = nn.ModuleList([nn.ModuleList([MLP() for _ in range(EXPERTS)]) for _ in range(2)])

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.view(-1, HIDDEN)
        group_weight, group = self.router(tokens).softmax(-1).max(-1)
        out = torch.zeros_like(tokens)
        for g, experts in enumerate(self.groups):
            rows = (group == g).nonzero().squeeze(-1)
            if rows.numel() == 0:
                continue
            mine = tokens[rows]
            weight, index = self.gates[g](mine).softmax(-1).topk(2, -1)
            part = torch.zeros_like(mine)
            for e, expert in enumerate(experts):  # type: ignore[arg-type, var-annotated]
                row, slot = torch.where(index == e)
                if row.numel() == 0:
                    continue
                part.index_add_(0, row, expert(mine[row]) * weight[row, slot].unsqueeze(-1))
            out[rows] = part * group_weight[rows].unsqueeze(-1)
        return out.view(x.shape)


class ReluRouting(nn.Module):
    """ReMoE: each expert whose score is positive, which may be none."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(HIDDEN, EXPERTS)
        self.experts = nn.ModuleList([MLP() for _ in range(EXPERTS)])

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.view(-1, HIDDEN)
        gates = F.relu(self.router(tokens))
        out = torch.zeros_like(tokens)
        for e, expert in enumerate(self.experts):
            rows = torch.nonzero(gates[:, e] > 0, as_tuple=True)[0]
            if len(rows):
                out[rows] += gates[rows, e].unsqueeze(1) * expert(tokens[rows])
        return out.view_as(x)


class TopP(nn.Module):
    """Experts until their probabilities sum to p."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(HIDDEN, EXPERTS)
        self.experts = nn.ModuleList([MLP() for _ in range(EXPERTS)])

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.reshape(-1, HIDDEN)
        probability = F.softmax(self.router(tokens), -1)
        ordered, index = torch.sort(probability, descending=True, dim=-1)
        keep = torch.cumsum(ordered, -1) - ordered < 0.6
        mask = torch.zeros_like(probability, dtype=torch.bool).scatter(1, index, keep)
        weight = probability.masked_fill(~mask, 0)
        weight = weight / weight.sum(-1, keepdim=True)
        out = torch.zeros_like(tokens)
        for i in range(EXPERTS):
            if mask[:, i].any():
                ids = mask[:, i].nonzero(as_tuple=False).view(-1)
                out[ids] = out[ids] + self.experts[i](tokens[ids]) * weight[ids, i : i + 1]
        return out.view_as(x)


class NullExperts(nn.Module):
    """MoE++: among the experts one that gives nothing, one that copies, and a constant one."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(HIDDEN, EXPERTS + 3, bias=False)
        self.experts = nn.ModuleList([SwiGLU() for _ in range(EXPERTS)])
        self.constant = nn.Parameter(torch.randn(HIDDEN))

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.reshape(-1, HIDDEN)
        weight, ids = self.router(tokens).softmax(-1, dtype=torch.float32).topk(3, dim=-1)
        out = torch.zeros_like(tokens)
        for i in range(EXPERTS + 3):
            row, slot = (ids == i).nonzero(as_tuple=True)
            if row.shape[0] == 0:
                continue
            current = tokens[row]
            if i < EXPERTS:
                current = self.experts[i](current)
            elif i == EXPERTS:
                current = torch.zeros_like(current)
            elif i > EXPERTS + 1:
                current = self.constant.expand_as(current)
            out = out.index_add(0, row, current * weight[row, slot].unsqueeze(-1))
        return out.view_as(x)


def _ids() -> Case:
    module, _, _ = case(HashRouting)()
    ids = torch.arange(BATCH * SEQUENCE).mul(7).remainder(_VOCABULARY).reshape(BATCH, SEQUENCE)
    return module, ids, TOKENS


MODULES: dict[str, Build] = {
    "hash_routing": _ids,
    "sparse_mixer": case(SparseMixer),
    "expert_choice_capped": case(ExpertChoiceCapped),
    "two_levels": case(TwoLevels),
    "relu_routing": case(ReluRouting),
    "top_p": case(TopP),
    "null_experts": case(NullExperts),
}
