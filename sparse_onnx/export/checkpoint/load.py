"""transformers' own loading, over weights that stay in their files: names, conversions, ties and types are its work."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import transformers
from transformers import dynamic_module_utils

from sparse_onnx.core.errors import ImpossibleError, ModelError
from sparse_onnx.export.checkpoint.expression import Leaf
from sparse_onnx.export.checkpoint.index import INDEX, SINGLE, Entry, read_index
from sparse_onnx.export.checkpoint.memory import available_memory
from sparse_onnx.export.checkpoint.stored import Stored, recording

#: Memory that the ordinary export takes, in multiples of the weights as float32: the module, ONNX Runtime's session
#: with weights packed for its kernels, and a float32 twin of both where the weights are half as wide.
_WHOLE = {4: 3.0, 2: 3.5}


def wanted(source: str, stream: bool | None, dtype: Any) -> dict[str, Entry] | None:
    """The checkpoint's index if its weights are to be streamed, else None.

    Args:
        source: a folder, or a hub id, which is loaded whole.
        stream: None: if loading it whole would take more than the memory that is free.
        dtype: that the weights are to have, or None.

    Raises:
        ModelError: streaming is wanted, and this is no folder of safetensors; or the files are damaged.
    """
    folder = Path(source)
    if stream is False or not any((folder / name).exists() for name in (SINGLE, INDEX)):
        if stream:
            raise ModelError(
                "only a folder of safetensors can be exported without loading it",
                "download the model, and convert its weights to safetensors",
                where=source,
            )
        return None
    if stream is None:
        free = available_memory()
        size = sum(
            (folder / name).stat().st_size for name in os.listdir(folder) if name.endswith(".safetensors")
        )
        if free is None or size * max(_WHOLE.values()) * 2 < free:
            return None
    try:
        entries = read_index(folder)
    except ModelError as error:
        error.where = error.where or source
        raise
    if stream is None and _whole_bytes(entries, dtype) < (free or 0):
        return None
    return entries


def _whole_bytes(entries: dict[str, Entry], dtype: Any) -> float:
    total = 0.0
    for entry in entries.values():
        width = (dtype or entry.dtype).itemsize
        total += entry.nbytes / entry.dtype.itemsize * 4 * _WHOLE.get(width, 4.0)
    return total


def from_pretrained(chosen: Any, source: str, entries: dict[str, Entry], **arguments: Any) -> Any:
    """What ``chosen.from_pretrained(source, **arguments)`` gives, without reading a weight.

    Raises:
        ImpossibleError: the checkpoint is quantized.
    """
    config = arguments["config"]
    quantized = getattr(config, "quantization_config", None)
    if quantized:
        method = quantized.get("quant_method") if isinstance(quantized, dict) else None
        raise ImpossibleError(
            f"the weights are quantized{f' ({method})' if method else ''}, which cannot be streamed",
            "convert the checkpoint to bfloat16, or --no-stream",
            where=source,
        )
    arguments.pop("use_safetensors", None)
    if not issubclass(chosen, transformers.PreTrainedModel):
        chosen = _class_of(chosen, config, source)
        arguments.pop("trust_remote_code", None)
    if (Path(source) / "generation_config.json").is_file():
        arguments["generation_config"] = transformers.GenerationConfig.from_pretrained(source)
    state = {name: Stored(Leaf(entry)) for name, entry in entries.items()}
    with recording():
        # Packed experts in transformers' plain form: it takes one expert after the other.
        return chosen.from_pretrained(None, state_dict=state, experts_implementation="eager", **arguments)


def _class_of(auto: Any, config: Any, source: str) -> Any:
    """The model class that an auto class stands for; code that comes with the model was consented to before."""
    reference = (getattr(config, "auto_map", None) or {}).get(auto.__name__)
    if reference is not None and type(config) not in auto._model_mapping:
        return dynamic_module_utils.get_class_from_dynamic_module(reference, source)
    return auto._model_mapping[type(config)]


def note(entries: dict[str, Entry]) -> tuple[str, ...]:
    """What the report says of it."""
    size = sum(entry.nbytes for entry in entries.values())
    return (f"the weights ({size / 1e9:.1f} GB) were never loaded: each was read where it was needed",)
