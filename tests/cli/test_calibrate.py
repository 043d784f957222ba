"""`sparse-onnx calibrate`: what it prints, writes and exits with."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from builders import Shape, layered_model
from click.testing import CliRunner, Result

from sparse_onnx.cli import main
from sparse_onnx.core.calibration_file import read_calibration


@pytest.fixture
def model(tmp_path: Path) -> Path:
    ir.save(layered_model(Shape(), layers=2), tmp_path / "m.onnx")
    rows = np.random.default_rng(0).standard_normal((60, 16)).astype(np.float32)
    np.savez(tmp_path / "d.npz", x=rows)
    return tmp_path / "m.onnx"


def calibrate(model: Path, *arguments: str, data: str = "d.npz") -> Result:
    return CliRunner().invoke(main, ["calibrate", str(model), "--data", str(model.parent / data), *arguments])


def test_tables_and_file(model: Path, tmp_path: Path) -> None:
    result = calibrate(model, "-o", str(tmp_path / "c.json"))
    assert result.exit_code == 0, result.output
    assert "layers.{0...1}.experts.up x 2" in result.stdout and "16 -> 48" in result.stdout
    assert "layers.1.experts        4      2      60" in result.stdout
    assert "a router: its results are chosen from" in result.stdout
    assert "running: 1 of 1" in result.stderr and "measuring: 2 of 2" in result.stderr
    assert len(read_calibration(tmp_path / "c.json").layers) == 4
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_the_json_is_alone_on_standard_output(model: Path) -> None:
    result = calibrate(model, "--json", "-", "-v")
    found = json.loads(result.stdout)
    assert found["command"] == "calibrate" and len(found["blocks"]) == 2
    assert "layers.0.experts.up" in result.stderr


def test_quiet_is_quiet(model: Path) -> None:
    result = calibrate(model, "-q")
    assert (result.exit_code, result.output) == (0, "")


def test_an_unreached_expert_is_named(tmp_path: Path) -> None:
    from builders import routed_model

    ir.save(routed_model(Shape()), tmp_path / "m.onnx")
    arrays = {"tokens": np.ones((9, 16), np.float32), "weight": np.ones((9, 2), np.float32)}
    np.savez(tmp_path / "d.npz", index=np.zeros((9, 2), np.int64), **arrays)
    assert "block: no token reached 3 of 4 experts: 1, 2, 3" in calibrate(tmp_path / "m.onnx").stdout


FAILURES = {
    "no such data": ((), "none.txt", 2, "no such file"),
    "data of another model": ((), "other.npz", 2, "the model has no input 'z'"),
    "a folder that is not there": (("-o", "/nowhere/c.json"), "d.npz", 2, "no folder"),
    "too few rows": (("--rows", "1"), "d.npz", 2, "--rows"),
    "no model": ((), "d.npz", 3, "not an ONNX model"),
}


@pytest.mark.parametrize("name", FAILURES)
def test_failures_are_one_line_and_a_code(name: str, model: Path) -> None:
    arguments, data, code, reason = FAILURES[name]
    np.savez(model.parent / "other.npz", z=np.ones((2, 16)))
    if code == 3:
        model.write_text("text")
    result = calibrate(model, *arguments, data=data)
    assert result.exit_code == code
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("error: ") and reason in last


def test_torch_is_not_needed(model: Path) -> None:
    code = (
        "import sys\n"
        "sys.modules['torch'] = sys.modules['transformers'] = None\n"
        "from sparse_onnx.cli import main\n"
        "main(['calibrate', sys.argv[1], '--data', sys.argv[2], '-q'])\n"
    )
    command = [sys.executable, "-c", code, str(model), str(model.parent / "d.npz")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
