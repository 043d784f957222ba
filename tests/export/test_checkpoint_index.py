"""Damaged and hostile checkpoints: one line each, exit code 3, and nothing written."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from sparse_onnx.core.errors import ModelError
from sparse_onnx.export.checkpoint.index import read_index

TENSORS = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(4, dtype=torch.bfloat16)}


def write(folder: Path) -> Path:
    """Two shards: ``one.safetensors`` with a and b, ``two.safetensors`` with c."""
    save_file(TENSORS, folder / "one.safetensors", metadata={"format": "pt"})
    save_file({"c": torch.zeros(0, 5)}, folder / "two.safetensors")
    index(folder, {"a": "one.safetensors", "b": "one.safetensors", "c": "two.safetensors"})
    return folder


def index(folder: Path, weight_map: Any) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def rewrite(path: Path, change: Callable[[dict[str, Any]], None], pad: int = 0) -> None:
    """The file with another header, its tensors' bytes as they were."""
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :] + bytes(pad))


def test_reads_what_safetensors_writes(tmp_path: Path) -> None:
    entries = read_index(write(tmp_path))
    assert list(entries) == ["a", "b", "c"] or set(entries) == {"a", "b", "c"}
    for name, tensor in TENSORS.items():
        entry = entries[name]
        assert (entry.shape, entry.dtype) == (tuple(tensor.shape), tensor.dtype)
        content = Path(entry.path).read_bytes()[entry.offset : entry.offset + entry.nbytes]
        assert content == tensor.view(torch.uint8).numpy().tobytes()
    assert entries["c"].nbytes == 0


def test_one_file_goes_before_shards(tmp_path: Path) -> None:
    write(tmp_path)
    save_file({"only": torch.ones(1)}, tmp_path / "model.safetensors")
    assert set(read_index(tmp_path)) == {"only"}


def test_a_link_of_the_folder_is_followed(tmp_path: Path) -> None:
    (tmp_path / "blobs").mkdir()
    (tmp_path / "snapshot").mkdir()
    write(tmp_path / "snapshot")
    (tmp_path / "snapshot" / "one.safetensors").rename(tmp_path / "blobs" / "0123")
    (tmp_path / "snapshot" / "one.safetensors").symlink_to("../blobs/0123")
    assert read_index(tmp_path / "snapshot")["a"].path == str((tmp_path / "blobs" / "0123").resolve())


def _cut(folder: Path) -> None:
    path = folder / "one.safetensors"
    path.write_bytes(path.read_bytes()[:-1])


def _cut_header(folder: Path) -> None:
    path = folder / "one.safetensors"
    path.write_bytes(path.read_bytes()[:40])


def _huge_header(folder: Path) -> None:
    path = folder / "one.safetensors"
    path.write_bytes((2**63).to_bytes(8, "little") + path.read_bytes()[8:])


def _header(change: Callable[[dict[str, Any]], None], pad: int = 0) -> Callable[[Path], None]:
    return lambda folder: rewrite(folder / "one.safetensors", change, pad)


def _set(name: str, key: str, value: Any) -> Callable[[Path], None]:
    return _header(lambda header: header[name].__setitem__(key, value))


def _duplicate(folder: Path) -> None:
    path = folder / "one.safetensors"
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    text = content[8 : 8 + length].strip()[:-1] + b',"a":{}}'
    path.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])


def _twice(folder: Path) -> None:
    save_file({"c": torch.zeros(0, 5), "a": TENSORS["a"]}, folder / "two.safetensors")


DAMAGE: dict[str, tuple[Callable[[Path], None], str]] = {
    "a shard is missing": (lambda folder: (folder / "two.safetensors").unlink(), "is missing"),
    "a shard is cut off": (_cut, "end at byte"),
    "a shard is longer": (_header(lambda header: None, pad=3), "end at byte"),
    "a header is cut off": (_cut_header, "cut off"),
    "a header of 8 exabytes": (_huge_header, "cut off"),
    "overlapping tensors": (_set("b", "data_offsets", [16, 24]), "overlaps"),
    "a gap": (_set("b", "data_offsets", [25, 33]), "gap"),
    "bytes that do not fit the shape": (_set("a", "shape", [2, 4]), "instead of"),
    "a negative size": (_set("a", "shape", [-2, -3]), "no sound shape"),
    "a size that is no number": (_set("a", "shape", [True, 6]), "no sound shape"),
    "an enormous size": (_set("a", "shape", [2**62, 2**62]), "no sound shape"),
    "no place": (_set("a", "data_offsets", [0]), "no sound shape or place"),
    "an unknown type": (_set("a", "dtype", "Q3"), "not supported"),
    "a type that is no text": (_set("a", "dtype", ["F32"]), "not supported"),
    "a tensor that is no object": (_header(lambda header: header.update(a=[1])), "no sound header"),
    "a name with an escape": (
        _header(lambda header: header.update({"\x1b[1m": header.pop("a")})),
        "no sound header",
    ),
    "a name that comes twice": (_duplicate, "comes twice"),
    "a tensor in two shards": (_twice, "is in"),
    "an index with other names": (lambda folder: index(folder, {"z": "one.safetensors"}), "is not in it"),
    "an index that names a folder above": (
        lambda folder: index(folder, {"a": "../one.safetensors"}),
        "outside the model's folder",
    ),
    "an index with an absolute path": (lambda folder: index(folder, {"a": "/etc/passwd"}), "outside"),
    "an index that names the folder": (lambda folder: index(folder, {"a": ".."}), "outside"),
    "an index without weights": (lambda folder: index(folder, {}), "no map"),
    "an index of numbers": (lambda folder: index(folder, {"a": 1}), "no map"),
    "an index that is no JSON": (
        lambda folder: (folder / "model.safetensors.index.json").write_bytes(b"\xff{"),
        "cannot be read",
    ),
    "an index nested too deeply": (
        lambda folder: (folder / "model.safetensors.index.json").write_text("[" * 100_000),
        "cannot be read",
    ),
    "a shard that is a folder": (
        lambda folder: ((folder / "two.safetensors").unlink(), (folder / "two.safetensors").mkdir()),
        "not a regular file",
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_one_line(damage: str, tmp_path: Path) -> None:
    break_it, says = DAMAGE[damage]
    break_it(write(tmp_path))
    with pytest.raises(ModelError, match=says) as caught:
        read_index(tmp_path)
    assert "\n" not in str(caught.value) and "\x1b" not in str(caught.value)
    assert caught.value.exit_code == 3
