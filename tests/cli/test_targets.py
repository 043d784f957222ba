from __future__ import annotations

import json

import pytest
from click.testing import CliRunner

from sparse_onnx.cli import main


@pytest.mark.parametrize("name", ["cpu", "CPU", "CPUExecutionProvider"])
def test_short_and_full_names(name: str) -> None:
    result = CliRunner().invoke(main, ["targets", "show", name, "--json", "-"])
    entry = json.loads(result.stdout)["targets"][0]
    assert (
        entry["name"] == "cpu" and entry["provider"] == "CPUExecutionProvider" and "grouped" in entry["forms"]
    )
    assert "provenance.forms" in result.stderr


def test_the_list() -> None:
    result = CliRunner().invoke(main, ["targets"])
    assert result.exit_code == 0 and "CPUExecutionProvider" in result.stdout


def test_an_unknown_target_exits_2() -> None:
    result = CliRunner().invoke(main, ["targets", "show", "npu"])
    assert (
        result.exit_code == 2 and "unknown target 'npu'" in result.stderr and result.stderr.count("\n") == 1
    )


def test_operators_and_forms_are_shown_with_their_source() -> None:
    result = CliRunner().invoke(main, ["targets", "show", "tensorrt"], env={"COLUMNS": "250"})
    assert result.exit_code == 0
    assert "ScatterND(add)" in result.stdout and "reduction is not supported [onnx-tensorrt]" in result.stdout


def test_probe_writes_a_record_that_profiles_follow(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    from sparse_onnx.bench import probing
    from sparse_onnx.targets import profile
    from sparse_onnx.targets.profile import FormResult, Operator
    from sparse_onnx.targets.record import Record

    monkeypatch.setenv(profile.PROBED_VARIABLE, str(tmp_path))
    found = Record(
        "cpu",
        "onnxruntime 9",
        {"TopK": Operator(("int8",), "probe")},
        {"dense": FormResult(True, True, True)},
    )
    monkeypatch.setattr(probing, "probe", lambda target, say=None: found)
    try:
        result = CliRunner().invoke(main, ["targets", "probe", "cpu"])
        assert result.exit_code == 0, result.stderr
        assert "TopK: the profile says" in result.stdout and (tmp_path / "cpu.toml").exists()
        assert profile.get("cpu").operators["TopK"].types == ("int8",)
    finally:
        monkeypatch.undo()
        profile.forget()
    assert "float32" in profile.get("cpu").operators["TopK"].types


def test_a_target_that_is_not_here_cannot_be_probed() -> None:
    result = CliRunner().invoke(main, ["targets", "probe", "nnapi"])
    assert result.exit_code == 2 and "cannot be run on this machine" in result.stderr
