"""Options reach `export` as it takes them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from sparse_onnx.cli import main
from sparse_onnx.core.report import Report


@pytest.fixture
def received(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    calls: dict[str, Any] = {}

    def record(source: str, out: Path, **settings: Any) -> Report:
        calls.update(settings, source=source, out=out)
        return Report("export")

    monkeypatch.setattr("sparse_onnx.export.api.export", record)
    return calls


def test_nothing_is_trusted_unless_asked(received: dict[str, Any]) -> None:
    assert CliRunner().invoke(main, ["export", "zoo:byte-moe", "m.onnx", "-q"]).exit_code == 0
    assert received == {
        "source": "zoo:byte-moe",
        "out": Path("m.onnx"),
        "random_weights": False,
        "dtype": None,
        "past": False,
        "multimodal": False,
        "image_size": None,
        "sound_length": None,
        "trust_remote_code": False,
        "allow_pickle": False,
        "stream": None,
        "weights": "copy",
        "adapters": (),
        "progress": None,
    }


def test_every_option(received: dict[str, Any]) -> None:
    arguments = ["org/name", "m.onnx", "--random-weights", "--dtype", "float16", "--opset", "21"]
    arguments += ["--trust-remote-code", "--allow-pickle", "--no-stream", "--weights", "link", "--past"]
    arguments += ["--adapter", "a.py:one", "--adapter", "b.py:two"]
    assert CliRunner().invoke(main, ["export", *arguments]).exit_code == 0
    assert (received["random_weights"], received["dtype"], received["opset"]) == (True, "float16", 21)
    assert (received["stream"], received["weights"], received["past"]) == (False, "link", True)
    assert received["adapters"] == ("a.py:one", "b.py:two")
    assert (
        received["trust_remote_code"] is received["allow_pickle"] is True and received["progress"] is not None
    )


def test_a_multimodal_model_and_the_size_of_its_images(received: dict[str, Any]) -> None:
    arguments = [
        "export",
        "org/name",
        "folder",
        "--multimodal",
        "--sound-length",
        "800",
        "--image-size",
        "336x448",
    ]
    assert CliRunner().invoke(main, arguments).exit_code == 0
    assert (received["multimodal"], received["image_size"]) == (True, (336, 448))
    assert received["sound_length"] == 800
    assert CliRunner().invoke(main, [*arguments[:-1], "336"]).exit_code == 2


def test_a_source_that_is_not_there_exits_without_a_file(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    out = tmp_path / "m.onnx"
    result = CliRunner().invoke(main, ["export", str(tmp_path / "no_such.py") + ":model", str(out), "-q"])
    assert result.exit_code in (2, 3) and result.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
