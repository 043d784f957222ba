"""Where each tensor of a safetensors checkpoint lies, with every claim of its files checked before a byte is read.

The format (https://github.com/huggingface/safetensors#format): eight bytes with the length of a JSON header, the
header, then the tensors' bytes, without gaps and without overlaps.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import stat
from pathlib import Path
from typing import Any, TypeGuard

import torch

from sparse_onnx.core.errors import ModelError
from sparse_onnx.graph.text import has_control_characters, quoted

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
#: The safetensors library's own limit for a header.
_LARGEST_HEADER = 100_000_000
_DAMAGED = "is the download complete? get the file again"

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


@dataclasses.dataclass(frozen=True)
class Entry:
    """One stored tensor: `nbytes` bytes at `offset` of the file `path`, which is real and absolute."""

    name: str
    path: str
    offset: int
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def read_index(folder: Path) -> dict[str, Entry]:
    """All tensors of the checkpoint in a folder, by name: of ``model.safetensors``, else of the shards that
    ``model.safetensors.index.json`` names. Reads headers only.

    Raises:
        ModelError: a file is missing, cut off or damaged, a name leads out of the folder, or two tensors share a
            name or bytes.
    """
    if (folder / SINGLE).exists():
        return {entry.name: entry for entry in read_header(_shard(folder, SINGLE))}
    weight_map = _weight_map(folder / INDEX)
    entries: dict[str, Entry] = {}
    paths = {file: _shard(folder, file) for file in sorted(set(weight_map.values()))}
    for file, path in paths.items():
        for entry in read_header(path):
            if entry.name in entries:
                other = os.path.basename(entries[entry.name].path)
                raise _damaged(file, f"tensor {quoted(entry.name)} is in {quoted(other)} too")
            entries[entry.name] = entry
    for name, file in weight_map.items():
        if name not in entries or entries[name].path != paths[file]:
            raise _damaged(file, f"tensor {quoted(name)} is not in it, and {INDEX} says so")
    return entries


def _weight_map(path: Path) -> dict[str, str]:
    try:
        if path.stat().st_size > _LARGEST_HEADER:
            raise _damaged(path.name, "it is too large for an index")
        found = _parse(path.read_bytes(), path.name).get("weight_map")
    except OSError as error:
        raise ModelError(
            f"{quoted(path.name)} cannot be read: {error.strerror}", "does the folder hold safetensors?"
        ) from None
    if not isinstance(found, dict) or not found or not all(isinstance(file, str) for file in found.values()):
        raise _damaged(path.name, "it has no map from weights to files")
    return found


def _shard(folder: Path, name: str) -> str:
    """The real path of a weights file. A link in the folder is followed, as Hugging Face's cache needs it; a name in
    the index that leads elsewhere is not."""
    if not name or name in (".", "..") or "/" in name or "\\" in name or has_control_characters(name):
        raise ModelError(
            f"weights file {quoted(name)} of {INDEX} lies outside the model's folder",
            "weights files must lie beside config.json",
        )
    path = os.path.realpath(folder / name)
    try:
        status = os.stat(path)
    except OSError as error:
        raise ModelError(f"weights file {quoted(name)} is missing: {error.strerror}", _DAMAGED) from None
    if not stat.S_ISREG(status.st_mode):
        raise ModelError(f"weights file {quoted(name)} is not a regular file", _DAMAGED)
    return path


def read_header(path: str) -> list[Entry]:
    """The tensors of one safetensors file, in the order that they lie in.

    Raises:
        ModelError: the file is cut off, or its header contradicts itself or the file.
    """
    name = os.path.basename(path)
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(size - 8, _LARGEST_HEADER):
                raise _damaged(name, "its header is cut off, or this is no safetensors file")
            header = _parse(file.read(length), name)
    except OSError as error:
        raise ModelError(f"weights file {quoted(name)} cannot be read: {error.strerror}", _DAMAGED) from None
    header.pop("__metadata__", None)
    start = 8 + length
    entries = sorted(
        (_entry(key, claim, path, start) for key, claim in header.items()),
        key=lambda entry: (entry.offset, entry.nbytes),
    )
    for entry in entries:
        if entry.offset != start:
            what = "overlaps another tensor" if entry.offset < start else "lies behind a gap"
            raise _damaged(name, f"tensor {quoted(entry.name)} {what}")
        start += entry.nbytes
    if start != size:
        raise _damaged(name, f"its tensors end at byte {start}, and it has {size}")
    return entries


def _entry(name: str, claim: Any, path: str, start: int) -> Entry:
    file = os.path.basename(path)
    if has_control_characters(name) or not isinstance(claim, dict):
        raise _damaged(file, f"tensor {quoted(name)} has no sound header")
    dtype, shape, offsets = claim.get("dtype"), claim.get("shape"), claim.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise ModelError(
            f"weights file {quoted(file)}: tensor {quoted(name)} is of type {quoted(str(dtype))}, "
            "which is not supported",
            f"known: {', '.join(DTYPES)}",
        )
    if not (_is_sizes(shape) and _is_sizes(offsets) and len(offsets) == 2):
        raise _damaged(file, f"tensor {quoted(name)} has no sound shape or place")
    entry = Entry(name, path, start + offsets[0], DTYPES[dtype], tuple(shape))
    if offsets[1] - offsets[0] != entry.nbytes:
        raise _damaged(
            file,
            f"tensor {quoted(name)} of shape {shape} has {offsets[1] - offsets[0]} bytes instead of {entry.nbytes}",
        )
    return entry


def _is_sizes(value: Any) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(type(each) is int and 0 <= each < 2**62 for each in value)


def _parse(content: bytes, name: str) -> dict[str, Any]:
    def distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            raise ValueError("a name comes twice")
        return found

    try:
        parsed = json.loads(content, object_pairs_hook=distinct)
    except (ValueError, RecursionError) as error:
        raise _damaged(name, f"its JSON cannot be read: {error}") from None
    if not isinstance(parsed, dict):
        raise _damaged(name, "its JSON is no object")
    return parsed


def _damaged(file: str, reason: str) -> ModelError:
    return ModelError(f"weights file {quoted(file)} is damaged: {reason}", _DAMAGED)
