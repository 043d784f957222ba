"""A model that draws numbers in eval mode is refused, with the line that draws."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sparse_onnx
from sparse_onnx.core.errors import ImpossibleError


class Gate(nn.Module):
    def __init__(self, noise: str) -> None:
        super().__init__()
        self.noise = noise
        self.gate, self.experts = nn.Linear(8, 4), nn.ModuleList([nn.Linear(8, 8) for _ in range(4)])

    def forward(self, x: Tensor) -> Tensor:
        scores = self.gate(x)
        if self.noise == "gumbel":
            scores = F.gumbel_softmax(scores, hard=True)
        elif self.noise == "in place":
            noise = torch.empty_like(scores)
            noise.uniform_()
            scores = scores + noise
        elif self.noise == "dropout":
            scores = F.dropout(scores, 0.5)  # training=True
        elif self.noise == "training":
            scores = F.dropout(scores, 0.5, self.training) + (
                torch.randn_like(scores) if self.training else 0
            )
        elif self.noise == "no dropout":
            scores = F.dropout(scores, 0.0)  # training=True
        elif self.noise == "attention":
            scores = scores + F.scaled_dot_product_attention(x, x, x, dropout_p=0.0).mean(-1, keepdim=True)
        elif self.noise == "unused":
            torch.rand_like(scores)
        chosen = F.one_hot(scores.argmax(-1), 4).to(x.dtype)
        return sum((chosen[..., i, None] * expert(x) for i, expert in enumerate(self.experts)), x)


def exported(noise: str, folder: Path) -> object:
    source = (Gate(noise).eval(), {"x": torch.randn(2, 7, 8)}, {"x": {0: "batch", 1: "sequence"}})
    return sparse_onnx.export(source, folder / "m.onnx")


@pytest.mark.parametrize("noise", ["gumbel", "in place", "dropout"])
def test_random(noise: str, tmp_path: Path) -> None:
    with pytest.raises(
        ImpossibleError, match=r"the model's answer is random: aten\.\S+ draws numbers"
    ) as caught:
        exported(noise, tmp_path)
    assert "self.training" in str(caught.value) and "test_randomness.py:" in str(caught.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("noise", ["none", "training", "attention", "no dropout", "unused"])
def test_not_random(noise: str, tmp_path: Path) -> None:
    exported(noise, tmp_path)
    assert (tmp_path / "m.onnx").exists()
