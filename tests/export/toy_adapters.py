"""A module that torch.export cannot follow, and adapters for it, good and bad."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparse_onnx.export.adapters import PackedExperts

HIDDEN, INNER, EXPERTS = 12, 10, 5


class Expert(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(HIDDEN, INNER, bias=False)
        self.up = nn.Linear(HIDDEN, INNER)
        self.down = nn.Linear(INNER, HIDDEN, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class LoopingMoE(nn.Module):
    """Loops over the experts that were hit, and calls each with all it has to do."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(HIDDEN, EXPERTS)
        self.experts = nn.ModuleList(Expert() for _ in range(EXPERTS))

    def forward(self, x: Tensor) -> Tensor:
        weight, index = self.router(x).softmax(-1).topk(2, dim=-1)
        total = torch.zeros_like(x)
        for expert in index.unique().tolist():
            token, slot = torch.where(index == expert)
            total[token] += self.experts[expert](x[token]) * weight[token, slot, None]
        return total


def model() -> Any:
    torch.manual_seed(3)
    layers = nn.Sequential(LoopingMoE(), nn.Tanh(), LoopingMoE())
    for layer in (layers[0], layers[2]):
        nn.init.normal_(layer.router.weight)
    return layers, torch.randn(14, HIDDEN), {"input": {0: "tokens"}}


class Packed(nn.Module):
    note = "packed for a test"
    activation = staticmethod(F.silu)

    def __init__(self, module: LoopingMoE) -> None:
        super().__init__()
        self.router = module.router
        self.experts = PackedExperts.of_linears(
            [expert.up for expert in module.experts],
            [expert.down for expert in module.experts],
            self.activation,
            gate=[expert.gate for expert in module.experts],
        )

    def forward(self, x: Tensor) -> Tensor:
        weight, index = self.router(x).softmax(-1).topk(2, dim=-1)
        return self.experts(x, index, weight)


class Wrong(Packed):
    activation = staticmethod(F.relu)


class WrongForOneExpert(Packed):
    def __init__(self, module: LoopingMoE) -> None:
        super().__init__(module)
        with torch.no_grad():
            self.experts.down_proj[3] *= 1.01


class OtherShape(Packed):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)[:, 1:]


class Raises(Packed):
    def forward(self, x: Tensor) -> Tensor:
        raise ValueError("not today")


def _adapter(kind: type[nn.Module]) -> Any:
    return lambda module: kind(module) if type(module).__name__ == "LoopingMoE" else None


good, wrong, wrong_for_one, other_shape, raises_in_forward = map(
    _adapter, (Packed, Wrong, WrongForOneExpert, OtherShape, Raises)
)


def raises(module: nn.Module) -> None:
    raise KeyError(type(module).__name__)


def none(module: nn.Module) -> None:
    return None


def number(module: nn.Module) -> Any:
    return 5


not_callable = 3


class MishMoE(LoopingMoE):
    def forward(self, x: Tensor) -> Tensor:
        weight, index = self.router(x).softmax(-1).topk(2, dim=-1)
        total = torch.zeros_like(x)
        for expert in index.unique().tolist():
            token, slot = torch.where(index == expert)
            part = self.experts[expert]
            total[token] += (
                part.down(F.mish(part.gate(x[token])) * part.up(x[token])) * weight[token, slot, None]
            )
        return total


class PackedMish(Packed):
    activation = staticmethod(F.mish)


def mish_model() -> Any:
    torch.manual_seed(3)
    return MishMoE(), torch.randn(14, HIDDEN), {"x": {0: "tokens"}}


def mish(module: nn.Module) -> nn.Module | None:
    return PackedMish(module) if isinstance(module, MishMoE) else None
