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
