"""`genai_config.json`, by which onnxruntime-genai finds and runs the model beside it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from sparse_onnx.graph import files

NAME = "genai_config.json"
#: What a tokenizer may consist of; onnxruntime-genai reads them from the model's folder.
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    "tokenizer.model",
    "chat_template.jinja",
    "chat_template.json",
)


def write(config: dict[str, Any], folder: Path) -> None:
    """Puts the configuration into the folder, in place of one that is there."""
    path = folder / NAME
    files.stage(path, (json.dumps(config, indent=4) + "\n").encode()).replace(path)


def copy_files(paths: Iterable[Path], folder: Path) -> list[str]:
    """Copies files that the folder lacks; returns the names of those that are there with another content."""
    other = []
    for path in paths:
        target = folder / path.name
        if not target.exists():
            shutil.copyfile(path, target)
        elif target.read_bytes() != path.read_bytes():
            other.append(path.name)
    return other


def carry(source: Path, out: Path) -> str | None:
    """Has a rewritten model run in onnxruntime-genai as its original does.

    Args:
        source: the original model, with or without a configuration beside it that names it.
        out: the rewritten model, whose inputs and outputs have the same names.

    Returns:
        A note for the report, or None where there is nothing to say.
    """
    config = _of(source)
    if config is None or source.resolve() == out.resolve():
        return None
    if source.parent.resolve() == out.parent.resolve():
        return f"{NAME} still names {source.name}: onnxruntime-genai takes one model a folder"
    config["model"]["decoder"]["filename"] = out.name
    write(config, out.parent)
    paths = (source.parent / name for name in TOKENIZER_FILES)
    other = copy_files((path for path in paths if path.is_file()), out.parent)
    note = f"{NAME} written beside {out.name}"
    return f"{note}; {', '.join(other)} there is another model's and was left" if other else note


def _of(model: Path) -> dict[str, Any] | None:
    """The configuration beside a model, if it names it."""
    try:
        config = json.loads((model.parent / NAME).read_text(encoding="utf-8"))
        named = config["model"]["decoder"]["filename"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return config if named == model.name else None
