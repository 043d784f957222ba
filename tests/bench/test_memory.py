"""Creation time and memory from a process of its own."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from builders import Shape, layered_model, save_external

from sparse_onnx.bench.memory import measure


def test_a_model_costs_time_and_its_weights(tmp_path: Path) -> None:
    shape = Shape(experts=2, top_k=2, hidden=512, inner=1024)  # 12 MB, all of them active
    path = save_external(layered_model(shape, layers=1), tmp_path / "m.onnx")
    cost = measure(path, 1, [4])
    assert cost.model == str(path) and cost.create_s is not None and cost.create_s > 0
    if sys.platform == "linux":
        assert cost.rss_mb is not None and cost.rss_mb > 10


def test_a_process_that_fails_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "m.onnx").write_bytes(b"no model")
    cost = measure(tmp_path / "m.onnx", 1, [4])
    assert cost.create_s is None and cost.rss_mb is None


def test_nothing_is_imported_from_the_models_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save_external(layered_model(Shape(), layers=1), tmp_path / "m.onnx")
    (tmp_path / "numpy.py").write_text("raise SystemExit('code from the model folder ran')")
    monkeypatch.chdir(tmp_path)
    assert measure("m.onnx", 1, [1]).create_s is not None
    assert path.exists()
