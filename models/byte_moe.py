"""A byte-level mixture-of-experts language model: a causal decoder whose feed-forward layers are all sparse.

    h = embedding(bytes)
    for each layer:  h = h + attention(norm(h));  h = h + MoE(norm(h))
    logits = norm(h) · embeddingᵀ

    MoE(x) = sum over the top-k experts e of  w_e · down_e(silu(gate_e x) * up_e x)
             with  w = p_topk / sum(p_topk),  p = softmax(router x)

RMSNorm, rotary positions, normalised queries and keys as in Qwen3, SwiGLU experts, routing as in Mixtral
(arXiv 2401.04088). Batch and sequence may be any size.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparse_onnx.core.errors import ModelError
from sparse_onnx.models import ZooModel

WEIGHTS = Path(__file__).with_name("byte_moe.safetensors")
# One key with everything in JSON: safetensors writes several keys in another order each time, and the same
# training is to give the same file.
METADATA_KEY = "byte_moe"
VOCABULARY = 256
_ROPE_BASE = 10_000.0
_NORM_EPSILON = 1e-5


@dataclasses.dataclass(frozen=True)
class ByteMoEConfig:
    """Sizes, and the share of each residual branch's outputs that training drops.

    `inner` differs from `hidden`, so that an exporter which confuses the two is noticed.
    """

    hidden: int = 128
    layers: int = 4
    heads: int = 4
    experts: int = 8
    top_k: int = 2
    inner: int = 136
    dropout: float = 0.15


class RMSNorm(nn.Module):
    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + _NORM_EPSILON) * self.weight


class Attention(nn.Module):
    """Causal self-attention with rotary positions: ``[B, S, H] -> [B, S, H]``."""

    def __init__(self, config: ByteMoEConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.head_size = config.hidden // config.heads
        self.qkv = nn.Linear(config.hidden, 3 * config.hidden, bias=False)
        self.output = nn.Linear(config.hidden, config.hidden, bias=False)
        self.query_norm = RMSNorm(self.head_size)
        self.key_norm = RMSNorm(self.head_size)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        batch, sequence, hidden = x.shape
        qkv = self.qkv(x).view(batch, sequence, 3, self.heads, self.head_size)
        q, k, v = (part.transpose(1, 2) for part in qkv.unbind(2))
        q = _rotate(self.query_norm(q), cos, sin)
        k = _rotate(self.key_norm(k), cos, sin)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.output(mixed.transpose(1, 2).reshape(batch, sequence, hidden))


def _rotary(sequence: int, head_size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosine and sine of the rotary angles: ``[S, head_size]`` each."""
    exponent = torch.arange(0, head_size, 2, device=device, dtype=torch.float32) / head_size
    position = torch.arange(sequence, device=device, dtype=torch.float32)
    angle = position[:, None] * _ROPE_BASE**-exponent
    angle = torch.cat((angle, angle), dim=-1)
    return angle.cos(), angle.sin()


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


class Experts(nn.Module):
    """SwiGLU experts as stacked matrices, with the interface of transformers' experts modules.

    `gate_up_proj` is ``[E, 2I, H]`` (gate first, then up), `down_proj` ``[E, H, I]``. Exporters know this
    interface and put their own implementation in place of `forward`: the reference, and what training runs.
    """

    has_gate = True
    has_bias = False
    is_transposed = False
    is_concatenated = True

    def __init__(self, config: ByteMoEConfig) -> None:
        super().__init__()
        self.num_experts = config.experts
        self.gate_up_proj = nn.Parameter(torch.empty(config.experts, 2 * config.inner, config.hidden))
        self.down_proj = nn.Parameter(torch.empty(config.experts, config.hidden, config.inner))
        self.act_fn = nn.SiLU()

    def _apply_gate(self, gate_up_out: Tensor) -> Tensor:
        gate, up = gate_up_out.chunk(2, dim=-1)
        return self.act_fn(gate) * up

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """The weighted sum of each token's experts.

        Args:
            hidden_states: ``[T, H]``.
            top_k_index: ``[T, K]`` int64; E means none.
            top_k_weights: ``[T, K]``.

        Returns:
            ``[T, H]``.
        """
        output = torch.zeros_like(hidden_states)
        # unbind, not indexing: the gradient of an indexed expert is a zero tensor of all experts' size.
        for expert, (gate_up, down) in enumerate(
            zip(self.gate_up_proj.unbind(), self.down_proj.unbind(), strict=True)
        ):
            token, slot = torch.where(top_k_index == expert)
            if token.numel() == 0:
                continue
            inner = self._apply_gate(F.linear(hidden_states[token], gate_up))
            output.index_add_(0, token, F.linear(inner, down) * top_k_weights[token, slot, None])
        return output


