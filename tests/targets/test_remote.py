"""The worker of another environment, here with this environment's Python."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import numpy as np
import pytest
from builders import Shape, layered_model, save_external

from sparse_onnx.core.errors import ModelError, OutsideError
from sparse_onnx.targets import places, remote, runtimes, session
from sparse_onnx.targets.placement import placed
from sparse_onnx.targets.remote import RemoteError, RemoteSession
from sparse_onnx.targets.runtimes import Runtime


@dataclasses.dataclass(frozen=True)
class Here(Runtime):
    """This Python as if it were another environment."""

    program: str = ""

    @property
    def command(self) -> list[str]:
        worker = str(Path(remote.__file__).with_name("worker.py"))
        return [sys.executable, *(["-c", self.program] if self.program else [worker]), ""]

    @property
    def installed(self) -> bool:
        return True


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> Here:
    runtime = Here("here", "this environment", ("CPUExecutionProvider",))
    monkeypatch.setitem(runtimes.known(), "here", runtime)
    return runtime


def test_the_same_answers_as_here(here: Here, tmp_path) -> None:
    path = save_external(layered_model(Shape()), tmp_path / "m.onnx")
    there = session.create_session(path, provider="runtime:here", record=True)
    ours = session.create_session(path)
    assert [each.name for each in there.get_inputs()] == ["x"]
    for rows in (3, 1, 0):
        feeds = {"x": np.random.default_rng(rows).standard_normal((rows, 16)).astype(np.float32)}
        np.testing.assert_array_equal(session.run(there, feeds)[0], session.run(ours, feeds)[0])
    at = placed(there, "CPUExecutionProvider")
    assert at is not None and at.fallen("CPUExecutionProvider") == [] and at.parts[0].nodes


def test_a_model_in_memory_goes_there_whole(here: Here, tmp_path) -> None:
    from sparse_onnx.graph import io

    model = io.load(save_external(layered_model(Shape()), tmp_path / "m.onnx"))
    there = session.create_session(model, provider="runtime:here")
    assert session.run(there, {"x": np.ones((2, 16), np.float32)})[0].shape == (2, 16)


def test_failures_are_told_as_one_line(here: Here, tmp_path) -> None:
    path = tmp_path / "m.onnx"
    path.write_bytes(b"no model")
    with pytest.raises(ModelError, match="onnxruntime cannot load the model") as caught:
        session.create_session(path, provider="runtime:here")
    assert "\n" not in str(caught.value)
    there = session.create_session(layered_model(Shape()), provider="runtime:here")
    with pytest.raises(OutsideError, match="failed while running"):
        session.run(there, {"x": np.ones((2, 15), np.float32)})
    with pytest.raises(OutsideError, match="failed while running"):
        session.run(there, {"z": np.ones((2, 16), np.float32)})


@pytest.mark.parametrize(
    "program", ["raise SystemExit(3)", "import sys; sys.stdin.readline(); import os; os.abort()"]
)
def test_a_process_that_dies_is_told_and_started_again(program: str, tmp_path) -> None:
    dying = Here("dying", "ends at once", ("CPUExecutionProvider",), program=program)
    for _ in range(2):
        with pytest.raises(RemoteError, match="dying: its process"):
            RemoteSession(dying, tmp_path / "m.onnx", {}, {})


def test_a_process_that_hangs_is_ended(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    monkeypatch.setattr(remote, "_PATIENCE", 0.2)
    hanging = Here("hanging", "waits", ("CPUExecutionProvider",), program="import time; time.sleep(60)")
    with pytest.raises(RemoteError, match="gave no answer"):
        RemoteSession(hanging, tmp_path / "m.onnx", {}, {})
    assert not remote._servers["hanging"].alive


def test_ort_files(tmp_path) -> None:
    path = save_external(layered_model(Shape()), tmp_path / "m.onnx")
    mobile = session.create_session(path, provider="format:ort")
    feeds = {"x": np.ones((3, 16), np.float32)}
    expected = session.run(session.create_session(path), feeds)[0]
    np.testing.assert_allclose(session.run(mobile, feeds)[0], expected, atol=1e-6)
    with pytest.raises(ModelError):
        (tmp_path / "bad.onnx").write_bytes(b"")
        session.create_session(str(tmp_path / "bad.onnx"), provider="format:ort")
    assert places.described("format:ort").endswith(".ort file")
