"""Shared paths; test helpers import as top-level modules (`from builders import ...`)."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest
from hypothesis import settings

sys.path.insert(0, str(Path(__file__).parent))

# A change is judged by the same examples as the one before it; `make test-all` draws others (--hypothesis-profile).
settings.register_profile("repeatable", derandomize=True)
settings.load_profile("repeatable")


@pytest.fixture(scope="session")
def corpus() -> Path:
    """Graphs by other exporters, beside the checkout."""
    folder = Path(__file__).parents[2] / "shared" / "corpus"
    if not folder.is_dir():
        pytest.skip(f"no corpus at {folder}")
    return folder


@pytest.fixture(scope="session")
def kernels() -> Path:
    """The native kernels, compiled once."""
    if not any(map(shutil.which, ("c++", "g++", "clang++"))):
        pytest.skip("there is no C++ compiler")
    from sparse_onnx.kernels import build

    return build()