class SparseFeedForward(nn.Module):
    """Router and experts: ``[B, S, H] -> [B, S, H]`` and the router's logits ``[B·S, E]``."""

    def __init__(self, config: ByteMoEConfig) -> None:
        super().__init__()
        self.top_k = config.top_k
        self.router = nn.Linear(config.hidden, config.experts, bias=False)
        self.experts = Experts(config)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        tokens = x.reshape(-1, x.shape[-1])
        router_logits = self.router(tokens)
        weight, index = torch.topk(router_logits.softmax(dim=-1), self.top_k, dim=-1)
        weight = weight / weight.sum(dim=-1, keepdim=True)
        return self.experts(tokens, index, weight).reshape(x.shape), router_logits


class Layer(nn.Module):
    def __init__(self, config: ByteMoEConfig) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.hidden)
        self.attention = Attention(config)
        self.moe_norm = RMSNorm(config.hidden)
        self.moe = SparseFeedForward(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        x = x + self.dropout(self.attention(self.attention_norm(x), cos, sin))
        sparse, router_logits = self.moe(self.moe_norm(x))
        return x + self.dropout(sparse), router_logits


class ByteMoE(nn.Module):
    """The language model: bytes ``[B, S]`` int64 -> logits ``[B, S, 256]`` of the byte that follows each."""

    def __init__(self, config: ByteMoEConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(VOCABULARY, config.hidden)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.layers))
        self.norm = RMSNorm(config.hidden)
        self._initialise()

    def _initialise(self) -> None:
        """Normal weights which keep the variance; those that add to the residual stream shrink with depth."""
        residual = (2 * self.config.layers) ** -0.5
        for name, parameter in self.named_parameters():
            if parameter.dim() >= 2:
                scale = residual if name.endswith(("output.weight", "down_proj")) else 1.0
                nn.init.normal_(parameter, std=scale * parameter.shape[-1] ** -0.5)

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.with_routing(input_ids)[0]

    def with_routing(self, input_ids: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Logits, and the router's logits ``[B·S, E]`` of each layer."""
        x = self.embedding(input_ids)
        cos, sin = _rotary(input_ids.shape[1], self.config.hidden // self.config.heads, x.device)
        routing = []
        for layer in self.layers:
            x, router_logits = layer(x, cos, sin)
            routing.append(router_logits)
        return F.linear(self.norm(x), self.embedding.weight), routing


def read(path: Path) -> tuple[ByteMoE, dict[str, Any]]:
    """The model in a file of `train_byte_moe`, in eval mode, and the file's metadata.

    Raises:
        ModelError: no such file, or one that is not of this model.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            metadata = json.loads((file.metadata() or {})[METADATA_KEY])
            model = ByteMoE(ByteMoEConfig(**metadata["config"]))
            model.load_state_dict({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
    except (OSError, SafetensorError, KeyError, TypeError, ValueError, RuntimeError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ModelError(
            f"not the weights of a byte MoE: {reason}",
            "write them with python -m sparse_onnx.models.train_byte_moe",
            str(path),
        ) from error
    return model.eval(), metadata


def load() -> ZooModel:
    """The trained model, as the zoo hands it out."""
    model, _ = read(WEIGHTS)
    lines = (b"def main():", b"for i in x:", b"The object ")
    input_ids = torch.tensor([list(line) for line in lines], dtype=torch.int64)
    return ZooModel(model, {"input_ids": input_ids}, {"input_ids": {0: "batch", 1: "sequence"}})
