from __future__ import annotations

from pathlib import Path

import onnx
import pytest
from layers import Layer, make


@pytest.fixture
def thresholded(tmp_path: Path) -> Path:
    """A model with a thresholded layer."""
    path = tmp_path / "thresholded.onnx"
    onnx.save(make(Layer(64, 48)).model, path)
    return path


@pytest.fixture
def thresholded_integers(tmp_path: Path) -> Path:
    path = tmp_path / "integers.onnx"
    onnx.save(make(Layer(64, 48, stored="int4", axis=0)).model, path)
    return path
