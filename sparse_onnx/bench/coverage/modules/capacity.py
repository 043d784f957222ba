"""Experts of a limited capacity, which is a Python number computed from the number of tokens."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparse_onnx.bench.coverage.modules.common import EXPERTS, HIDDEN, INNER, MLP, Build, case


class SwitchFeedForward(nn.Module):
    """labml.ai's Switch Transformer: lists of indices, tokens over the capacity are dropped."""

    def __init__(self, capacity_factor: float = 1.2, drop_tokens: bool = True, scale: bool = True) -> None:
        super().__init__()
        self.capacity_factor, self.is_scale_prob = capacity_factor, scale
        self.n_experts, self.drop_tokens = EXPERTS, drop_tokens
        self.experts = nn.ModuleList([MLP() for _ in range(EXPERTS)])
        self.switch = nn.Linear(HIDDEN, EXPERTS)
        self.softmax = nn.Softmax(dim=-1)

    def forward(self, x: Tensor) -> Tensor:
        seq_len, batch_size, d_model = x.shape
        x = x.view(-1, d_model)
        route_prob = self.softmax(self.switch(x))
        route_prob_max, routes = torch.max(route_prob, dim=-1)
        indexes_list = [torch.eq(routes, i).nonzero(as_tuple=True)[0] for i in range(self.n_experts)]
        final_output = x.new_zeros(x.shape)
        capacity = int(self.capacity_factor * len(x) / self.n_experts)
        dropped = []
        if self.drop_tokens:
            for i in range(self.n_experts):
                if len(indexes_list[i]) <= capacity:
                    continue
                dropped.append(indexes_list[i][capacity:])
                indexes_list[i] = indexes_list[i][:capacity]
        expert_output = [self.experts[i](x[indexes_list[i], :]) for i in range(self.n_experts)]
        for i in range(self.n_experts):
            final_output[indexes_list[i], :] = expert_output[i]
        if dropped:
            dropped = torch.cat(dropped)  # type: ignore[assignment]
            final_output[dropped, :] = x[dropped, :]
        if self.is_scale_prob:
            final_output = final_output * route_prob_max.view(-1, 1)
        return final_output.view(seq_len, batch_size, d_model)


class SwitchLists(SwitchFeedForward):
    """The same without dropping."""

    def __init__(self) -> None:
        super().__init__(drop_tokens=False)


class SwitchSlices(nn.Module):
    """Dropping by slices of each expert's tokens: a slice beyond the end is the whole."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(HIDDEN, EXPERTS)
        self.experts = nn.ModuleList([MLP() for _ in range(EXPERTS)])

    def forward(self, x: Tensor) -> Tensor:
        prob, route = self.router(x).softmax(-1).max(-1)
        capacity = math.ceil(len(x) / EXPERTS * 1.25)
        out = x.clone()
        for e, expert in enumerate(self.experts):
            kept = torch.nonzero(route == e).flatten()[:capacity]
            out[kept] = expert(x[kept]) * prob[kept, None]
        return out


class GShardAllTokens(nn.Module):
    """A capacity of all tokens, so that none is dropped."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(HIDDEN, EXPERTS, bias=False)
        self.wi = nn.Parameter(torch.randn(EXPERTS, HIDDEN, INNER) / HIDDEN**0.5)
        self.wo = nn.Parameter(torch.randn(EXPERTS, INNER, HIDDEN) / INNER**0.5)

    def capacity(self, tokens: int) -> int:
        return tokens

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.reshape(-1, HIDDEN)
        gates = F.softmax(self.router(tokens), dim=-1)
        gate, index = gates.max(dim=-1)
        mask = F.one_hot(index, num_classes=EXPERTS)
        position = ((torch.cumsum(mask, dim=0) - 1) * mask).sum(dim=-1)
        capacity = self.capacity(tokens.shape[0])
        kept = position < capacity
        slots = F.one_hot(position * kept, num_classes=capacity).to(x.dtype) * kept[:, None]
        dispatch = torch.einsum("se,sc->sec", mask.to(x.dtype), slots)
        inputs = torch.einsum("sec,sm->ecm", dispatch, tokens)
        outputs = torch.einsum("ech,ehm->ecm", F.relu(torch.einsum("ecm,emh->ech", inputs, self.wi)), self.wo)
        return torch.einsum("sec,ecm->sm", gate[:, None, None] * dispatch, outputs).reshape(x.shape)


class GShardInt(GShardAllTokens):
    def capacity(self, tokens: int) -> int:
        return int(2 * tokens / EXPERTS) + 1


class GShardCeil(GShardAllTokens):
    """DeepSpeed's: rounded up, at least a minimum."""

    def capacity(self, tokens: int) -> int:
        return max(math.ceil(tokens * 1.1 / EXPERTS), 4)


class GShardRound(GShardAllTokens):
    def capacity(self, tokens: int) -> int:
        return min(tokens, max(1, round(1.5 * tokens / EXPERTS)))


class MaskedCapacity(nn.Module):
    """Dropping by a mask; experts see all tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(HIDDEN, EXPERTS)
        self.experts = nn.ModuleList([MLP() for _ in range(EXPERTS)])

    def forward(self, x: Tensor) -> Tensor:
        prob, index = self.router(x).softmax(-1).max(-1)
        mask = F.one_hot(index, EXPERTS)
        location = torch.cumsum(mask, 0) - mask
        mask = mask * (location < int(1.25 * x.shape[0] / EXPERTS))
        gates = mask * prob[:, None]
        return sum(gates[:, e, None] * expert(x) for e, expert in enumerate(self.experts))


class ExpertChoice(nn.Module):
    """Experts choose tokens (Zhou et al.): the number that each takes comes from the number of tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(HIDDEN, EXPERTS, bias=False)
        self.experts = nn.ModuleList([MLP() for _ in range(EXPERTS)])

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.reshape(-1, HIDDEN)
        k = max(1, int(tokens.shape[0] * 2.0 / EXPERTS))
        gates, index = torch.topk(self.router(tokens).softmax(-1).T, k, dim=-1)
        out = torch.zeros_like(tokens)
        for e, expert in enumerate(self.experts):
            out.index_add_(0, index[e], expert(tokens[index[e]]) * gates[e, :, None])
        return out.reshape(x.shape)


MODULES: dict[str, Build] = {
    "switch_dropping": case(SwitchFeedForward),
    "switch_lists": case(SwitchLists),
    "switch_slices": case(SwitchSlices, rows=True),
    "gshard_all_tokens": case(GShardAllTokens),
    "gshard_int": case(GShardInt),
    "gshard_ceil": case(GShardCeil),
    "gshard_round": case(GShardRound),
    "masked_capacity": case(MaskedCapacity, rows=True),
    "expert_choice": case(ExpertChoice),
}
