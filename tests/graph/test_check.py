"""Whatever is wrong with a file, `load` says so in one safe line, and has opened nothing but the model."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from graph.hostile import CASES, ESC, nested
from graph.toy import external, model, watched, write
from sparse_onnx.core.errors import ModelError
from sparse_onnx.graph.io import load
from sparse_onnx.graph.text import printable, quoted


def _files(folder: Path) -> dict[str, tuple[int, ...]]:
    found = {}
    for path in folder.rglob("*"):
        status = path.lstat()
        found[str(path)] = (
            status.st_ino,
            status.st_size,
            status.st_mtime_ns,
            status.st_nlink,
            status.st_mode,
        )
    return found


@pytest.mark.parametrize("name", CASES)
def test_refuses(name: str, tmp_path: Path) -> None:
    build, text = CASES[name]
    path = build(tmp_path)
    before = _files(tmp_path)
    with watched() as events, pytest.raises(ModelError) as caught:
        load(path)
    message = str(caught.value)
    assert caught.value.exit_code == 3
    assert text in message
    assert all(c.isprintable() for c in message)
    assert len(message) < 700
    assert {path for event, path in events if event == "open"} <= {str(path)}
    assert {event for event, _ in events} <= {"open"}
    assert _files(tmp_path) == before


def test_the_corpus_is_large_enough() -> None:
    assert len(CASES) >= 60


def test_nesting_below_the_limit_loads(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    path.write_bytes(nested(20))
    assert sum(1 for _ in load(path).graph.all_nodes()) == 20


@pytest.mark.parametrize("extra", [{"checksum": "ab"}, {"basepath": "/tmp"}, {"prepacked_0": "k|0|16|v"}])
def test_keys_that_other_tools_write(extra: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "w.bin").write_bytes(bytes(16))
    load(write(model([external("w", [4], "w.bin", 0, 16, **extra)]), tmp_path / "m.onnx"))


def test_unknown_dimensions_of_old_exporters(tmp_path: Path) -> None:
    proto = model()
    proto.graph.input[0].type.tensor_type.shape.dim[0].dim_value = -1
    shape = load(write(proto, tmp_path / "m.onnx")).graph.inputs[0].shape
    assert shape is not None and not isinstance(shape[0], int) and shape[1] == 4


def test_strange_but_harmless_names_load(tmp_path: Path) -> None:
    proto = model()
    proto.graph.node[0].name = "<script>alert('层')</script>"
    assert load(write(proto, tmp_path / "m.onnx")).graph[0].name == "<script>alert('层')</script>"


def test_printable() -> None:
    assert printable(ESC) == r"\x1b]0;owned\x07\x1b[2J"
    assert printable("a\u202eb\n") == r"a\u202eb\n"
    assert printable(os.fsdecode(b"\xff")) == r"\udcff"
    assert printable("层/w.1") == "层/w.1"
    assert len(printable("x" * 10_000)) <= 160
    assert quoted(b"\xffw") == r"'\xffw'"
