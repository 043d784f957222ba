from __future__ import annotations

import json
from pathlib import Path

import pytest
from builders import Shape, layered_model, save_external
from click.testing import CliRunner

from sparse_onnx.cli import main
from sparse_onnx.core.report import Report, VerifyRecord


def test_the_exit_code_is_the_verdict(monkeypatch: pytest.MonkeyPatch) -> None:
    for passed, code in ((True, 0), (False, 4), (None, 0)):
        record = VerifyRecord("whole", passed, 1, failure="" if passed else "off")
        monkeypatch.setattr(
            "sparse_onnx.verify.api.verify", lambda *a, r=record, **k: Report("verify", verify=r)
        )
        result = CliRunner().invoke(main, ["verify", "a.onnx", "b.onnx", "--json", "-", "-q"])
        assert result.exit_code == code
        assert json.loads(result.stdout)["verify"]["passed"] is passed, "the report is printed all the same"


def test_other_weights_are_another_model(tmp_path: Path) -> None:
    a = save_external(layered_model(Shape(), layers=1, seed=0), tmp_path / "a.onnx")
    b = save_external(layered_model(Shape(), layers=1, seed=1), tmp_path / "b.onnx")
    assert CliRunner().invoke(main, ["verify", str(a), str(a), "-q"]).exit_code == 0
    assert CliRunner().invoke(main, ["verify", str(a), str(b), "-q"]).exit_code == 4
