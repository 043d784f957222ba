"""All experts or their weights at once, without Python control flow; and mixtures that are not sparse."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparse_onnx.bench.coverage.modules.common import EXPERTS, HIDDEN, INNER, MLP, TOP_K, Build, case


class GptFast(nn.Module):
    """gpt-fast: the chosen experts' weights are gathered."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(HIDDEN, EXPERTS, bias=False)
        self.w1 = nn.Parameter(torch.randn(EXPERTS, INNER, HIDDEN) / HIDDEN**0.5)
        self.w2 = nn.Parameter(torch.randn(EXPERTS, HIDDEN, INNER) / INNER**0.5)
        self.w3 = nn.Parameter(torch.randn(EXPERTS, INNER, HIDDEN) / HIDDEN**0.5)

    def forward(self, x: Tensor) -> Tensor:
        shape = x.shape
        x = x.view(-1, HIDDEN)
        expert_weights = F.softmax(self.gate(x), dim=-1)
        expert_weights, expert_indices = torch.topk(expert_weights, TOP_K, dim=-1)
        expert_weights /= expert_weights.sum(dim=-1, keepdim=True)
        w1_weights, w3_weights = self.w1[expert_indices], self.w3[expert_indices]
        w2_weights = self.w2[expert_indices]
        x1 = F.silu(torch.einsum("ti,taoi -> tao", x, w1_weights))
        x3 = torch.einsum("ti, taoi -> tao", x, w3_weights)
        expert_outs = torch.einsum("tao, taio -> tai", (x1 * x3), w2_weights)
        return torch.einsum("tai,ta -> ti", expert_outs, expert_weights).view(shape)


class StackedMask(nn.Module):
    """Every expert on every token; the gates of the others are zero."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(HIDDEN, EXPERTS)
        self.experts = nn.ModuleList([MLP() for _ in range(EXPERTS)])

    def forward(self, x: Tensor) -> Tensor:
        weights, indices = torch.topk(self.gate(x).softmax(-1), TOP_K, dim=-1)
        gates = torch.zeros_like(self.gate(x)).scatter(-1, indices, weights)
        outputs = torch.stack([expert(x) for expert in self.experts], dim=-2)
        return (gates.unsqueeze(-1) * outputs).sum(dim=-2)


class PackedMask(nn.Module):
    """The same by batched products."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(HIDDEN, EXPERTS)
        self.up = nn.Parameter(torch.randn(EXPERTS, HIDDEN, INNER) / HIDDEN**0.5)
        self.down = nn.Parameter(torch.randn(EXPERTS, INNER, HIDDEN) / INNER**0.5)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.reshape(-1, HIDDEN)
        weights, indices = self.router(tokens).softmax(-1).topk(TOP_K, dim=-1)
        gates = torch.zeros(tokens.shape[0], EXPERTS, dtype=x.dtype).scatter_(1, indices, weights)
        inner = F.gelu(torch.bmm(tokens.expand(EXPERTS, -1, -1), self.up))
        return (torch.bmm(inner, self.down) * gates.T.unsqueeze(-1)).sum(0).reshape(x.shape)


class SoftMixture(nn.Module):
    """Not sparse: every expert has its share of every token."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(HIDDEN, EXPERTS)
        self.experts = nn.ModuleList([MLP() for _ in range(EXPERTS)])

    def forward(self, x: Tensor) -> Tensor:
        weights = F.softmax(self.gate(x), dim=-1)
        outputs = torch.stack([expert(x) for expert in self.experts], dim=2)
        return torch.einsum("bse,bsed->bsd", weights, outputs)


class SoftSlots(nn.Module):
    """Soft MoE (Puigcerver et al.): slots are mixtures of tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.phi = nn.Parameter(torch.randn(HIDDEN, EXPERTS, 2) / HIDDEN**0.5)
        self.experts = nn.ModuleList([MLP() for _ in range(EXPERTS)])

    def forward(self, x: Tensor) -> Tensor:
        logits = torch.einsum("bnd,dep->bnep", x, self.phi)
        dispatch = logits.softmax(dim=1)
        combine = logits.flatten(2).softmax(dim=-1).unflatten(-1, (EXPERTS, 2))
        slots = torch.einsum("bnd,bnep->bepd", x, dispatch)
        outs = torch.stack([expert(slots[:, i]) for i, expert in enumerate(self.experts)], dim=1)
        return torch.einsum("bepd,bnep->bnd", outs, combine)


class ReluFFN(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(HIDDEN, 4 * HIDDEN), nn.Linear(4 * HIDDEN, HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.relu(self.up(x)))


class TopKAutoencoder(nn.Module):
    """A sparse autoencoder: the k largest activations."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = nn.Linear(HIDDEN, 8 * HIDDEN), nn.Linear(8 * HIDDEN, HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        pre = self.encoder(x - self.decoder.bias)
        values, indices = torch.topk(pre, 8, dim=-1)
        latents = torch.zeros_like(pre).scatter_(-1, indices, F.relu(values))
        return self.decoder(latents)


class MultiGate(nn.Module):
    """MMoE: one soft gate a task over shared experts."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList([MLP() for _ in range(EXPERTS)])
        self.gates = nn.ModuleList([nn.Linear(HIDDEN, EXPERTS) for _ in range(2)])
        self.towers = nn.ModuleList([nn.Linear(HIDDEN, 1) for _ in range(2)])

    def forward(self, x: Tensor) -> list[Tensor]:
        experts = torch.stack([expert(x) for expert in self.experts], dim=1)
        outputs = []
        for gate, tower in zip(self.gates, self.towers, strict=True):
            share = gate(x).softmax(dim=-1).unsqueeze(-1)
            outputs.append(tower((share * experts).sum(dim=1)))
        return outputs


MODULES: dict[str, Build] = {
    "gathered_weights": case(GptFast),
    "stacked_mask": case(StackedMask),
    "packed_mask": case(PackedMask),
    "soft_mixture": case(SoftMixture),
    "soft_slots": case(SoftSlots),
    "multi_gate": case(MultiGate, rows=True),
    "relu_ffn": case(ReluFFN),
    "topk_activation": case(TopKAutoencoder),
}
