"""Tokens sorted by expert, split by counts that are Python numbers, and put together again."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparse_onnx.bench.coverage.modules.common import EXPERTS, HIDDEN, MLP, TOP_K, Build, SwiGLU, case


class SparseDispatcher:
    """Shazeer et al., in the PyTorch version that most copies descend from."""

    def __init__(self, num_experts: int, gates: Tensor) -> None:
        self._gates = gates
        self._num_experts = num_experts
        sorted_experts, index_sorted_experts = torch.nonzero(gates).sort(0)
        _, self._expert_index = sorted_experts.split(1, dim=1)
        self._batch_index = torch.nonzero(gates)[index_sorted_experts[:, 1], 0]
        self._part_sizes = (gates > 0).sum(0).tolist()
        gates_exp = gates[self._batch_index.flatten()]
        self._nonzero_gates = torch.gather(gates_exp, 1, self._expert_index)

    def dispatch(self, inp: Tensor) -> tuple[Tensor, ...]:
        inp_exp = inp[self._batch_index].squeeze(1)
        return torch.split(inp_exp, self._part_sizes, dim=0)

    def combine(self, expert_out: list[Tensor], multiply_by_gates: bool = True) -> Tensor:
        stitched = torch.cat(expert_out, 0)
        if multiply_by_gates:
            stitched = stitched.mul(self._nonzero_gates)
        zeros = torch.zeros(self._gates.size(0), expert_out[-1].size(1), device=stitched.device)
        return zeros.index_add(0, self._batch_index, stitched.float())


class Shazeer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w_gate = nn.Parameter(torch.randn(HIDDEN, EXPERTS) / HIDDEN**0.5)
        self.experts = nn.ModuleList([MLP() for _ in range(EXPERTS)])

    def top_k_gating(self, x: Tensor) -> Tensor:
        logits = x @ self.w_gate
        top_logits, top_indices = logits.topk(min(TOP_K + 1, EXPERTS), dim=1)
        top_k_gates = top_logits[:, :TOP_K].softmax(1)
        return torch.zeros_like(logits).scatter(1, top_indices[:, :TOP_K], top_k_gates)

    def forward(self, x: Tensor) -> Tensor:
        dispatcher = SparseDispatcher(EXPERTS, self.top_k_gating(x))
        expert_inputs = dispatcher.dispatch(x)
        expert_outputs = [self.experts[i](expert_inputs[i]) for i in range(EXPERTS)]
        return dispatcher.combine(expert_outputs)


class DeepSeekMoEInfer(nn.Module):
    """DeepSeek-V2's `moe_infer`: slices of the sorted tokens, outputs in a list."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(HIDDEN, EXPERTS, bias=False)
        self.experts = nn.ModuleList([SwiGLU() for _ in range(EXPERTS)])

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.view(-1, x.shape[-1])
        topk_weight, topk_ids = torch.topk(self.gate(tokens).softmax(dim=-1), k=TOP_K, dim=-1)
        return self.moe_infer(tokens, topk_ids, topk_weight).view(*x.shape)

    def moe_infer(self, x: Tensor, topk_ids: Tensor, topk_weight: Tensor) -> Tensor:
        cnts = topk_ids.new_zeros((topk_ids.shape[0], len(self.experts)))
        cnts.scatter_(1, topk_ids, 1)
        tokens_per_expert = cnts.sum(dim=0)
        idxs = topk_ids.view(-1).argsort()
        sorted_tokens = x[idxs // topk_ids.shape[1]]
        tokens_per_expert = tokens_per_expert.cpu().numpy()  # type: ignore[assignment]
        outputs = []
        start_idx = 0
        for i, num_tokens in enumerate(tokens_per_expert):
            end_idx = start_idx + num_tokens
            if num_tokens == 0:
                continue
            expert = self.experts[i]
            tokens_for_this_expert = sorted_tokens[start_idx:end_idx]
            outputs.append(expert(tokens_for_this_expert))
            start_idx = end_idx
        outs = torch.cat(outputs, dim=0)
        new_x = torch.empty_like(outs)
        new_x[idxs] = outs
        return (
            new_x.view(*topk_ids.shape, -1)
            .type(topk_weight.dtype)
            .mul_(topk_weight.unsqueeze(dim=-1))
            .sum(dim=1)
            .type(new_x.dtype)
        )


class DeepSeekV1(DeepSeekMoEInfer):
    """DeepSeek-MoE 16B's: counts by bincount, `scatter_reduce_` into a cache."""

    def moe_infer(self, x: Tensor, topk_ids: Tensor, topk_weight: Tensor) -> Tensor:
        flat_expert_indices, flat_expert_weights = topk_ids.view(-1), topk_weight.view(-1, 1)
        expert_cache = torch.zeros_like(x)
        idxs = flat_expert_indices.argsort()
        tokens_per_expert = flat_expert_indices.bincount(minlength=EXPERTS).cpu().numpy().cumsum(0)
        token_idxs = idxs // TOP_K
        for i, end_idx in enumerate(tokens_per_expert):
            start_idx = 0 if i == 0 else tokens_per_expert[i - 1]
            if start_idx == end_idx:
                continue
            expert = self.experts[i]
            exp_token_idx = token_idxs[start_idx:end_idx]
            expert_tokens = x[exp_token_idx]
            expert_out = expert(expert_tokens)
            expert_out.mul_(flat_expert_weights[idxs[start_idx:end_idx]])
            expert_cache.scatter_reduce_(
                0, exp_token_idx.view(-1, 1).repeat(1, x.shape[-1]), expert_out, reduce="sum"
            )
        return expert_cache


class SortedSplit(nn.Module):
    """Sorted by expert, `split` by counts, one expert a chunk."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(HIDDEN, EXPERTS, bias=False)
        self.experts = nn.ModuleList([MLP(act=nn.GELU) for _ in range(EXPERTS)])

    def forward(self, x: Tensor) -> Tensor:
        weight, index = torch.topk(F.softmax(self.router(x), dim=-1), TOP_K, dim=-1)
        order = torch.argsort(index.flatten(), stable=True)
        counts = torch.bincount(index.flatten(), minlength=EXPERTS).tolist()
        chunks = torch.split(x[order // TOP_K], counts)
        rows = torch.cat([expert(chunk) for expert, chunk in zip(self.experts, chunks)])  # noqa: B905
        scaled = rows * weight.flatten()[order].unsqueeze(-1)
        return torch.zeros_like(x).index_add(0, order // TOP_K, scaled)


class CollectedRows(nn.Module):
    """Rows and outputs of each expert in use are collected in lists, and scattered in the end."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(HIDDEN, EXPERTS)
        self.experts = nn.ModuleList([MLP() for _ in range(EXPERTS)])

    def forward(self, x: Tensor) -> Tensor:
        weight, index = self.router(x).softmax(-1).max(dim=-1)
        rows, outputs = [], []
        for e, expert in enumerate(self.experts):
            (row,) = torch.where(index == e)
            if row.numel() > 0:
                rows.append(row)
                outputs.append(expert(x[row]) * weight[row, None])
        result = torch.empty_like(x)
        result[torch.cat(rows)] = torch.cat(outputs)
        return result


MODULES: dict[str, Build] = {
    "sparse_dispatcher": case(Shazeer, rows=True),
    "sorted_slices": case(DeepSeekMoEInfer),
    "sorted_cumulated": case(DeepSeekV1),
    "sorted_split": case(SortedSplit, rows=True),
    "collected_rows": case(CollectedRows, rows=True),
}
