"""Sinusoidal positions, computed where they are needed: transformers keeps a table, which grows in Python."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn


def sinusoidal(module: Any) -> nn.Module:
    """`NllbMoeSinusoidalPositionalEmbedding`."""
    return _Sinusoidal(module)


class _Sinusoidal(nn.Module):
    def __init__(self, module: Any) -> None:
        super().__init__()
        self.width, self.padding_idx, self.dtype = (
            module.embedding_dim,
            module.padding_idx,
            module.weights.dtype,
        )
        self.of_ids = module.create_position_ids_from_input_ids
        self.of_embeddings = module.create_position_ids_from_inputs_embeds
        half = self.width // 2
        steps = torch.arange(half, dtype=torch.int64).float() * -(math.log(10000) / (half - 1))
        self.register_buffer("frequencies", steps.exp(), persistent=False)

    def forward(
        self, input_ids: Tensor | None = None, inputs_embeds: Tensor | None = None, cache_length: int = 0
    ) -> Tensor:
        """`[B, S] -> [B, S, width]`; zeros at padding."""
        if input_ids is not None:
            position = self.of_ids(input_ids, self.padding_idx, cache_length)
        else:
            position = self.of_embeddings(inputs_embeds, cache_length, self.padding_idx)
        angle = position.unsqueeze(-1).float() * self.frequencies
        waves = torch.cat([angle.sin(), angle.cos()], dim=-1)
        if self.width % 2:
            waves = nn.functional.pad(waves, (0, 1))
        if self.padding_idx is not None:
            waves = torch.where((position == self.padding_idx).unsqueeze(-1), 0.0, waves)
        return waves.to(self.dtype)
