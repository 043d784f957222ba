"""The suite's layers as other exporters write them, each with the same weights: what `optimize` has to recognise.

Each function writes one file, ``hidden_states [tokens, hidden] -> [tokens, hidden]``, weights beside it or inside.
The modules repeat what the named tool's own module code does, so that torch's exporters write its graph without the
tool being there. Importing this needs torch and transformers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from sparse_onnx.bench import rivals
from sparse_onnx.bench.layers import SparseLayers
from sparse_onnx.export.translate import quiet

#: An example of an input; sizes that differ from every other size of the layers.
_TOKENS = 7
_AXES: Mapping[str, Mapping[int, str]] = {"hidden_states": {0: "tokens"}}


@dataclasses.dataclass(frozen=True)
class Spelling:
    """One way to write the layers: who writes it, what a report calls it, and the function that writes the file.

    `gathers` says that the original copies a chosen expert's matrices for each of a token's slots.
    """

    name: str
    spelling: str
    write: Callable[[SparseLayers, Path], None]
    gathers: bool = False


class _Layers(nn.Module):
    """Routers and experts of all layers. A subclass says how the chosen experts are computed, in `mix`."""

    def __init__(self, layers: SparseLayers) -> None:
        super().__init__()
        self.top_k, self.hidden = layers.top_k, int(layers.config.hidden_size)
        self.routers = nn.ModuleList(_linear(part.gate.weight) for part in layers.parts)
        self.experts = nn.ModuleList(self.bodies(part.experts) for part in layers.parts)

    def forward(self, hidden_states: Tensor) -> Tensor:
        x = hidden_states[None]  # a batch of one sequence, as whole models have it
        for router, experts in zip(self.routers, self.experts, strict=True):
            x = x + self.block(router, experts, x)
        return x[0]

    def block(self, router: nn.Module, experts: Any, x: Tensor) -> Tensor:
        rows = x.reshape(-1, self.hidden)
        return self.mix(experts, rows, *self.route(router, rows)).reshape(x.shape)

    def route(self, router: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
        scores = torch.softmax(router(x), dim=-1, dtype=torch.float)
        weight, index = torch.topk(scores, self.top_k, dim=-1)
        return index, weight / weight.sum(dim=-1, keepdim=True)

    def bodies(self, packed: Any) -> nn.Module:
        """The experts of one layer, from their packed weights."""
        raise NotImplementedError

    def mix(self, experts: Any, x: Tensor, index: Tensor, weight: Tensor) -> Tensor:
        raise NotImplementedError


class _Linears(nn.Module):
    """One expert as three linear layers on views of the packed weights."""

    def __init__(self, gate_up: Tensor, down: Tensor) -> None:
        super().__init__()
        gate, up = gate_up.chunk(2)
        self.gate_proj, self.up_proj, self.down_proj = _linear(gate), _linear(up), _linear(down)

    def forward(self, x: Tensor) -> Tensor:
        inner = nn.functional.silu(self.gate_proj(x)) * self.up_proj(x)
        return cast(Tensor, self.down_proj(inner))


def _linear(weight: Tensor) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    return linear


class _Products(nn.Module):
    """One expert, or several at once, with matrices ``[.., in, out]`` as MatMul reads them."""

    def __init__(self, gate_up: Tensor, down: Tensor) -> None:
        super().__init__()
        gate, up = gate_up.transpose(-2, -1).chunk(2, dim=-1)
        self.gate, self.up, self.down = (_matrix(weight) for weight in (gate, up, down.transpose(-2, -1)))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.silu(x @ self.gate) * (x @ self.up) @ self.down


def _matrix(weight: Tensor) -> nn.Parameter:
    return nn.Parameter(weight.contiguous(), requires_grad=False)


class MaskedLayers(_Layers):
    """mobius' `MoELayer`: every expert on every token, weighted with the sum of its slots' weights, mostly zero."""

    def bodies(self, packed: Any) -> nn.Module:
        pairs = zip(packed.gate_up_proj, packed.down_proj, strict=True)
        return nn.ModuleList(_Products(gate_up, down) for gate_up, down in pairs)

    def block(self, router: nn.Module, experts: Any, x: Tensor) -> Tensor:
        return self.mix(experts, x, *self.route(router, x))

    def mix(self, experts: Any, x: Tensor, index: Tensor, weight: Tensor) -> Tensor:
        result = None
        for number, expert in enumerate(experts):
            hit = (index == number).to(weight.dtype)
            term = expert(x) * (weight * hit).sum(dim=-1, keepdim=True)
            result = term if result is None else result + term
        return cast(Tensor, result)


class LoopLayers(_Layers):
    """`Qwen3MoeSparseMoeBlock` of transformers 4.57 as optimum-onnx patches it: all experts, each on its tokens."""

    def bodies(self, packed: Any) -> nn.Module:
        pairs = zip(packed.gate_up_proj, packed.down_proj, strict=True)
        return nn.ModuleList(_Linears(gate_up, down) for gate_up, down in pairs)

    def mix(self, experts: Any, x: Tensor, index: Tensor, weight: Tensor) -> Tensor:
        result = torch.zeros((x.shape[0], self.hidden), dtype=x.dtype, device=x.device)
        mask = nn.functional.one_hot(index, num_classes=len(experts)).permute(2, 1, 0)
        for number, expert in enumerate(experts):
            slot, token = torch.where(mask[number].squeeze(0))
            rows = x[None, token].reshape(-1, self.hidden)
            rows = expert(rows) * weight[token, slot, None]
            result.index_add_(0, token, rows.to(x.dtype))
        return result


class EinsumLayers(_Layers):
    """GShard's dispatch, as Mesh TensorFlow and T5X write it, with a slot in each expert for every token."""

    def bodies(self, packed: Any) -> nn.Module:
        return _Products(packed.gate_up_proj, packed.down_proj)

    def mix(self, experts: Any, x: Tensor, index: Tensor, weight: Tensor) -> Tensor:
        tokens, count = x.shape[0], experts.gate.shape[0]
        hot = nn.functional.one_hot(index, count)
        seen = hot.transpose(0, 1).reshape(-1, count).cumsum(0)
        place = seen.reshape(self.top_k, tokens, count).transpose(0, 1) * hot - 1
        where = nn.functional.one_hot(place.clamp(min=0), tokens) * hot[..., None]
        mask = (where * (place < tokens)[..., None].long()).float()
        combine = torch.einsum("sk,skec->sec", weight, mask)
        slots = torch.einsum("sec,sm->ecm", (combine > 0).float(), x)
        gate = torch.einsum("ecm,emh->ech", slots, experts.gate)
        up = torch.einsum("ecm,emh->ech", slots, experts.up)
        outputs = torch.einsum("ech,ehm->ecm", nn.functional.silu(gate) * up, experts.down)
        return torch.einsum("sec,ecm->sm", combine, outputs)


