"""Where words go: JSON alone on standard output, tables beside it, nothing when quiet."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest
from builders import Shape, layered_model, onnx_save, save_external
from click.testing import CliRunner

from sparse_onnx.cli import main
from sparse_onnx.cli.output import Output
from sparse_onnx.core import report as contract

#: The keys that cli.md promises, in the report and in each of its parts.
TOP = [
    "schema",
    "command",
    "tool",
    "target",
    "model",
    "output",
    "blocks",
    "refusals",
    "passes",
    "tuning",
    "thresholds",
    "verify",
    "bench",
]
TOP += ["placement", "fitting", "static", "diff", "notes"]
BLOCK = [
    "name",
    "kind",
    "spelling",
    "experts",
    "top_k",
    "hidden",
    "inner",
    "activation",
    "gated",
    "router",
    "form",
]
BLOCK += ["parameters", "active_parameters", "rounding"]
MODEL = ["path", "nodes", "weight_bytes", "fingerprint", "parameters", "active_parameters"]
REFUSAL = ["pass", "reason", "node", "hint"]
PASS = ["name", "kind", "matched", "rewritten", "ms", "nodes_before", "nodes_after"]
VERIFY = ["method", "passed", "runs", "max_abs_error", "max_rel_error", "inputs"]
ROW = ["model", "tokens", "median_ms", "p10_ms", "p90_ms", "ratio_to_first"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_external(layered_model(Shape(), layers=2), tmp_path_factory.mktemp("model") / "m.onnx")


def invoke(*arguments: str | Path) -> tuple[int, str, str]:
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    return result.exit_code, result.stdout, result.stderr


def test_json_is_alone_on_standard_output(model: Path) -> None:
    code, out, errors = invoke("inspect", model, "--json", "-")
    data = json.loads(out)
    assert code == 0 and data["command"] == "inspect"
    assert "layers.0.experts" in errors and "softmax_topk_renormalised" in errors


def test_tables_go_to_standard_output_otherwise(model: Path) -> None:
    code, out, errors = invoke("inspect", model)
    assert code == 0 and "layers.0.experts" in out and "layers.0.experts" not in errors


def test_json_to_a_file_is_the_same_object(model: Path, tmp_path: Path) -> None:
    target = tmp_path / "report.json"
    code, out, _ = invoke("inspect", model, "--json", target)
    assert code == 0 and "layers.0.experts" in out
    assert json.loads(target.read_text()) == json.loads(invoke("inspect", model, "--json", "-")[1])
    assert [path.name for path in tmp_path.iterdir()] == ["report.json"]


def test_json_into_a_device_leaves_the_device() -> None:
    before = os.stat("/dev/null")
    assert invoke("targets", "--json", "/dev/null")[0] == 0
    assert os.stat("/dev/null").st_rdev == before.st_rdev


def test_quiet_prints_nothing(model: Path) -> None:
    assert invoke("inspect", model, "-q") == (0, "", "")
    code, out, errors = invoke("inspect", model, "-q", "--json", "-")
    assert (code, errors) == (0, "") and json.loads(out)["schema"] == 1


def test_progress_is_plain_lines_on_standard_error(model: Path, tmp_path: Path) -> None:
    code, out, errors = invoke("optimize", model, tmp_path / "out.onnx")
    assert code == 0
    assert "lower: fuse_gating\n" in errors and "\x1b" not in errors and "fuse_gating" not in out


def test_the_report_has_the_fields_of_the_contract(model: Path, tmp_path: Path) -> None:
    code, out, _ = invoke("optimize", model, tmp_path / "out.onnx", "--json", "-", "-q")
    data = json.loads(out)
    assert code == 0
    assert list(data) == TOP and data["schema"] == 1 and data["target"] == "cpu"
    assert set(data["tool"]) == {"sparse_onnx", "onnxruntime"}
    assert list(data["model"]) == MODEL and list(data["output"]) == MODEL
    assert [list(block) for block in data["blocks"]] == [BLOCK, BLOCK]
    assert data["blocks"][0] == {
        "name": "layers.0.experts",
        "kind": "moe",
        "spelling": "neutral",
        "experts": 4,
        "top_k": 2,
        "hidden": 16,
        "inner": 24,
        "activation": "silu",
        "gated": True,
        "router": "softmax_topk_renormalised",
        "form": "grouped",
        "parameters": 4 * 3 * 16 * 24,
        "active_parameters": 2 * 3 * 16 * 24,
        "rounding": None,
    }
    assert all(set(PASS) <= set(record) for record in data["passes"])
    assert set(VERIFY) <= set(data["verify"]) and data["verify"]["passed"] is True
    assert data["placement"] == [{"provider": "CPUExecutionProvider", "nodes": data["output"]["nodes"]}]


def test_refusals_and_bench_rows_have_the_fields_of_the_contract() -> None:
    row = contract.BenchRow("a.onnx", 1, 1.0, 0.9, 1.1, float("nan"))
    report = contract.Report(
        "bench",
        refusals=[contract.Refusal("why", "node", "hint", "some_pass")],
        bench=contract.BenchRecord(2, 7, [row], [contract.BenchModel("a.onnx", 0.1, 12.0)]),
    )
    data = json.loads(report.dumps())
    assert list(data["refusals"][0]) == REFUSAL and data["refusals"][0]["pass"] == "some_pass"
    assert list(data["bench"]["rows"][0]) == ROW
    assert data["bench"]["rows"][0]["ratio_to_first"] is None, "a NaN never appears"
    assert list(data["bench"]["models"][0]) == ["model", "create_s", "rss_mb"]


def test_hostile_names_are_escaped(tmp_path: Path) -> None:
    model = layered_model(Shape(), layers=1)
    evil = "block\x1b[2J[bold red]:smile:\n\u202e"
    node = next(node for node in model.graph if node.domain == "sparse_onnx")
    node.metadata_props["sparse_onnx.block"] = evil
    path = save_external(model, tmp_path / "m.onnx")
    code, out, errors = invoke("inspect", path)
    assert code == 0
    assert "block\\x1b[2J[bold red]:smile:\\x0a\\u202e" in out
    assert "\x1b" not in out + errors and "\u202e" not in out
    assert json.loads(invoke("inspect", path, "--json", "-")[1])["blocks"][0]["name"] == evil


def test_a_name_that_the_terminal_cannot_print_is_no_error(tmp_path: Path) -> None:
    path = save_external(layered_model(Shape(), layers=1), tmp_path / "modèle-模型.onnx")
    result = CliRunner(charset="ascii").invoke(main, ["inspect", str(path)])
    assert result.exit_code == 0 and "mod\\xe8le" in result.stdout


def test_on_a_terminal_progress_is_a_status_line_and_names_are_no_markup(tmp_path: Path) -> None:
    folder = tmp_path / "["
    folder.mkdir()  # with the separator: "[/red] m.onnx", a closing tag that nothing opened
    path = folder / "red] m.onnx"
    onnx_save(layered_model(Shape(), layers=1), path)
    terminal, end = pty.openpty()
    command = [sys.executable, "-m", "sparse_onnx.cli", "inspect", str(path)]
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "200"}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=end, text=True, env=environment)
    os.close(end)
    errors = b""
    with contextlib.suppress(OSError):  # the end of a terminal is an error on Linux
        while chunk := os.read(terminal, 4096):
            errors += chunk
    os.close(terminal)
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert b"reading " in errors and b"[/red]" in errors and "[/red] m.onnx: " in out


def test_output_is_a_value() -> None:
    assert dataclasses.replace(Output(), quiet=True) == Output(quiet=True)
