"""ViTPose++: the data set of an image decides the matrix that its last features are computed by."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


@torch.no_grad()
def experts(module: Any) -> nn.Module:
    """`VitPoseNaiveMoe`, which computes all experts for each image."""
    linears = list(module)
    return _Experts(
        torch.stack([linear.weight for linear in linears]), torch.stack([linear.bias for linear in linears])
    )


class _Experts(nn.Module):
    """Experts of one matrix each, which have no neutral form: each image gathers the one it needs."""

    note = "experts of one matrix each have no neutral form; each image gathers its own, operator by operator"

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = nn.Parameter(bias, requires_grad=False)

    def forward(self, hidden_state: Tensor, indices: Tensor) -> Tensor:
        """`[B, P, D]` and `[B, 1, 1] -> [B, P, D_out]`; zeros for an index of no expert."""
        index = indices.reshape(-1)
        known = (index >= 0) & (index < self.weight.shape[0])
        chosen = torch.where(known, index, 0)
        answer = hidden_state @ self.weight[chosen].transpose(1, 2) + self.bias[chosen].unsqueeze(1)
        return torch.where(known[:, None, None], answer, 0.0)
