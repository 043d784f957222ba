"""Python between router and experts: lists of what some experts have, one expert by its number, numpy, a loop over
tokens; and experts that are no feed-forward networks."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sparse_onnx.bench.coverage.modules.common import BATCH, EXPERTS, HIDDEN, MLP, TOP_K, Build, Case, case


class Routed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(HIDDEN, EXPERTS)
        self.experts: Any = nn.ModuleList([MLP() for _ in range(EXPERTS)])


class CollectedJobs(Routed):
    """Which experts have which rows, in a list; run in a second loop."""

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.view(-1, HIDDEN)
        weight, index = self.router(tokens).softmax(-1).topk(TOP_K, dim=-1)
        jobs = []
        for e in range(EXPERTS):
            row, slot = torch.where(index == e)
            if row.numel() > 0:
                jobs.append((e, row, slot))
        out = torch.zeros_like(tokens)
        for e, row, slot in jobs:
            out.index_add_(0, row, self.experts[e](tokens[row]) * weight[row, slot, None])
        return out.view_as(x)


class ListedChunks(Routed):
    """Sorted chunks; empty ones are left out by the `if` of a comprehension."""

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.view(-1, HIDDEN)
        weight, index = self.router(tokens).softmax(-1).max(-1)
        order = index.argsort(stable=True)
        chunks = torch.split(tokens[order], torch.bincount(index, minlength=EXPERTS).tolist())
        outs = [self.experts[e](chunk) for e, chunk in enumerate(chunks) if chunk.shape[0] > 0]
        out = torch.empty_like(tokens)
        out[order] = torch.cat(outs)
        return (out * weight[:, None]).view_as(x)


class NumpyOffsets(Routed):
    """Where each expert's rows begin, by numpy."""

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.view(-1, HIDDEN)
        weight, index = self.router(tokens).softmax(-1).max(-1)
        order = index.argsort(stable=True)
        counts = torch.bincount(index, minlength=EXPERTS).cpu().numpy()
        offsets = np.concatenate([[0], np.cumsum(counts)])
        out = torch.zeros_like(tokens)
        for e, expert in enumerate(self.experts):
            start, end = offsets[e], offsets[e + 1]
            if start == end:
                continue
            out[order[start:end]] = expert(tokens[order[start:end]])
        return (out * weight[:, None]).view_as(x)


class _Scatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tokens: Tensor, order: Tensor) -> Tensor:
        ctx.save_for_backward(order)
        return tokens[order // TOP_K]


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, order: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(rows, order, weight)
        out = rows.new_zeros(weight.shape[0], rows.shape[1])
        if rows.numel() == 0:
            return out
        return out.index_add_(0, order // TOP_K, rows * weight.flatten()[order, None])


class AutogradFunctions(Routed):
    """fastmoe and megablocks: permutation and its inverse as autograd functions."""

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.view(-1, HIDDEN)
        weight, index = self.router(tokens).softmax(-1).topk(TOP_K, dim=-1)
        order = index.view(-1).argsort(stable=True)
        counts = torch.bincount(index.view(-1), minlength=EXPERTS).tolist()
        chunks = _Scatter.apply(tokens, order).split(counts)
        outs = [e(chunk) if chunk.numel() else chunk for e, chunk in zip(self.experts, chunks, strict=True)]
        return _Gather.apply(torch.cat(outs), order, weight).view_as(x)


class OneForAll(Routed):
    """The whole input goes to one expert, taken by its number."""

    def forward(self, x: Tensor) -> Tensor:
        number = self.router(x.mean(dim=(0, 1))).argmax().item()
        return self.experts[number](x)


class TokenLoop(Routed):
    """Token by token, as first attempts are written."""

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.view(-1, HIDDEN)
        weight, index = self.router(tokens).softmax(-1).topk(TOP_K, dim=-1)
        out = torch.zeros_like(tokens)
        for t in range(tokens.size(0)):
            for k in range(TOP_K):
                out[t] += weight[t, k] * self.experts[index[t, k]](tokens[t])
        return out.view_as(x)


class LstmExperts(nn.Module):
    """Whole sequences go to recurrent experts, of which some get none."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(HIDDEN, EXPERTS)
        self.experts = nn.ModuleList([nn.LSTM(HIDDEN, HIDDEN, batch_first=True) for _ in range(EXPERTS)])

    def forward(self, x: Tensor) -> Tensor:
        weight, index = self.router(x.mean(1)).softmax(-1).max(-1)
        out = torch.zeros_like(x)
        for e, lstm in enumerate(self.experts):
            mine = index == e
            if mine.any():
                states, _ = lstm(x[mine])
                out[mine] = states * weight[mine].view(-1, 1, 1)
        return out


class ConvExperts(nn.Module):
    """Images go to experts of convolution and batch normalisation, by their pooled features."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.router = nn.Conv2d(3, 8, 3, padding=1), nn.Linear(8, EXPERTS)
        self.experts = nn.ModuleList(
            [
                nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
                for _ in range(EXPERTS)
            ]
        )
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        features = self.stem(x)
        weight, index = self.router(features.mean((2, 3))).softmax(-1).topk(TOP_K, dim=-1)
        out = torch.zeros_like(features)
        for e, expert in enumerate(self.experts):
            image, slot = torch.where(index == e)
            if image.numel():
                out[image] += expert(features[image]) * weight[image, slot].view(-1, 1, 1, 1)
        return self.head(out.mean((2, 3)))


def _images() -> Case:
    module, _, _ = case(ConvExperts)()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(8)
        return module, torch.randn(BATCH, 3, 6, 6), {"x": {0: "batch"}}


MODULES: dict[str, Build] = {
    "collected_jobs": case(CollectedJobs),
    "listed_chunks": case(ListedChunks),
    "numpy_offsets": case(NumpyOffsets),
    "autograd_functions": case(AutogradFunctions),
    "one_for_all": case(OneForAll),
    "token_loop": case(TokenLoop),
    "lstm_experts": case(LstmExperts),
    "conv_experts": _images,
}
