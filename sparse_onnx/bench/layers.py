"""What the suite measures: MoE layers of well-known shapes, without the attention around them.

    x = x + block(x)   for each layer;  block = router, softmax, top-k, renormalise, SwiGLU experts

Mixtral's block and Qwen3-MoE's are transformers' own modules, in a small `PreTrainedModel`, so that
transformers chooses their default implementation, and its exporter takes them. Importing this needs torch and
transformers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import MixtralConfig, PreTrainedConfig, PreTrainedModel, Qwen3MoeConfig
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

#: Scale of the router's logits for normal inputs: routing is balanced over the experts, and near-ties are
#: rare.
_ROUTER_SCALE = 1.5


@dataclasses.dataclass(frozen=True)
class Case:
    """One shape of the suite."""

    name: str
    build: Callable[[], SparseLayers]


class SparseLayers(PreTrainedModel):
    """``[T, hidden] -> [T, hidden]``, float32, with the same weights in every process.

    Weights are normal / sqrt(fan-in).
    """

    config_class = PreTrainedConfig

    def __init__(self, config: PreTrainedConfig, block: Callable[..., nn.Module], seed: int = 0) -> None:
        super().__init__(config)
        self.blocks = nn.ModuleList(block(config) for _ in range(config.num_hidden_layers))
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in self.named_parameters():
            scale = _ROUTER_SCALE if name.endswith("gate.weight") else 1.0
            parameter.data.normal_(std=scale * parameter.shape[-1] ** -0.5, generator=generator)
        self.eval().requires_grad_(False)

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        """Said here because transformers looks for its decorator in the source of the model's own module."""
        return True

    @property
    def parts(self) -> list[Any]:
        """The blocks: each has `gate` (the router) and `experts`, with their packed weights."""
        return list(self.blocks)

    @property
    def top_k(self) -> int:
        return int(self.config.num_experts_per_tok)

    def forward(self, hidden_states: Tensor) -> Tensor:
        for block in self.blocks:
            hidden_states = hidden_states + block(hidden_states[None])[0]
        return hidden_states


def mixtral_layers(*, hidden: int, experts: int, top_k: int, inner: int, layers: int) -> SparseLayers:
    config = MixtralConfig(
        hidden_size=hidden,
        intermediate_size=inner,
        num_local_experts=experts,
        num_experts_per_tok=top_k,
        num_hidden_layers=layers,
    )
    return SparseLayers(config, MixtralSparseMoeBlock)


def qwen3_layers(*, hidden: int, experts: int, top_k: int, inner: int, layers: int) -> SparseLayers:
    config = Qwen3MoeConfig(
        hidden_size=hidden,
        moe_intermediate_size=inner,
        num_experts=experts,
        num_experts_per_tok=top_k,
        num_hidden_layers=layers,
        norm_topk_prob=True,
    )
    return SparseLayers(config, Qwen3MoeSparseMoeBlock)


CASES = (
    Case(
        "8 experts, top-2, hidden 1024, inner 2816, 2 layers (Mixtral's block)",
        lambda: mixtral_layers(hidden=1024, experts=8, top_k=2, inner=2816, layers=2),
    ),
    Case(
        "64 experts, top-8, hidden 1024, inner 768, 1 layer (Qwen3-MoE's block)",
        lambda: qwen3_layers(hidden=1024, experts=64, top_k=8, inner=768, layers=1),
    ),
)
