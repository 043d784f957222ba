"""A Python loop over experts, as reference implementations and tutorials write it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparse_onnx.bench.coverage.modules.common import EXPERTS, HIDDEN, INNER, MLP, TOP_K, Build, SwiGLU, case


class MistralReference(nn.Module):
    """mistral-inference: `torch.where`, added to the rows."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(HIDDEN, EXPERTS, bias=False)
        self.experts = nn.ModuleList(SwiGLU() for _ in range(EXPERTS))

    def forward(self, x: Tensor) -> Tensor:
        inputs = x.view(-1, x.shape[-1])
        gate_logits = self.gate(inputs)
        weights, selected_experts = torch.topk(gate_logits, TOP_K)
        weights = F.softmax(weights, dim=1, dtype=torch.float).to(inputs.dtype)
        results = torch.zeros_like(inputs)
        for i, expert in enumerate(self.experts):
            batch_idx, nth_expert = torch.where(selected_experts == i)
            results[batch_idx] += weights[batch_idx, nth_expert, None] * expert(inputs[batch_idx])
        return results.view_as(x)


class MixtralContinue(nn.Module):
    """transformers 4.36 to 4.45: experts without tokens are skipped."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(HIDDEN, EXPERTS, bias=False)
        self.experts = nn.ModuleList([SwiGLU() for _ in range(EXPERTS)])

    def forward(self, x: Tensor) -> Tensor:
        batch_size, sequence_length, hidden_dim = x.shape
        hidden_states = x.view(-1, hidden_dim)
        router_logits = self.gate(hidden_states)
        routing_weights = F.softmax(router_logits, dim=1, dtype=torch.float)
        routing_weights, selected_experts = torch.topk(routing_weights, TOP_K, dim=-1)
        routing_weights /= routing_weights.sum(dim=-1, keepdim=True)
        routing_weights = routing_weights.to(hidden_states.dtype)
        final_hidden_states = torch.zeros(
            (batch_size * sequence_length, hidden_dim), dtype=hidden_states.dtype, device=hidden_states.device
        )
        expert_mask = torch.nn.functional.one_hot(selected_experts, num_classes=EXPERTS).permute(2, 1, 0)
        for expert_idx in range(EXPERTS):
            expert_layer = self.experts[expert_idx]
            idx, top_x = torch.where(expert_mask[expert_idx])
            if top_x.shape[0] == 0:
                continue
            current_state = hidden_states[None, top_x].reshape(-1, hidden_dim)
            current_hidden_states = expert_layer(current_state) * routing_weights[top_x, idx, None]
            final_hidden_states.index_add_(0, top_x, current_hidden_states.to(hidden_states.dtype))
        return final_hidden_states.reshape(batch_size, sequence_length, hidden_dim)


class MixtralHits(MixtralContinue):
    """transformers 4.46 and later: a loop over the experts that were hit."""

    def forward(self, x: Tensor) -> Tensor:
        batch_size, sequence_length, hidden_dim = x.shape
        hidden_states = x.view(-1, hidden_dim)
        routing_weights = F.softmax(self.gate(hidden_states), dim=1, dtype=torch.float)
        routing_weights, selected_experts = torch.topk(routing_weights, TOP_K, dim=-1)
        routing_weights /= routing_weights.sum(dim=-1, keepdim=True)
        final_hidden_states = torch.zeros_like(hidden_states)
        expert_mask = torch.nn.functional.one_hot(selected_experts, num_classes=EXPERTS).permute(2, 1, 0)
        expert_hit = torch.greater(expert_mask.sum(dim=(-1, -2)), 0).nonzero()
        for expert_idx in expert_hit:
            expert_layer = self.experts[expert_idx]
            idx, top_x = torch.where(expert_mask[expert_idx].squeeze(0))
            current_state = hidden_states[None, top_x].reshape(-1, hidden_dim)
            current_hidden_states = expert_layer(current_state) * routing_weights[top_x, idx, None]
            final_hidden_states.index_add_(0, top_x, current_hidden_states.to(hidden_states.dtype))
        return final_hidden_states.reshape(batch_size, sequence_length, hidden_dim)


class PackedHits(nn.Module):
    """transformers 5's plain form: packed weights, and a sentinel expert that is skipped."""

    def __init__(self) -> None:
        super().__init__()
        self.num_experts = EXPERTS
        self.gate = nn.Linear(HIDDEN, EXPERTS, bias=False)
        self.w13 = nn.Parameter(torch.randn(EXPERTS, 2 * INNER, HIDDEN) / HIDDEN**0.5)
        self.w2 = nn.Parameter(torch.randn(EXPERTS, HIDDEN, INNER) / INNER**0.5)

    def forward(self, x: Tensor) -> Tensor:
        hidden_states = x.reshape(-1, HIDDEN)
        top_k_weights, top_k_index = torch.topk(self.gate(hidden_states).softmax(-1), TOP_K, dim=-1)
        final_hidden_states = torch.zeros_like(hidden_states)
        with torch.no_grad():
            expert_mask = F.one_hot(top_k_index, num_classes=self.num_experts)
            expert_mask = expert_mask.permute(2, 1, 0)
            expert_hit = torch.greater(expert_mask.sum(dim=(-1, -2)), 0).nonzero()
        for expert_idx in expert_hit:
            expert_idx = expert_idx[0]
            if expert_idx == self.num_experts:
                continue
            top_k_pos, token_idx = torch.where(expert_mask[expert_idx])
            current_state = hidden_states[token_idx]
            gate, up = F.linear(current_state, self.w13[expert_idx]).chunk(2, dim=-1)
            current_hidden_states = F.linear(F.silu(gate) * up, self.w2[expert_idx])
            current_hidden_states = current_hidden_states * top_k_weights[token_idx, top_k_pos, None]
            final_hidden_states.index_add_(0, token_idx, current_hidden_states.to(final_hidden_states.dtype))
        return final_hidden_states.reshape(x.shape)


