"""The sweep: cells in processes, limits, and going on where it was; the table made of it."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")
from click.testing import CliRunner

from sparse_onnx.bench.coverage import measure, run, table
from sparse_onnx.bench.coverage.__main__ import main
from sparse_onnx.core.errors import ModelError

CASES = """
import time
from sparse_onnx.bench.coverage.cases import Case, Made

def sleeps(folder):
    time.sleep(600)

def dies(folder):
    raise SystemExit("the end")

def cases():
    return [Case("sleeps", "Sleeper", sleeps), Case("dies", "Dier", dies)]
"""


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "odd_cases.py").write_text(CASES)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.syspath_prepend(str(tmp_path))
    yield "odd_cases:cases"
    sys.modules.pop("odd_cases", None)


def test_limits_and_deaths_are_cells(place: str, tmp_path: Path) -> None:
    file, said = tmp_path / "results.json", []
    document = run.sweep(place, (), ["ours"], file=file, timeout=2, memory_gb=8, again=False, say=said.append)
    assert document == json.loads(file.read_text())
    cells = {name: row["cells"]["ours"] for name, row in document["results"].items()}
    assert cells["sleeps"]["outcome"] == measure.FAILED and "not done after 2 s" in cells["sleeps"]["reason"]
    assert cells["dies"]["outcome"] == measure.FAILED and len(said) == 2


def test_what_the_file_holds_is_not_measured_again(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, measured = tmp_path / "results.json", []

    def note(cases: str, name: str, exporter: str, timeout: float, memory: float) -> measure.Cell:
        measured.append(name)
        return measure.Cell(measure.BLOCK, blocks=2, layers=2, error=1e-7)

    monkeypatch.setattr(run, "_in_a_process", note)
    limits = {"timeout": 2, "memory_gb": 8, "say": lambda text: None}
    run.sweep(place, ("dies",), ["ours"], file=file, again=False, **limits)
    run.sweep(place, (), ["ours"], file=file, again=False, **limits)
    assert measured == ["dies", "sleeps"]
    run.sweep(place, ("dies",), ["ours"], file=file, again=True, **limits)
    assert measured == ["dies", "sleeps", "dies"]


def test_a_file_of_something_else_is_refused(place: str, tmp_path: Path) -> None:
    file = tmp_path / "results.json"
    file.write_text("[]")
    with pytest.raises(ModelError, match="no results"):
        run.sweep(place, (), ["ours"], file=file, timeout=1, memory_gb=8, again=False, say=print)


def _document() -> dict[str, object]:
    cells = {
        "first": {"ours": measure.Cell(measure.BLOCK, error=2e-7, blocks=2, layers=2)},
        "second": {
            "ours": measure.Cell(measure.REFUSED, "a | b"),
            "torch": measure.Cell(measure.WRONG, "at 1x1: off by 0.5", error=0.5),
        },
    }
    return {
        "tool": {"torch": "2.0"},
        "results": {
            name: {"title": name.title(), "cells": {key: cell.to_json() for key, cell in row.items()}}
            for name, row in cells.items()
        },
    }


def test_the_table_counts_and_gives_reasons() -> None:
    text = table.markdown(_document(), ["torch", "ours"])
    assert "| sparse-onnx | 1 | 0 | 1 | 0 | 0 | 2 |" in text
    assert "| torch.onnx.export | 0 | 0 | 0 | 0 | 1 | 1 |" in text
    assert "| `first` | First |  | neutral block | 2 of 2 | 2e-07 |" in text
    assert "- `second`: refused: a \\| b" in text and "**silently wrong**: at 1x1: off by 0.5" in text


def test_the_command_writes_the_page(place: str, tmp_path: Path) -> None:
    file, page = tmp_path / "results.json", tmp_path / "page.md"
    document = _document()
    document["results"] = {"dies": document["results"]["first"]}
    file.write_text(json.dumps(document))
    arguments = ["--cases", place, "--json", str(file), "--architecture", "dies", "--exporter", "ours"]
    result = CliRunner().invoke(main, [*arguments, "--docs", str(page)])
    assert result.exit_code == 0, result.output
    assert f"--cases {place}" in page.read_text() and "| `dies` | First | neutral block |" in page.read_text()
    assert CliRunner().invoke(main, ["--cases", place, "--architecture", "nobody"]).exit_code == 2


def test_the_page_has_a_second_table_with_cache(place: str, tmp_path: Path) -> None:
    """Of cells that differ from those of the first."""
    first, second, page = tmp_path / "first.json", tmp_path / "second.json", tmp_path / "page.md"
    document = _document()
    document["results"] = {"dies": document["results"]["first"]}
    first.write_text(json.dumps(document))
    none = measure.Cell(measure.INAPPLICABLE, "Dier does not generate text")
    document["results"] = {"dies": {"title": "Dier", "cells": {"ours": none.to_json()}}}
    second.write_text(json.dumps(document))
    arguments = ["--cases", place, "--json", str(first), "--architecture", "dies", "--exporter", "ours"]
    result = CliRunner().invoke(main, [*arguments, "--docs", str(page), "--with-cache", str(second)])
    assert result.exit_code == 0, result.output
    before, after = page.read_text().split("## With key/value cache")
    assert "| `dies` | First | neutral block |" in before and "- not applicable: " in before
    assert "| `dies` | Dier | not applicable |" in after and "not applicable: Dier does not" in after
    assert "| sparse-onnx | 0 | 0 | 0 | 0 | 0 | 1 | 1 |" in after
