"""The human view of a report."""

from __future__ import annotations

import io

import pytest

from sparse_onnx.cli.output import console
from sparse_onnx.cli.render import render
from sparse_onnx.core.report import (
    BenchModel,
    BenchRecord,
    BenchRow,
    BlockRecord,
    ModelRecord,
    PassRecord,
    Refusal,
    Report,
    VerifyRecord,
)


def shown(report: Report, **settings: bool) -> str:
    stream = io.StringIO()
    render(report, console(stream), **settings)
    return stream.getvalue()


def refusals(number: int) -> list[Refusal]:
    return [Refusal(f"reason {index}", f"node_{index}", "hint", "some_pass") for index in range(number)]


def test_refusals_are_counted_and_the_first_shown() -> None:
    text = shown(Report("optimize", refusals=refusals(10)))
    assert "10 left alone" in text and "reason 2" in text and "reason 3" not in text and "7 more" in text


def test_explain_shows_every_refusal() -> None:
    text = shown(Report("optimize", refusals=refusals(10)), explain=True)
    assert all(f"some_pass: reason {index} at node_{index} (hint)" in text for index in range(10))
    assert "more" not in text


def test_passes_are_shown_when_verbose() -> None:
    record = PassRecord("fuse_gating", "exact", 2, 1, 1, 3.14, 10, 25, 100, 100)
    report = Report("optimize", passes=[record])
    assert "fuse_gating" not in shown(report)
    assert "fuse_gating" in shown(report, verbose=True) and "+15" in shown(report, verbose=True)


@pytest.mark.parametrize(
    ("record", "words"),
    [
        (
            VerifyRecord("whole", True, 12, 1e-6, 3e-7),
            "same answers (whole), 12 runs, largest relative error 3.0e-07",
        ),
        (VerifyRecord("blocks", False, 1, 1.0, 0.5, failure="2x7: off by 0.5"), "NOT the same answers"),
        (VerifyRecord("none", None), "not verified"),
        (VerifyRecord("whole", True, 1, tokens_left_out=3), "3 tokens of near-tied routing left out"),
    ],
)
def test_the_verdict(record: VerifyRecord, words: str) -> None:
    text = shown(Report("verify", verify=record))
    assert words in text and (record.failure or "") in text


def test_blocks_and_parameters() -> None:
    block = BlockRecord("b", "moe", "neutral", 8, 2, 64, 96, "silu", True, None, None, 147456, None)
    model = ModelRecord("m.onnx", 10, 2048, "f", 1_500_000, None)
    lines = shown(Report("inspect", model=model, blocks=[block])).splitlines()
    assert lines[0] == "m.onnx: 10 nodes, 2 KiB of weights, 1.5 M parameters"
    assert "silu, gated" in lines[2] and "147 K" in lines[2] and "None" not in "".join(lines)


def test_no_blocks_is_said() -> None:
    assert "no sparse blocks found" in shown(Report("inspect", model=ModelRecord("m", 1, 1)))


def test_bench_shows_every_row() -> None:
    rows = [
        BenchRow(name, tokens, 1, 0.9, 1.1, ratio)
        for tokens in (1, 64)
        for name, ratio in (("a", 1), ("b", 0.25))
    ]
    record = BenchRecord(2, 7, rows, [BenchModel("a", 0.5, 100), BenchModel("b", None, None)])
    text = shown(Report("bench", bench=record))
    assert text.count("0.25") == 2 and "2 threads" in text and "None" not in text


def test_nothing_is_cut_where_the_output_is_no_terminal() -> None:
    name = "x" * 500
    report = Report("inspect", model=ModelRecord(name, 1, 1), notes=[name])
    assert shown(report).count(name) == 2
