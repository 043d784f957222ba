"""Creation of sessions: what is measured, and the option that large graphs need with older versions of ORT."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from builders import Shape, layered_model, save_external

from sparse_onnx.targets import session as sessions

SMALL = {"experts": 8, "hidden": 16, "inner": 8, "top_k": 2}


@pytest.fixture
def startup():
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    from sparse_onnx.bench import startup

    return startup


def test_a_model_is_measured_in_a_process_of_its_own(startup, tmp_path: Path) -> None:
    model = startup.Model(layers=3, **SMALL)
    path = tmp_path / "model.onnx"
    nodes = startup.write(model, path)
    assert len(onnx.load(path, load_external_data=False).graph.node) == nodes
    found = [startup.run(model, path, nodes, option, 1, 60.0) for option in (False, True)]
    assert all(item.create_s is not None and set(item.run_peak_mb) == {"1", "256"} for item in found)
    assert [item.documented for item in found] == [False, True]
    row = startup.as_text(found, 60.0).splitlines()[-1]
    assert "3 x 8 experts, hidden 16, inner 8" in row and str(nodes) in row


def test_a_session_that_takes_too_long_is_given_up(startup, tmp_path: Path) -> None:
    path = save_external(layered_model(Shape(), layers=1), tmp_path / "m.onnx")
    found = startup.run(startup.Model(1, **SMALL), path, 7, False, 1, 0.01)
    assert found.create_s is None
    row = startup.as_text(
        [found, dataclasses.replace(found, documented=True, create_s=2.0)], 30.0
    ).splitlines()[-1]
    assert [cell.strip() for cell in row.strip("|").split("|")][1:4] == ["7", "> 30", "2.0"]


def test_a_process_that_fails_is_an_error(startup, tmp_path: Path) -> None:
    from sparse_onnx.core.errors import VerificationError

    (tmp_path / "m.onnx").write_bytes(b"no model")
    with pytest.raises(VerificationError, match="1 x 8 experts"):
        startup.run(startup.Model(1, **SMALL), tmp_path / "m.onnx", 7, True, 1, 60.0)


@pytest.mark.slow
def test_48_layers_of_128_experts_are_created(startup, tmp_path: Path) -> None:
    model = startup.Model(48, 128, 64, 32)
    path = tmp_path / "model.onnx"
    nodes = startup.write(model, path)
    session = sessions.create_session(path)
    [entry] = session.get_inputs()
    found = startup.measure(path, True, 2)
    assert nodes > 15_000 and entry.shape[-1] == 64 and set(found["run_peak_mb"]) == {"1", "256"}


@pytest.mark.parametrize(
    ("nodes", "version", "expected"),
    [
        (100, "1.24.1", True),
        (5000, "1.24.1", False),
        (5000, "1.31.1", False),
        (5000, "1.32.0", True),
        (5000, "1.32.0.dev20261101", True),
        (5000, "2.0.0", True),
    ],
)
def test_memory_is_planned_where_that_is_quick(nodes: int, version: str, expected: bool) -> None:
    assert sessions.plans_memory_reuse(nodes, version) == expected


@pytest.mark.parametrize("kind", ["file", "model"])
@pytest.mark.parametrize(
    ("version", "many", "expected"), [("1.31.1", 5, False), ("1.31.1", 500, True), ("1.32.0", 5, True)]
)
def test_our_sessions_follow_the_rule(
    kind: str, version: str, many: int, expected: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[onnxruntime.SessionOptions] = []
    real = sessions.session_options

    def options(*args, **keywords):
        made.append(real(*args, **keywords))
        return made[-1]

    monkeypatch.setattr(sessions, "session_options", options)
    monkeypatch.setattr(sessions, "_MANY_NODES", many)
    monkeypatch.setattr(onnxruntime, "__version__", version)
    path = save_external(layered_model(Shape(), layers=1), tmp_path / "m.onnx")
    sessions.create_session(path if kind == "file" else ir.load(path))
    assert [item.enable_mem_reuse for item in made] == [expected]


def test_memory_of_no_model_can_be_released(tmp_path: Path) -> None:
    path = save_external(layered_model(Shape(), layers=1), tmp_path / "m.onnx")
    session = sessions.create_session(path)
    sessions.release_memory(path)
    sessions.release_memory(tmp_path / "nothing.onnx")
    assert session.get_inputs()[0].name == "x"
