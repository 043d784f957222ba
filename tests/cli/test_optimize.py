"""Options reach `optimize` as it takes them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner

from sparse_onnx.cli import main
from sparse_onnx.cli.optimize import parse_passes
from sparse_onnx.core.report import Report


@pytest.fixture
def received(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    calls: dict[str, Any] = {}

    def record(source: Path, out: Path | None, **settings: Any) -> Report:
        calls.update(settings, source=source, out=out)
        return Report("optimize")

    monkeypatch.setattr("sparse_onnx.optimize.api.optimize", record)
    return calls


def test_defaults(received: dict[str, Any]) -> None:
    assert CliRunner().invoke(main, ["optimize", "a.onnx", "b.onnx", "-q"]).exit_code == 0
    assert received == {
        "source": Path("a.onnx"),
        "out": Path("b.onnx"),
        "target": "cpu",
        "form": "auto",
        "passes": None,
        "skip": (),
        "weights": "auto",
        "verify": "final",
        "dry_run": False,
        "quantize": None,
        "tune": False,
        "tokens": (1, 64),
        "threads": None,
        "static": [],
        "no_fallback": False,
        "tuning": None,
        "thresholds": None,
        "budget": None,
        "sparsity": None,
        "eval_data": (),
        "method": "scap",
        "allocation": "blocks",
        "threshold_mode": "native",
        "dense_first": None,
        "tokenizer": None,
        "prefill": "shared",
        "progress": None,
    }


def test_every_option(received: dict[str, Any]) -> None:
    arguments = [
        "a.onnx",
        "--target",
        "CPUExecutionProvider",
        "--form",
        "grouped",
        "--pass",
        "p:x=1,y=2",
        "--pass",
        "q",
    ]
    arguments += [
        "--skip",
        "r",
        "--skip",
        "s",
        "--weights",
        "copy",
        "--verify",
        "each",
        "--dry-run",
        "--explain",
    ]
    assert CliRunner().invoke(main, ["optimize", *arguments]).exit_code == 0
    assert received["out"] is None and received["dry_run"] is True and received["progress"] is not None
    assert received["passes"] == {"p": {"x": "1", "y": "2"}, "q": {}} and received["skip"] == ("r", "s")
    assert (received["weights"], received["verify"], received["form"]) == ("copy", "each", "grouped")


def test_options_of_tuning(received: dict[str, Any]) -> None:
    arguments = ["a", "b", "--tune", "--tokens", "1,8", "--threads", "3", "--tuning", "t.json", "-q"]
    assert CliRunner().invoke(main, ["optimize", *arguments, "--quantize", "int4"]).exit_code == 0
    assert (received["tune"], received["tokens"], received["threads"]) == (True, (1, 8), 3)
    assert (received["tuning"], received["quantize"]) == (Path("t.json"), "int4")


def test_options_of_thresholds(received: dict[str, Any]) -> None:
    arguments = ["a", "b", "-q", "--thresholds", "c.json", "--budget", "top1>=0.9", "--eval-data", "d"]
    arguments += ["--eval-data", "e", "--method", "teal", "--allocation", "uniform", "--dense-first", "4"]
    arguments += ["--threshold-mode", "simulate", "--tokenizer", "t.json"]
    assert CliRunner().invoke(main, ["optimize", *arguments]).exit_code == 0
    assert (received["thresholds"], received["budget"]) == (Path("c.json"), "top1>=0.9")
    assert received["eval_data"] == (Path("d"), Path("e")) and received["dense_first"] == 4
    assert (received["method"], received["allocation"]) == ("teal", "uniform")
    assert (received["threshold_mode"], received["tokenizer"]) == ("simulate", Path("t.json"))
    assert CliRunner().invoke(main, ["optimize", "a", "b", "-q", "--sparsity", "0.25"]).exit_code == 0
    assert received["sparsity"] == 0.25


def test_pass_options_add_up() -> None:
    assert parse_passes(("p:a=1", "p:b=x=y", "q:")) == {"p": {"a": "1", "b": "x=y"}, "q": {}}


@pytest.mark.parametrize("text", [":a=1", "p:a", "p:=1", "p:a=1,b"])
def test_malformed_pass_options(text: str) -> None:
    with pytest.raises(click.BadParameter, match="NAME:option=value"):
        parse_passes((text,))
