"""Every multimodal architecture with experts, tiny, with encoders that run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tomllib

from sparse_onnx.bench.coverage import registry, tiny
from sparse_onnx.bench.coverage.registry import Architecture

#: Height and width in pixels, of those that take any: patches of 4, merged by twos.
IMAGE = (16, 24)


def architectures() -> list[Architecture]:
    """Those whose checkpoints hold an encoder of images or of sound."""
    from transformers import AutoConfig

    found = []
    for each in registry.architectures():
        if each.task == "multimodal":
            parts = set(type(AutoConfig.for_model(each.name)).sub_configs)
            if parts & {"vision_config", "audio_config", "thinker_config"}:
                found.append(each)
    return found


def write(architecture: Architecture, folder: Path) -> Path:
    """A folder with config.json as users have it."""
    from transformers import AutoConfig

    config = tiny.shrunk(AutoConfig.for_model(architecture.name), _exceptions())
    config.architectures = [architecture.model_class]
    folder.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(folder)
    return folder


def _exceptions() -> Mapping[str, Mapping[str, Any]]:
    own = tomllib.loads(Path(__file__).with_name("multimodal.toml").read_text())
    known = tiny.exceptions()
    return {name: {**known.get(name, {}), **own.get(name, {})} for name in known.keys() | own.keys()}