def write_masked(layers: SparseLayers, path: Path) -> None:
    """mobius' dense masks, by torch's exporter."""
    _export(MaskedLayers(layers), layers, path)


def write_loop(layers: SparseLayers, path: Path) -> None:
    """optimum-onnx' loop, by the exporter that it uses: torch's older one, which traces."""
    _trace(LoopLayers(layers), layers, path)


def write_gshard(layers: SparseLayers, path: Path) -> None:
    """GShard's dispatch. torch's newer exporter would write the example's token count into the graph."""
    _trace(EinsumLayers(layers), layers, path)


def write_batched(layers: SparseLayers, path: Path) -> None:
    """transformers' experts by batched products, which is what torch's exporter takes of them."""
    before = layers.config._experts_implementation
    layers.set_experts_implementation("batched_mm")
    try:
        _export(layers, layers, path)
    finally:
        layers.set_experts_implementation(before)


def write_grouped(layers: SparseLayers, path: Path) -> None:
    """transformers' own exporter with its default experts."""
    rivals.export_transformers(layers, _sample(layers), _AXES, path)


def _sample(layers: SparseLayers) -> dict[str, Tensor]:
    return {"hidden_states": torch.randn(_TOKENS, layers.config.hidden_size)}


def _export(model: nn.Module, layers: SparseLayers, path: Path) -> None:
    dynamic = {name: dict.fromkeys(axes, torch.export.Dim.DYNAMIC) for name, axes in _AXES.items()}
    with quiet():
        torch.onnx.export(
            model.eval(),
            (),
            path,
            kwargs=_sample(layers),
            output_names=["output"],
            dynamic_shapes=dynamic,
            external_data=True,
        )


def _trace(model: nn.Module, layers: SparseLayers, path: Path) -> None:
    with quiet(), torch.no_grad():
        torch.onnx.export(
            model.eval(),
            tuple(_sample(layers).values()),
            str(path),
            input_names=list(_AXES),
            output_names=["output"],
            dynamic_axes={**_AXES, "output": {0: "tokens"}},
            opset_version=17,
            dynamo=False,
        )


MASKED = Spelling("dense masks (mobius)", "dense-mask", write_masked)
LOOP = Spelling("loop over experts (optimum-onnx)", "per-expert-loop", write_loop)
BATCHED = Spelling("gathered weights (torch.onnx, batched_mm)", "gathered", write_batched, gathers=True)
GROUPED = Spelling("grouped (transformers OnnxExporter)", "grouped", write_grouped)
GSHARD = Spelling("dispatch by Einsum (GShard)", "gshard", write_gshard)
CONTRIB = Spelling("com.microsoft::MoE", "contrib", rivals.build_contrib_moe)

#: What the suite measures, and all that `scaling` repeats.
MEASURED = (MASKED, LOOP, BATCHED, GROUPED)
ALL = (BATCHED, GROUPED, LOOP, MASKED, GSHARD, CONTRIB)
