"""The `genai_config.json` of an exported decoder, where onnxruntime-genai can run it.

Written after onnxruntime-genai 0.18's own model builder and its `src/models`. It runs any graph with these inputs and
outputs; GroupQueryAttention is needed only for a buffer that past and present share, which is switched off here.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sparse_onnx.export.past import reference
from sparse_onnx.export.past.cross import CrossSource
from sparse_onnx.export.past.slots import Slot
from sparse_onnx.export.past.source import PastSource
from sparse_onnx.export.past.states import bear_one_buffer
from sparse_onnx.graph import genai

#: Names that onnxruntime-genai knows; the others run under its general one. phimoe: with two sets of rotary factors it
#: computes the cache anew where they change, as transformers does.
_TYPES = {
    "gpt_oss": "gptoss",
    "granitemoe": "granite",
    "mixtral": "mistral",
    "olmoe": "olmo",
    "phimoe": "phimoe",
    "qwen2_moe": "qwen2",
    "qwen3_moe": "qwen3",
}
_GENERAL = "decoder"
#: What `generate` does where a model's own settings say nothing.
_SEARCH = {"repetition_penalty": 1.0, "temperature": 1.0, "top_k": 50, "top_p": 1.0}


def write_config(source: PastSource, out: Path) -> str:
    """Writes it beside the model with the tokenizer's files, and says so; or says why there is none."""
    reason = _impossible(source, out)
    if reason:
        return f"no {genai.NAME}: {reason}"
    genai.write(_config(source, out.name), out.parent)
    files = [path for name in genai.TOKENIZER_FILES if (path := _tokenizer_file(source.name, name))]
    other = genai.copy_files(files, out.parent)
    note = f"{genai.NAME} written for onnxruntime-genai"
    if other:
        return f"{note}; {', '.join(other)} in that folder is another model's and was left"
    return note if files else f"{note}; the source has no tokenizer's files to go with it"


def _impossible(source: PastSource, out: Path) -> str | None:
    if isinstance(source, CrossSource):
        return "onnxruntime-genai runs no encoder-decoders of text"
    kinds = {slot.kind for slot in source.slots}
    if "indexer_key" in kinds:
        return "onnxruntime-genai has no cache for the keys of an indexer"
    if any(slot.is_part for slot in source.slots):
        return "onnxruntime-genai has no cache for compressed keys"
    if reference.KIND in kinds:
        return "onnxruntime-genai has no place for the length of the prompt, which this model's window spares"
    states = [slot for slot in source.slots if slot.axis is None and not slot.alone]
    if states and (any(slot.alone for slot in source.slots) or not _has_place(states)):
        return "onnxruntime-genai takes one convolution and one recurrent state a layer, alike in all layers"
    if states and not bear_one_buffer(out, source):
        return "onnxruntime-genai keeps past and present states in one buffer, which this graph does not bear"
    shapes = {(slot.layer, slot.kind): slot.shape for slot in source.slots}
    for (layer, kind), shape in shapes.items():
        if kind == "key" and shapes[layer, "value"] != shape:
            return "onnxruntime-genai keeps keys and values of one width, and this model's differ"
    return None


def _has_place(states: Sequence[Slot]) -> bool:
    """Whether `src/models/recurrent_state.cpp` holds such states: it takes the first layer's shapes for all."""
    kinds = {
        kind: [slot for slot in states if slot.kind == kind] for kind in ("conv_state", "recurrent_state")
    }
    layers = [[slot.layer for slot in slots] for slots in kinds.values()]
    alike = all(len({(slot.shape[1:], slot.dtype) for slot in slots}) == 1 for slots in kinds.values())
    ranks = {kind: max((len(slot.shape) for slot in slots), default=0) for kind, slots in kinds.items()}
    return (
        layers[0] == layers[1]
        and len(set(layers[0])) == len(layers[0])
        and alike
        and ranks["conv_state"] == 3
        and ranks["recurrent_state"] <= 4
    )


def _config(source: PastSource, filename: str) -> dict[str, Any]:
    text, generation = source.decoder.text, getattr(source.module, "generation_config", None)
    key = next(slot for slot in source.slots if slot.kind == "key")
    convolutions = any(slot.alone for slot in source.slots)
    ids = {
        name: value
        for name in ("bos_token_id", "eos_token_id", "pad_token_id")
        if (value := _setting(name, generation, text)) is not None
    }
    if "pad_token_id" not in ids and "eos_token_id" in ids:
        eos = ids["eos_token_id"]
        ids["pad_token_id"] = eos[0] if isinstance(eos, list) else eos
    context = source.interface.longest or 2048
    inputs = {name: name for name in source.interface.inputs if not name.startswith("past")}
    inputs |= {"past_key_names": "past_key_values.%d.key", "past_value_names": "past_key_values.%d.value"}
    outputs = {
        "logits": "logits",
        "present_key_names": "present.%d.key",
        "present_value_names": "present.%d.value",
    }
    decoder: dict[str, Any] = {
        "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
        "filename": filename,
        "head_size": key.shape[3],
        "hidden_size": text.hidden_size,
        "inputs": inputs,
        "outputs": outputs,
        "num_attention_heads": text.num_attention_heads,
        "num_hidden_layers": text.num_hidden_layers,
        "num_key_value_heads": key.shape[1],
    }
    kind = _TYPES.get(text.model_type, _GENERAL)
    if convolutions:
        kind = "lfm2"
        attention = {slot.layer for slot in source.slots if not slot.alone}
        decoder["layer_types"] = [
            "full_attention" if layer in attention else "conv" for layer in range(text.num_hidden_layers)
        ]
        decoder["conv_cache_size"] = next(slot.shape[-1] for slot in source.slots if slot.alone)
        inputs["past_conv_names"], outputs["present_conv_names"] = "past_conv.%d", "present_conv.%d"
    return {
        "model": {
            **ids,
            "context_length": context,
            "decoder": decoder,
            "type": kind,
            "vocab_size": text.vocab_size,
        },
        "search": {
            "do_sample": bool(_setting("do_sample", generation)),
            "early_stopping": True,
            "max_length": context,
            "min_length": 0,
            "num_beams": 1,
            "num_return_sequences": 1,
            "past_present_share_buffer": False,
            **{
                name: default if (value := _setting(name, generation)) is None else value
                for name, default in _SEARCH.items()
            },
        },
    }


def _setting(name: str, *places: Any) -> Any:
    return next((value for place in places if (value := getattr(place, name, None)) is not None), None)


def _tokenizer_file(source: str, name: str) -> Path | None:
    """From the source's folder, or the hub."""
    if Path(source).is_dir():
        path = Path(source) / name
        return path if path.is_file() else None
    from transformers.utils.hub import cached_file

    try:
        found = cached_file(
            source,
            name,
            _raise_exceptions_for_gated_repo=False,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )
    except (OSError, ValueError):  # not a hub id: a module that was given as an object
        return None
    return Path(found) if found else None
