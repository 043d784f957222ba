"""Hugging Face models: from a folder, the hub, or a configuration alone."""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from sparse_onnx.core.errors import ModelError, OutsideError, SparseOnnxError
from sparse_onnx.export import interfaces
from sparse_onnx.export import random_weights as randomly
from sparse_onnx.export.checkpoint import load as checkpoint
from sparse_onnx.export.failure import first_line
from sparse_onnx.export.samples import Interface
from sparse_onnx.export.translate import quiet

_SAFE = ("model.safetensors", "model.safetensors.index.json")
_PICKLED = (".bin", ".pt", ".pth")
#: Weights that a message names.
_NAMED = 3


def load(
    source: str,
    *,
    random_weights: bool,
    dtype: torch.dtype | None,
    trust_remote_code: bool,
    allow_pickle: bool,
    stream: bool | None = False,
) -> tuple[nn.Module, Interface, tuple[str, ...]]:
    """The model in eval mode, its inputs, and notes on how it was made.

    Args:
        source: a folder with config.json, or a hub id; ``HF_HUB_OFFLINE=1`` keeps transformers off the
            network.
        random_weights: build it from its configuration.
        dtype: of the weights; None takes what the checkpoint or its configuration says.
        trust_remote_code: run Python that comes with the model.
        allow_pickle: load weights that are not safetensors.
        stream: leave the weights in their files; None does so where they would not fit into memory.

    Raises:
        ModelError: no or bad configuration or weights, or ones that would run code.
        OutsideError: the hub cannot be reached.
        ImpossibleError: a kind of model whose inputs are not known.
    """
    if os.path.isdir(source):
        _check_folder(Path(source), random_weights, allow_pickle)
    config = _load(source, transformers.AutoConfig.from_pretrained, trust_remote_code=trust_remote_code)
    _complete_configuration(config)
    chosen = _model_class(config)
    is_auto = not issubclass(chosen, transformers.PreTrainedModel)
    # Never left out: without it transformers asks on the terminal, and waits.
    arguments: dict[str, Any] = {"trust_remote_code": trust_remote_code} if is_auto else {}
    notes: tuple[str, ...] = ()
    if random_weights:
        build = chosen.from_config if is_auto else chosen._from_config
        with randomly.seeded():
            model = _load(
                source, lambda _: build(config, dtype=dtype or config.dtype or torch.float32, **arguments)
            )
        randomly.fill(model)
        notes = (
            f"random weights (seed {randomly.SEED}), scaled so that routing matters: normal with deviation "
            f"1/sqrt(fan_in), routers x{randomly.ROUTER_SCALE:g}",
        )
    else:
        if not allow_pickle:
            arguments["use_safetensors"] = True
        entries = checkpoint.wanted(source, stream, dtype)
        read: Any = chosen.from_pretrained
        if entries is not None:
            read = functools.partial(checkpoint.from_pretrained, chosen, entries=entries)
        # Mismatches come back as information then, to be refused below with the names of the weights.
        model, loaded = _load(
            source,
            read,
            config=config,
            dtype=dtype or "auto",
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            **arguments,
        )
        notes = _complete(source, loaded)
        if entries is not None:
            notes += checkpoint.note(entries)
    model, part = _callable(model.eval())
    notes += part
    _only_logits(model)
    _answer_completely(model)
    interface, left_out = interfaces.of_model(source, model)
    return model, interface, (*notes, *left_out)


def _complete_configuration(config: Any) -> None:
    """What transformers' own classes read and its configuration lacks: DBRX's attention keeps a `rope_theta`, which it
    does not use."""
    attention: Any = getattr(config, "attn_config", None)
    if getattr(config, "model_type", "") == "dbrx" and not hasattr(attention, "rope_theta"):
        attention.rope_theta = (config.rope_parameters or {}).get("rope_theta")


def _answer_completely(model: nn.Module) -> None:
    """Llama 4's forward in transformers 5.24 reads images off its language model's output, which has none."""
    if type(model).__name__ == "Llama4ForConditionalGeneration":
        language: Any = model.language_model
        language.register_forward_hook(_without_images)


def _without_images(module: nn.Module, args: Any, output: Any) -> None:
    if not hasattr(output, "image_outputs"):
        output.image_outputs = None


