"""transformers' mixture-of-experts modules that its experts interface does not reach, by the name of their class."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from sparse_onnx.export.adapters import (
    dbrx,
    doge,
    jetmoe,
    llama4,
    longcat_flash,
    nllb_moe,
    positions,
    switch_transformers,
    vitpose,
    zaya,
)

_BY_CLASS: dict[str, Callable[[Any], nn.Module | None]] = {
    "DbrxFFN": dbrx.ffn,
    "DogeCDMoE": doge.moe,
    "DogeAttention": doge.attention,
    "JetMoeMoE": jetmoe.moe,
    "Llama4TextAttention": llama4.text_attention,
    "Llama4TextMoe": llama4.moe,
    "Llama4VisionAttention": llama4.vision_attention,
    "LongcatFlashMoE": longcat_flash.moe,
    "NllbMoeSinusoidalPositionalEmbedding": positions.sinusoidal,
    "NllbMoeSparseMLP": nllb_moe.sparse_mlp,
    "SwitchTransformersSparseMLP": switch_transformers.sparse_mlp,
    "VitPoseNaiveMoe": vitpose.experts,
    "ZayaCCAProjection": zaya.projection,
    "ZayaSparseMoeBlock": zaya.sparse_moe,
}

_REMARKS = {
    "JetMoeMoA": "attention experts of one matrix each have no neutral form; exported operator by operator, each on "
    "its own tokens",
}


def remark(module: nn.Module) -> str | None:
    """What to know about a module that has no neutral form and needs no adapter."""
    return next((_REMARKS[kind.__name__] for kind in type(module).__mro__ if kind.__name__ in _REMARKS), None)


def built_in(module: nn.Module) -> Callable[[Any], nn.Module | None] | None:
    """The adapter for a module of this class, or of a class derived from it."""
    for kind in type(module).__mro__:
        if kind.__name__ in _BY_CLASS:
            return _BY_CLASS[kind.__name__]
    return None
