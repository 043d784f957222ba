"""`genai_config.json` beside a model, and what becomes of it when the model is rewritten."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sparse_onnx.graph import genai


def _config(filename: str) -> dict[str, object]:
    return {"model": {"type": "decoder", "decoder": {"filename": filename, "head_size": 8}}, "search": {}}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "in"
    folder.mkdir()
    genai.write(_config("model.onnx"), folder)
    (folder / "tokenizer.json").write_text("{}")
    (folder / "notes.txt").write_text("not a tokenizer's")
    (tmp_path / "out").mkdir()
    return folder / "model.onnx"


def test_it_goes_with_the_rewritten_model(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    (out / genai.NAME).write_text("an older one")
    assert genai.carry(model, out / "fast.onnx") == "genai_config.json written beside fast.onnx"
    assert json.loads((out / genai.NAME).read_text()) == _config("fast.onnx")
    assert sorted(path.name for path in out.iterdir()) == [genai.NAME, "tokenizer.json"]
    assert json.loads((model.parent / genai.NAME).read_text()) == _config("model.onnx")


def test_files_of_another_model_are_left(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    (out / "tokenizer.json").write_text('{"other": 1}')
    note = genai.carry(model, out / "fast.onnx")
    assert note is not None and "tokenizer.json there is another model's" in note
    assert (out / "tokenizer.json").read_text() == '{"other": 1}'


def test_one_model_a_folder(model: Path) -> None:
    note = genai.carry(model, model.parent / "fast.onnx")
    assert note is not None and "still names model.onnx" in note
    assert json.loads((model.parent / genai.NAME).read_text()) == _config("model.onnx")
    assert genai.carry(model, model) is None


@pytest.mark.parametrize("text", [None, "{", "[]", '{"model": {}}', json.dumps(_config("other.onnx"))])
def test_without_one_of_this_model_nothing_happens(text: str | None, model: Path, tmp_path: Path) -> None:
    (model.parent / genai.NAME).unlink()
    if text is not None:
        (model.parent / genai.NAME).write_text(text)
    assert genai.carry(model, tmp_path / "out" / "fast.onnx") is None
    assert list((tmp_path / "out").iterdir()) == []
