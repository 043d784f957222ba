"""Building and finding the library."""

from __future__ import annotations

import json
from pathlib import Path

import onnxruntime
import pytest
from click.testing import CliRunner

import sparse_onnx
from sparse_onnx.cli import main
from sparse_onnx.core.errors import ImpossibleError, OutsideError, UsageError
from sparse_onnx.kernels import build, path


@pytest.fixture
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("SPARSE_ONNX_KERNELS", raising=False)
    return tmp_path / "cache"


def test_built_once(library: Path) -> None:
    changed = library.stat().st_mtime_ns
    assert build() == library == path() and library.stat().st_mtime_ns == changed


def test_not_built(empty_cache: Path) -> None:
    with pytest.raises(UsageError, match="kernels build"):
        path()
    with pytest.raises(UsageError, match="were not built"):
        sparse_onnx.register_kernels(onnxruntime.SessionOptions())


def test_no_compiler(empty_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(ImpossibleError, match="no C\\+\\+ compiler"):
        build()
    assert not empty_cache.exists()


def test_a_compiler_that_fails(empty_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = tmp_path / "broken"
    broken.write_text("#!/bin/sh\necho 'x.cc:1: error: cannot do it' >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("CXX", str(broken))
    with pytest.raises(OutsideError, match="cannot do it"):
        build()
    assert not list(empty_cache.rglob("*.so"))


def test_a_library_elsewhere(library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPARSE_ONNX_KERNELS", str(library))
    assert path() == library
    sparse_onnx.register_kernels(onnxruntime.SessionOptions())
    monkeypatch.setenv("SPARSE_ONNX_KERNELS", str(tmp_path / "none.so"))
    with pytest.raises(UsageError, match=r"none\.so: there is no such library"):
        path()
    (tmp_path / "none.so").write_bytes(b"no library")
    with pytest.raises(OutsideError, match="cannot load the kernels"):
        sparse_onnx.register_kernels(onnxruntime.SessionOptions())


def test_command_line(library: Path, empty_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    missing = CliRunner().invoke(main, ["kernels", "path"])
    assert missing.exit_code == 2 and "kernels build" in missing.stderr
    monkeypatch.setenv("SPARSE_ONNX_KERNELS", str(library))
    found = CliRunner().invoke(main, ["kernels", "path"])
    assert (found.exit_code, found.stdout.strip()) == (0, str(library))
    data = json.loads(CliRunner().invoke(main, ["kernels", "path", "--json", "-", "-q"]).stdout)
    assert data["kernels"] == [{"path": str(library)}]
