"""The library, compiled once."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from sparse_onnx.kernels import build


@pytest.fixture(scope="session")
def library() -> Path:
    if not any(map(shutil.which, ("c++", "g++", "clang++"))):
        pytest.skip("there is no C++ compiler")
    return build()
