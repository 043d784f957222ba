"""Other exporters' graphs of small layers: written, recognised, measured, and what may not be timed."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import onnx
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from sparse_onnx.bench import contestants, layers, recognised, spelled, suite  # noqa: E402
from sparse_onnx.core.errors import VerificationError  # noqa: E402
from sparse_onnx.core.report import BenchRow  # noqa: E402
from sparse_onnx.optimize.api import optimize  # noqa: E402

#: What tells a spelling's graph from the others': operators, and how many of them a block has for E experts.
MARKS = {
    "gathered": {"GatherND": lambda experts: 2},
    "grouped": {"ScatterElements": lambda experts: 1, "MatMul": lambda experts: 2 * experts},
    "per-expert-loop": {"NonZero": lambda experts: experts, "ScatterElements": lambda experts: experts},
    "dense-mask": {"Equal": lambda experts: experts, "MatMul": lambda experts: 3 * experts + 1},
    "gshard": {"CumSum": lambda experts: 1, "OneHot": lambda experts: 2},
    "contrib": {"MoE": lambda experts: 1},
}
EXPERTS = 4
COUNT = 2


def build() -> layers.SparseLayers:
    return layers.mixtral_layers(hidden=32, experts=EXPERTS, top_k=2, inner=48, layers=COUNT)


@pytest.mark.parametrize("spelling", spelled.ALL, ids=lambda spelling: spelling.spelling)
def test_a_spelling_is_right_and_recognised(spelling: spelled.Spelling, tmp_path: Path) -> None:
    built = build()
    before, after = tmp_path / "before.onnx", tmp_path / "after.onnx"
    spelling.write(built, before)
    nodes = [node.op_type for node in onnx.load(before, load_external_data=False).graph.node]
    for op_type, count in MARKS[spelling.spelling].items():
        assert nodes.count(op_type) == COUNT * count(EXPERTS), op_type
    report = optimize(before, after, target="cpu")
    recognised.require(report, spelling.spelling, COUNT)
    sessions = {path.stem: contestants.create(path, 1) for path in (before, after)}
    for tokens in (1, 9):
        feeds = recognised.inputs(built, tokens)
        runs = [contestants.onnx(name, session, feeds) for name, session in sessions.items()]
        contestants.check(contestants.eager("torch", built, feeds), runs, len(feeds))


def test_a_case_is_measured_and_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("unsupported\nand pages of advice")

    broken = dataclasses.replace(spelled.GROUPED, write=fail)
    monkeypatch.setattr(spelled, "MEASURED", (spelled.BATCHED, spelled.LOOP, broken))
    built = build()
    monkeypatch.setattr(recognised, "FITS", recognised.copied_bytes(built, 6))
    case = layers.Case("a case", lambda: built)
    result = recognised.run_case(case, [2, 6, 7], 1, tmp_path, rounds=2)
    gathered, loop, grouped = result.spellings
    assert [(row.model, row.tokens) for row in loop.rows] == [
        (name, count) for count in (2, 6, 7) for name in (recognised.OPTIMIZED, recognised.ORIGINAL)
    ]
    assert gathered.too_large == [7]
    assert [(row.model, row.tokens) for row in gathered.rows] == [
        (recognised.OPTIMIZED, 2),
        (recognised.ORIGINAL, 2),
        (recognised.OPTIMIZED, 6),
        (recognised.ORIGINAL, 6),
        (recognised.OPTIMIZED, 7),
    ]
    assert grouped.rows == [] and grouped.left_out == "not exported: RuntimeError: unsupported"
    data = json.loads(json.dumps(suite.as_json([], 1, [result])))
    assert [item["spelling"] for item in data["recognised"][0]["spellings"]] == [
        "gathered",
        "per-expert-loop",
        "grouped",
    ]


def test_the_table_has_the_ratio_of_the_original() -> None:
    rows = [BenchRow("optimized", 8, 2, 2, 2, 1.0), BenchRow("original", 8, 7, 7, 7, 3.5)]
    item = recognised.Recognised("some tool", "gathered", [*rows, BenchRow("optimized", 64, 2, 2, 2, 1.0)])
    item = dataclasses.replace(item, too_large=[64], optimize_s=1.5, nodes=(30, 70))
    other = recognised.Recognised("another", "grouped", [], left_out="not exported: why")
    text = recognised.as_text(recognised.RecognisedCase("a case", [item, other]))
    header, _, first, second = (line for line in text.splitlines() if line.startswith("|"))
    assert [cell.strip() for cell in header.strip("|").split("|")][1:3] == ["8", "64"]
    assert [cell.strip() for cell in first.strip("|").split("|")] == [
        *("some tool", "3.50", "does not fit", "30 -> 70", "1.5")
    ]
    assert "3.50" not in second and "left out: another: not exported: why" in text


def test_a_gathered_matrix_is_counted_for_each_slot() -> None:
    assert recognised.copied_bytes(build(), 5) == 5 * 2 * 2 * 48 * 32 * 4


@pytest.mark.parametrize(
    ("found", "passed"),
    [
        ([("gathered", "grouped")], True),
        ([("gathered", "grouped"), ("dense-mask", "grouped")], True),
        ([("gathered", "grouped"), ("gathered", None)], True),
        ([("gathered", "grouped")] * 2, False),
        ([("gathered", "grouped")] * 2, None),
    ],
)
def test_nothing_is_timed_that_was_not_recognised(found: list[tuple[str, str]], passed: bool | None) -> None:
    report: Any = SimpleNamespace(
        blocks=[SimpleNamespace(spelling=spelling, form=form) for spelling, form in found],
        refusals=[SimpleNamespace(reason="the weights differ")],
        verify=SimpleNamespace(passed=passed),
    )
    with pytest.raises(VerificationError):
        recognised.require(report, "gathered", 2)
