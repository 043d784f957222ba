"""JetMoE: experts that transformers sorts tokens for, with the tokens of each counted in Python."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from sparse_onnx.export.adapters.packed import PackedExperts


def moe(module: Any) -> nn.Module:
    """`JetMoeMoE`."""
    experts = PackedExperts(
        module.input_linear.weight, module.output_linear.weight, module.activation, gated=True
    )
    return _MoE(module.router, experts, module.bias)


class _MoE(nn.Module):
    def __init__(self, router: Any, experts: PackedExperts, bias: nn.Parameter) -> None:
        super().__init__()
        self.router, self.experts, self.bias = router, experts, bias

    def forward(self, layer_input: Tensor) -> Tensor:
        """`[B, S, D] -> [B, S, D]`."""
        tokens = layer_input.reshape(-1, layer_input.shape[-1])
        index, weight = choice(self.router, tokens)
        return self.experts(tokens, index, weight).reshape(layer_input.shape) + self.bias


def choice(router: Any, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Numbers `[T, K]` of the chosen experts and their weights."""
    logits, index = router.layer(tokens).float().topk(router.top_k, dim=1)
    return index, logits.softmax(dim=1).type_as(tokens)