class NoisyTopkRouter(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.top_k = TOP_K
        self.topkroute_linear = nn.Linear(HIDDEN, EXPERTS)
        self.noise_linear = nn.Linear(HIDDEN, EXPERTS)

    def forward(self, mh_output: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.topkroute_linear(mh_output)
        if self.training:
            logits = logits + torch.randn_like(logits) * F.softplus(self.noise_linear(mh_output))
        top_k_logits, indices = logits.topk(self.top_k, dim=-1)
        zeros = torch.full_like(logits, float("-inf"))
        sparse_logits = zeros.scatter(-1, indices, top_k_logits)
        return F.softmax(sparse_logits, dim=-1), indices


class MakeMoE(nn.Module):
    """makeMoE: a mask per expert, and `if any`."""

    def __init__(self) -> None:
        super().__init__()
        self.router = NoisyTopkRouter()
        self.experts = nn.ModuleList([MLP() for _ in range(EXPERTS)])
        self.top_k = TOP_K

    def forward(self, x: Tensor) -> Tensor:
        gating_output, indices = self.router(x)
        final_output = torch.zeros_like(x)
        flat_x = x.view(-1, x.size(-1))
        flat_gating_output = gating_output.view(-1, gating_output.size(-1))
        for i, expert in enumerate(self.experts):
            expert_mask = (indices == i).any(dim=-1)
            flat_mask = expert_mask.view(-1)
            if flat_mask.any():
                expert_input = flat_x[flat_mask]
                expert_output = expert(expert_input)
                gating_scores = flat_gating_output[flat_mask, i].unsqueeze(1)
                weighted_output = expert_output * gating_scores
                final_output[expert_mask] += weighted_output.squeeze(1)
        return final_output


class DeepSeekInference(nn.Module):
    """DeepSeek-V3's inference code: counts as a Python list."""

    def __init__(self) -> None:
        super().__init__()
        self.dim = HIDDEN
        self.gate = nn.Linear(HIDDEN, EXPERTS, bias=False)
        self.experts = nn.ModuleList([SwiGLU() for _ in range(EXPERTS)])
        self.shared_experts = SwiGLU()

    def forward(self, x: Tensor) -> Tensor:
        shape = x.size()
        x = x.view(-1, self.dim)
        scores = self.gate(x).sigmoid()
        indices = torch.topk(scores, TOP_K, dim=-1)[1]
        weights = scores.gather(1, indices)
        weights /= weights.sum(dim=-1, keepdim=True)
        y = torch.zeros_like(x)
        counts = torch.bincount(indices.flatten(), minlength=EXPERTS).tolist()
        for i in range(EXPERTS):
            if counts[i] == 0:
                continue
            expert = self.experts[i]
            idx, top = torch.where(indices == i)
            y[idx] += expert(x[idx]) * weights[idx, top, None]
        z = self.shared_experts(x)
        return (y + z).view(shape)


class UniqueLoop(nn.Module):
    """Only the experts in use, by `unique`, one expert a token."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(HIDDEN, EXPERTS)
        self.experts = nn.ModuleList([MLP(act=nn.GELU) for _ in range(EXPERTS)])

    def forward(self, x: Tensor) -> Tensor:
        probs = self.router(x).softmax(-1)
        weight, index = probs.max(-1)
        output = x.new_zeros(x.shape)
        for e in torch.unique(index).tolist():
            mask = index == e
            output[mask] = self.experts[e](x[mask]) * weight[mask].unsqueeze(-1)
        return output


class EarlyReturnHelper(nn.Module):
    """The test is in a method of its own, which returns early."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(HIDDEN, EXPERTS)
        self.experts = nn.ModuleList([MLP() for _ in range(EXPERTS)])

    def _run_expert(self, number: int, tokens: Tensor, index: Tensor, weight: Tensor, out: Tensor) -> None:
        rows, slots = (index == number).nonzero(as_tuple=True)
        if len(rows) == 0:
            return
        out.index_add_(0, rows, self.experts[number](tokens[rows]) * weight[rows, slots].unsqueeze(-1))

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(0, 1)
        weight, index = self.router(tokens).softmax(-1).topk(TOP_K)
        out = torch.zeros_like(tokens)
        for number in range(EXPERTS):
            self._run_expert(number, tokens, index, weight, out)
        return out.unflatten(0, x.shape[:2])


class SlotByExpert(nn.Module):
    """Two loops: over the slots of the top-k, and over experts."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(HIDDEN, EXPERTS)
        self.experts = nn.ModuleList([MLP(act=nn.SiLU) for _ in range(EXPERTS)])

    def forward(self, x: Tensor) -> Tensor:
        weights, chosen = torch.topk(torch.softmax(self.gate(x), dim=-1), TOP_K, dim=-1)
        output = torch.zeros_like(x)
        for k in range(TOP_K):
            for e in range(EXPERTS):
                mask = chosen[..., k] == e
                if mask.sum() > 0:
                    output[mask] += weights[..., k][mask].unsqueeze(-1) * self.experts[e](x[mask])
        return output


class IndexSelect(nn.Module):
    """`nonzero().squeeze()`, `index_select` and `scatter_add_`."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(HIDDEN, EXPERTS, bias=False)
        self.experts = nn.ModuleList([SwiGLU() for _ in range(EXPERTS)])

    def forward(self, x: Tensor) -> Tensor:
        weight, index = self.router(x).softmax(dim=-1).topk(TOP_K, dim=-1)
        out = torch.zeros_like(x)
        for e in range(EXPERTS):
            token = (index == e).any(dim=-1).nonzero().squeeze(-1)
            if not token.numel():
                continue
            rows = torch.index_select(x, 0, token)
            scale = (weight * (index == e)).sum(-1, keepdim=True).index_select(0, token)
            out.scatter_add_(0, token[:, None].expand(-1, HIDDEN), self.experts[e](rows) * scale)
        return out


class SharedAndRouted(MixtralContinue):
    """qwen2-moe: a shared expert with its own sigmoid gate."""

    def __init__(self) -> None:
        super().__init__()
        self.shared_expert = SwiGLU()
        self.shared_expert_gate = nn.Linear(HIDDEN, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + torch.sigmoid(self.shared_expert_gate(x)) * self.shared_expert(x)


class DecoderLayer(nn.Module):
    """Attention, norms, residuals, and a block inside."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.RMSNorm(HIDDEN), nn.RMSNorm(HIDDEN)
        self.qkv, self.proj = nn.Linear(HIDDEN, 3 * HIDDEN, bias=False), nn.Linear(HIDDEN, HIDDEN, bias=False)
        self.mlp = block

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (y.unflatten(-1, (2, -1)).transpose(1, 2) for y in self.qkv(self.norm1(x)).chunk(3, dim=-1))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.proj(y.transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))


class Decoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([DecoderLayer(MixtralContinue()) for _ in range(2)])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


MODULES: dict[str, Build] = {
    "loop_where": case(MistralReference),
    "loop_continue": case(MixtralContinue),
    "loop_continue_float16": case(MixtralContinue, dtype=torch.float16),
    "loop_hits": case(MixtralHits),
    "loop_hits_packed": case(PackedHits),
    "loop_if_any": case(MakeMoE),
    "loop_counts": case(DeepSeekInference),
    "loop_unique": case(UniqueLoop),
    "loop_early_return": case(EarlyReturnHelper),
    "loop_slots": case(SlotByExpert),
    "loop_index_select": case(IndexSelect, rows=True),
    "loop_shared_expert": case(SharedAndRouted),
    "decoder_continue": case(Decoder),
    "decoder_if_any": case(lambda: DecoderLayer(MakeMoE())),
}
