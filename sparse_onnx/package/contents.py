"""What lies in a package beside its graphs: weights, tokenizer, native kernels, runners."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.resources
import itertools
import json
import os
import platform
import shutil
from pathlib import Path
from typing import Any

import onnx_ir as ir

from sparse_onnx.blocks.spec import DOMAIN
from sparse_onnx.blocks.thresholded import LINEAR, N_BITS
from sparse_onnx.blocks.thresholded_experts import EXPERTS, EXPERTS_N_BITS
from sparse_onnx.blocks.thresholded_gated import GATED, GATED_N_BITS
from sparse_onnx.core.errors import ImpossibleError, UsageError
from sparse_onnx.graph import files, genai, io
from sparse_onnx.graph.slots import tensor_slots
from sparse_onnx.optimize.watched import EXACT
from sparse_onnx.targets.profile import TargetProfile

MODEL = "model.onnx"
RUNNERS = ("run.py", "run.mjs", "run.cc")


@dataclasses.dataclass(frozen=True)
class Kernels:
    """The native library in the package, and the machines that it is for."""

    file: str
    system: str
    machine: str


def copy_model(source: Path, model: ir.Model, folder: Path) -> Path:
    """The model and its weights, into the folder. Packed weights of `--weights prepacked` are kept."""
    target = folder / MODEL
    if not files.mentions(source, "prepacked_0"):
        io.save(model, target, weights="copy")
        return target
    for name, path in data_files(
        model
    ).items():  # what ORT packed is not part of the graph as it is read here
        copied = folder / name
        if copied == target:
            raise ImpossibleError(f"the weights lie in a file called {name}", "save them under another name")
        copied.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, copied)
    shutil.copyfile(source, target)
    return target


def data_files(model: ir.Model) -> dict[str, Path]:
    """The files of the model's external weights, by their names in the graph."""
    return {
        os.fspath(slot.tensor.location): Path(slot.tensor.path)
        for slot in tensor_slots(model)
        if isinstance(slot.tensor, ir.ExternalTensor)
    }


def copy_companions(source: Path, main: Path, profile: TargetProfile) -> list[str]:
    """Tokenizer and `genai_config.json`, where they lie beside the source; returns notes."""
    notes = []
    parts = _other_parts(source)
    if parts:
        notes.append(
            f"{genai.NAME} is left out: it names {', '.join(parts)} too, and a package has one model"
        )
    elif profile.format == "onnx":
        note = genai.carry(source, main)
        notes += [note] if note is not None else []
    tokenizer = [path for name in genai.TOKENIZER_FILES if (path := source.parent / name).is_file()]
    genai.copy_files(tokenizer, main.parent)
    return notes


def _other_parts(source: Path) -> list[str]:
    """Models beside the source that the configuration names, if it names the source."""
    try:
        config = json.loads((source.parent / genai.NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return []
    named = sorted(set(_filenames(config)))
    return [name for name in named if name != source.name] if source.name in named else []


def _filenames(value: Any) -> list[str]:
    if isinstance(value, dict):
        own = [item for key, item in value.items() if key == "filename" and isinstance(item, str)]
        return own + [name for item in value.values() for name in _filenames(item)]
    return [name for item in value for name in _filenames(item)] if isinstance(value, list) else []


def _has(model: ir.Model, *operators: str) -> bool:
    found = itertools.chain(
        model.graph.all_nodes(), *(function.all_nodes() for function in model.functions.values())
    )
    return any(node.domain == DOMAIN and node.op_type in operators for node in found)


def session_entries(model: ir.Model, profile: TargetProfile) -> dict[str, str]:
    """What sessions are to be created with."""
    exact = EXACT if _has(model, N_BITS, GATED_N_BITS) else {}
    return {**profile.config, **exact}


def copy_kernels(model: ir.Model, folder: Path, notes: list[str]) -> Kernels | None:
    """The native library, where the model has operators that it runs and it was built here."""
    if not _has(model, LINEAR, N_BITS, GATED, GATED_N_BITS, EXPERTS, EXPERTS_N_BITS):
        return None
    from sparse_onnx import kernels

    try:
        library = kernels.path()
    except UsageError as error:
        notes.append(f"packaged without the native kernels, at the speed of dense layers: {error}")
        return None
    (folder / "kernels").mkdir()
    shutil.copyfile(library, folder / "kernels" / library.name)
    system, machine = platform.system().lower(), platform.machine().lower()
    notes.append(f"the native kernels are for {system} on {machine}; elsewhere the package runs without them")
    return Kernels(f"kernels/{library.name}", system, machine)


def copy_runners(folder: Path) -> None:
    shipped = importlib.resources.files("sparse_onnx.package") / "runners"
    for name in RUNNERS:
        (folder / name).write_bytes((shipped / name).read_bytes())


def digest(path: Path) -> str:
    """SHA-256, in hexadecimal digits."""
    hasher = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            hasher.update(block)
    return hasher.hexdigest()
