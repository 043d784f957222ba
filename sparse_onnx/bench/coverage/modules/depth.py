"""Layers that are skipped: early exit, mixture-of-depths, gates on whole layers."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sparse_onnx.bench.coverage.modules.common import HIDDEN, MLP, Build, case


class EarlyExit(nn.Module):
    """Confident after the first layer: done."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = MLP(), MLP()
        self.halt, self.head = nn.Linear(HIDDEN, 1), nn.Linear(HIDDEN, 7)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.first(x)
        if torch.sigmoid(self.halt(x)).mean() > 0.5:
            return self.head(x)
        x = x + self.second(x)
        return self.head(x)


class BranchyNet(nn.Module):
    """An exit after each layer, by the entropy of its own head."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([MLP() for _ in range(3)])
        self.heads = nn.ModuleList([nn.Linear(HIDDEN, 7) for _ in range(3)])
        self.threshold = 1.85

    def forward(self, x: Tensor) -> Tensor:
        logits = x
        for layer, head in zip(self.layers, self.heads, strict=True):
            x = x + layer(x)
            logits = head(x)
            p = logits.softmax(-1)
            entropy = -(p * p.log()).sum(-1).mean().item()
            if entropy < self.threshold:
                break
        return logits


class ExitAt(nn.Module):
    """Layers until the last token is sure enough; which layer that was is a second output."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([MLP() for _ in range(3)])
        self.halt = nn.Linear(HIDDEN, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        for i, layer in enumerate(self.layers):
            x = x + layer(x)
            confidence = torch.sigmoid(self.halt(x[:, -1])).min()
            if confidence > 0.5 and i < len(self.layers) - 1:
                break
        return x, torch.tensor(i)


class GatedLayers(nn.Module):
    """Each layer by a gate on the mean token, as a Python number."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([MLP() for _ in range(3)])
        self.router = nn.Linear(HIDDEN, 3)

    def forward(self, x: Tensor) -> Tensor:
        scores = self.router(x.mean(dim=(0, 1)))
        for i, layer in enumerate(self.layers):
            if scores[i].item() > 0:
                x = x + layer(x)
        return x


class EitherOr(nn.Module):
    """One expert for the whole input: sequence-level routing."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(HIDDEN, 1)
        self.small, self.large = MLP(), nn.Sequential(MLP(), MLP())

    def forward(self, x: Tensor) -> Tensor:
        hard = bool(self.router(x).mean() > 0)
        x = self.large(x) if hard else self.small(x)
        return x * 2


class MixtureOfDepths(nn.Module):
    """The most important tokens of each sequence go through the layer."""

    def __init__(self) -> None:
        super().__init__()
        self.router, self.layer = nn.Linear(HIDDEN, 1, bias=False), MLP()

    def forward(self, x: Tensor) -> Tensor:
        _, s, d = x.shape
        k = max(1, int(0.5 * s))
        weight = self.router(x).squeeze(-1)
        top, index = torch.topk(weight, k, dim=1)
        index, order = torch.sort(index, dim=1)
        top = top.gather(1, order)
        picked = index.unsqueeze(-1).expand(-1, -1, d)
        update = self.layer(torch.gather(x, 1, picked)) * torch.sigmoid(top).unsqueeze(-1)
        return x.scatter_add(1, picked, update)


class SkipTokens(nn.Module):
    """Tokens below a threshold skip the layer, and all of it if none is above."""

    def __init__(self) -> None:
        super().__init__()
        self.router, self.layer = nn.Linear(HIDDEN, 1), MLP()

    def forward(self, x: Tensor) -> Tensor:
        keep = self.router(x).squeeze(-1) > 0
        if not keep.any():
            return x
        out = x.clone()
        out[keep] = out[keep] + self.layer(x[keep])
        return out


class Ponder(nn.Module):
    """Adaptive computation: another round while some token has not halted."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.halt = MLP(), nn.Linear(HIDDEN, 1)

    def forward(self, x: Tensor) -> Tensor:
        halted = torch.zeros(x.shape[:-1])
        while (halted < 1).any():
            halted = halted + torch.sigmoid(self.halt(x)).squeeze(-1) + 0.1
            x = x + self.layer(x) * (halted < 1).unsqueeze(-1)
        return x


MODULES: dict[str, Build] = {
    "early_exit": case(EarlyExit),
    "early_exit_layers": case(BranchyNet),
    "exit_at": case(ExitAt),
    "gated_layers": case(GatedLayers),
    "either_or": case(EitherOr),
    "mixture_of_depths": case(MixtureOfDepths),
    "skip_tokens": case(SkipTokens),
    "ponder": case(Ponder),
}
