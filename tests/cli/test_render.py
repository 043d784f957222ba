"""The human view of a report."""

from __future__ import annotations

import dataclasses
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
    for index in range(10):
        assert f"some_pass, at node_{index}: reason {index}\n    (hint)\n" in text
    assert "more" not in text


def test_the_same_reason_of_many_layers_is_told_once() -> None:
    layers = [
        Refusal(f"'layers.{layer}.up' is computed", f"n{layer}", "store it", "some_pass")
        for layer in range(24)
    ]
    other = [Refusal("'x' is an input", "n3", "store it", "some_pass"), Refusal("no node, no hint")]
    report = Report("optimize", refusals=[*layers, *other])
    text = shown(report)
    assert "26 left alone:\n  some_pass x 24, at n0, n1, n2 and 21 more: 'layers.0.up' is computed\n" in text
    assert text.count("is computed") == 1 and "more reasons" not in text
    assert "  some_pass, at n3: 'x' is an input\n" in text and "  refused: no node, no hint\n" in text
    assert ", n21, n22, n23: 'layers.0.up'" in shown(report, explain=True, verbose=True)


def named(*names: str, **changes: int) -> list[BlockRecord]:
    block = BlockRecord("", "moe", "grouped", 8, 2, 64, 96, "silu", True, None, "grouped", 147456, 36864)
    return [dataclasses.replace(block, name=name, **changes) for name in names]


@pytest.mark.parametrize(
    ("names", "row"),
    [
        ([f"layers.{layer}.mlp" for layer in range(48)], "layers.{0...47}.mlp x 48"),
        ([f"layers.{layer}.mlp" for layer in (1, 3, 5, 7, 9)], "layers.{1,3,...,9}.mlp x 5"),
        ([f"b{layer}.moe/node_{layer}" for layer in range(5)], "b0.moe/node_0 ... b4.moe/node_4 x 5"),
        (["moe"] * 4, "moe ... moe x 4"),
    ],
)
def test_equal_blocks_of_many_layers_are_one_row(names: list[str], row: str) -> None:
    report = Report("inspect", blocks=named(*names))
    lines = shown(report).splitlines()
    assert len(lines) == 2 and lines[1].startswith(f"{row}  ") and "147 K" in lines[1]
    assert len(shown(report, verbose=True).splitlines()) >= 1 + len(names)


def test_blocks_that_differ_have_rows_of_their_own() -> None:
    few = named("layers.0", "layers.1", "layers.2")
    lines = shown(Report("inspect", blocks=[*few, *named("layers.3", top_k=1), *few])).splitlines()
    assert [text.split()[0] for text in lines[1:]] == [
        *("layers.0", "layers.1", "layers.2", "layers.3", "layers.0", "layers.1", "layers.2"),
    ]


def test_other_kinds_of_blocks() -> None:
    block = BlockRecord(
        "f", "relu-ffn", "relu-ffn", *[None] * 2, 32, 128, "relu", False, None, None, 8352, None
    )
    skipping = dataclasses.replace(block, name="d", kind="mixture-of-depths", spelling="mixture-of-depths")
    skipping = dataclasses.replace(skipping, activation=None, gated=None)
    text = shown(Report("inspect", blocks=[block, skipping]))
    assert text.count("relu-ffn") == 1 and "8.35 K" in text and "any body" not in text and "None" not in text


def test_rounded_activations_are_told() -> None:
    [block] = named("layers.0")
    assert "8 bits" not in shown(Report("inspect", blocks=[block]))
    rounded = dataclasses.replace(block, rounding="int8")
    assert "silu, gated, rounded to 8 bits" in shown(Report("inspect", blocks=[rounded]))


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
        (
            VerifyRecord("whole", True, 1, not_run=["0 tokens: died"]),
            "the original fails there as well: 0 tokens: died",
        ),
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
    assert "no mixture of experts found" in shown(Report("optimize", model=ModelRecord("m", 1, 1)))


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
