"""What the modules share: sizes, expert networks, and how a case is built."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

HIDDEN, INNER, EXPERTS, TOP_K = 16, 24, 4, 2
BATCH, SEQUENCE = 3, 5
#: The router's weights are scaled up so that the choice of experts matters, and so that it is no near-tie.
_ROUTER_SCALE = 4.0

Axes = Mapping[str, Mapping[int, str]]
Case = tuple[nn.Module, Tensor, Axes]
Build = Callable[[], Case]

TOKENS: Axes = {"x": {0: "batch", 1: "sequence"}}
ROWS: Axes = {"x": {0: "tokens"}}


class SwiGLU(nn.Module):
    def __init__(self, dim: int = HIDDEN, hidden_dim: int = INNER) -> None:
        super().__init__()
        self.w1 = nn.Linear(dim, hidden_dim, bias=False)
        self.w2 = nn.Linear(hidden_dim, dim, bias=False)
        self.w3 = nn.Linear(dim, hidden_dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class MLP(nn.Module):
    """With biases: an expert that adds something to a row of zeros too."""

    def __init__(self, dim: int = HIDDEN, hidden_dim: int = INNER, act: type[nn.Module] = nn.ReLU) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(dim, hidden_dim), act(), nn.Linear(hidden_dim, dim), nn.Dropout(0.1)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


def case(make: Callable[[], nn.Module], rows: bool = False, dtype: torch.dtype = torch.float32) -> Build:
    """A builder of one case: `[batch, sequence, HIDDEN]`, or `[tokens, HIDDEN]`."""

    def build() -> Case:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(7)
            module = make().eval().to(dtype)
            x = torch.randn(SEQUENCE * BATCH, HIDDEN) if rows else torch.randn(BATCH, SEQUENCE, HIDDEN)
        with torch.no_grad():
            for name, parameter in module.named_parameters():
                if any(word in name for word in ("gate.", "router", "switch", "w_gate", "halt")):
                    parameter.mul_(_ROUTER_SCALE)
        return module, x.to(dtype), ROWS if rows else TOKENS

    return build