def _callable(model: nn.Module) -> tuple[nn.Module, tuple[str, ...]]:
    """The model, or where its class is only a pipeline of models, without a forward, the first of them; and a note."""
    if type(model).forward is not nn.Module.forward:
        return model, ()
    for name, part in model.named_children():
        if isinstance(part, transformers.PreTrainedModel) and type(part).forward is not nn.Module.forward:
            return part, (f"{type(model).__name__} has no forward; exported its '{name}'",)
    return model, ()


def _complete(source: str, loaded: Mapping[str, Any]) -> tuple[str, ...]:
    """Notes on weights that the model has no use for; `loaded` is transformers' loading information, which leaves
    out tied weights.

    Raises:
        ModelError: a weight of the model is not in the checkpoint, or has another shape there: transformers fills
            it with random numbers.
    """
    missing, unused = sorted(loaded["missing_keys"]), sorted(loaded["unexpected_keys"])
    other = sorted({key if isinstance(key, str) else key[0] for key in loaded["mismatched_keys"]})
    if missing:
        hint = f"it holds {_first_few(unused)} instead" if unused else "is the download complete?"
        raise ModelError(
            f"{len(missing)} weights of the model are missing: {_first_few(missing)}", hint, where=source
        )
    if other:
        raise ModelError(
            f"{len(other)} weights have other shapes than the configuration says: {_first_few(other)}",
            "do config.json and the weights belong together?",
            where=source,
        )
    if unused:
        return (f"{len(unused)} weights of the checkpoint are not used: {_first_few(unused)}",)
    return ()


def _first_few(names: Sequence[str]) -> str:
    return ", ".join(names[:_NAMED]) + (", ..." if len(names) > _NAMED else "")


def _only_logits(model: nn.Module) -> None:
    """No cache and none of the optional outputs, in the configuration of every part."""
    for config in {
        id(c): c for m in model.modules() if (c := getattr(m, "config", None)) is not None
    }.values():
        for name in ("use_cache", "output_router_logits", "output_attentions", "output_hidden_states"):
            if getattr(config, name, False):
                setattr(config, name, False)


def _check_folder(folder: Path, random_weights: bool, allow_pickle: bool) -> None:
    if not (folder / "config.json").is_file():
        raise ModelError(
            "the folder has no config.json", "give a Hugging Face model folder", where=str(folder)
        )
    if random_weights or any((folder / name).exists() for name in _SAFE):
        return
    pickled = sorted(path.name for path in folder.iterdir() if path.suffix in _PICKLED)
    if not pickled:
        raise ModelError(
            "the folder has no weights",
            "--random-weights builds the model from its config alone",
            where=str(folder),
        )
    if not allow_pickle:
        raise ModelError(
            f"'{pickled[0]}' is a pickle, and loading it can run code",
            "convert it to safetensors, or --allow-pickle if you trust it",
            where=str(folder),
        )


def _load(source: str, call: Any, **arguments: Any) -> Any:
    """Any of transformers' loaders, its failures as one line."""
    try:
        with quiet():
            return call(source, **arguments)
    except SparseOnnxError:
        raise
    except (
        Exception
    ) as error:  # transformers and huggingface_hub raise OSError, ValueError and many of their own
        message = first_line(error)
        if "trust_remote_code" in str(error):
            raise ModelError(
                "the model comes with Python code of its own", "--trust-remote-code runs it", where=source
            ) from error
        if os.path.isdir(source):
            raise ModelError(
                f"transformers cannot load it: {message}", "--debug shows all of it", where=source
            ) from error
        offline = os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")
        hint = (
            "HF_HUB_OFFLINE is set, and it is not in the local cache"
            if offline
            else "is that its hub id, and the network up?"
        )
        raise OutsideError(f"no such folder, and not on the hub: {message}", hint, where=source) from error


def _model_class(config: Any) -> Any:
    """The class that the configuration names. Code that comes with the model goes through an auto class, and so
    does a bare configuration: the causal language model of its type, if there is one."""
    causal = transformers.AutoModelForCausalLM
    if "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {}):
        return causal
    for name in getattr(config, "architectures", None) or ():
        if hasattr(transformers, name):
            return getattr(transformers, name)
    return causal if type(config) in causal._model_mapping else transformers.AutoModel
