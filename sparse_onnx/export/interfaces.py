"""What a transformers model takes: its inputs with samples, and which of their axes vary.

By the main input that the model's class names, the configuration, and the arguments of its forward:

- text: ids and a mask `[batch, sequence]`; of an encoder-decoder, and of a model that refines a second text, the
  same again as `decoder_...`. A multimodal model is exported for text alone here, and whole by `multimodal`;
- images: pixels `[batch, channels, height, width]`, and the dataset that each comes from where experts are chosen
  by it;
- sound: features `[batch, bins, frames]`.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch

from sparse_onnx.core.errors import ImpossibleError, UsageError
from sparse_onnx.export.samples import Interface, interface_of

_MODALITIES = ("vision_config", "audio_config")


def of_model(source: str, model: Any) -> tuple[Interface, tuple[str, ...]]:
    """The inputs, and notes on what of the model is left out.

    Args:
        source: how messages call the model.
        model: a transformers model.

    Raises:
        ImpossibleError: a kind of model whose inputs are not known.
    """
    name = model.main_input_name
    if name == "input_ids":
        return _text_model(model), _about_modalities(model)
    if name == "pixel_values":
        return _vision_model(model), ()
    raise ImpossibleError(
        f"the inputs of a model that takes '{name}' are not known",
        "export it by FILE.py:NAME, with a function that returns the model and its sample inputs",
        where=source,
    )


def _text_model(model: Any) -> Interface:
    config = model.config
    inputs = _text("", config)
    axes = {key: {0: "batch", 1: "sequence"} for key in inputs}
    if config.is_encoder_decoder:
        inputs |= _text("decoder_", config)
    elif "decoder_input_ids" in _arguments(model):
        inputs["decoder_input_ids"] = _text("decoder_", config)["decoder_input_ids"]
    axes |= {key: {0: "batch", 1: "decoder_sequence"} for key in inputs if key not in axes}
    return interface_of(inputs, axes, frozenset(key for key in inputs if key.endswith("attention_mask")))


def _text(prefix: str, config: Any) -> dict[str, torch.Tensor]:
    vocabulary = getattr(config.get_text_config(), "vocab_size", None)
    if not vocabulary:
        raise UsageError("the configuration has no vocab_size")
    ids = torch.tensor([[0, vocabulary - 1], [vocabulary - 1, 0]])
    return {f"{prefix}input_ids": ids, f"{prefix}attention_mask": torch.ones_like(ids)}


def _vision_model(model: Any) -> Interface:
    config = getattr(model.config, "backbone_config", None) or model.config
    config = getattr(config, "vision_config", config)
    size = config.image_size if isinstance(config.image_size, (list, tuple)) else [config.image_size] * 2
    pixels = torch.randn(2, getattr(config, "num_channels", 3), *size).to(model.dtype)
    inputs, axes = {"pixel_values": pixels}, {"pixel_values": {0: "batch"}}
    experts = getattr(config, "num_experts", 1)
    if "dataset_index" in _arguments(model) and experts > 1:
        inputs["dataset_index"] = torch.tensor([0, experts - 1])
        axes["dataset_index"] = {0: "batch"}
    return interface_of(inputs, axes)


#: Of the note on a multimodal model whose other inputs are left out.
TEXT_ALONE = "exported for text alone"


def _about_modalities(model: Any) -> tuple[str, ...]:
    left_out = [name for name in _MODALITIES if getattr(model.config, name, None) is not None]
    if not left_out:
        return ()
    kinds = " and ".join(name.removesuffix("_config") for name in left_out)
    return (f"the model takes {kinds} inputs too; {TEXT_ALONE}: --multimodal exports all of it",)


def _arguments(model: Any) -> set[str]:
    return set(inspect.signature(model.forward).parameters)
