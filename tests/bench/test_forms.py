"""The benchmark of forms on a layer small enough for a test: everything is right, measured, and in the table."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from sparse_onnx import targets  # noqa: E402
from sparse_onnx.bench import forms, suite  # noqa: E402
from sparse_onnx.core.errors import VerificationError  # noqa: E402
from sparse_onnx.core.report import BenchModel, BenchRow  # noqa: E402
from sparse_onnx.optimize import tune as tuner  # noqa: E402

SHAPE = forms.Shape(experts=6, top_k=2, inner=64, hidden=64)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sparse_onnx.bench.memory.measure", lambda path, *_: BenchModel(str(path), 0.5, 1.0))
    monkeypatch.setattr(tuner, "_MOST_CACHE", 1 << 16)
    monkeypatch.setattr(tuner, "_ROUNDS", 3)


@pytest.mark.parametrize("precision", forms.PRECISIONS)
def test_every_form_is_measured(precision: forms.Precision, tmp_path: Path) -> None:
    result = forms.run_case(SHAPE, precision, [1, 5], 2, tmp_path, rounds=3, peers=False)
    bits = {"float32": "0", "float16": "0", "int8": "8", "int4": "4"}[precision]
    candidates = targets.get("cpu").candidates[bits]
    measured = {row.model for row in result.rows if row.tokens == 5}
    assert measured | set(result.left_out) == set(candidates)
    assert set(result.left_out) == ({"fused"} if precision == "float16" else set())
    assert set(result.chosen) == {1, 5} and set(result.chosen.values()) <= measured
    for count, form in result.chosen.items():
        [row] = [row for row in result.rows if row.model == form and row.tokens == count]
        assert row.ratio_to_first == 1
    assert any(row.model == forms.LIMIT and row.tokens == 1 for row in result.rows)
    text = forms.as_text(result)
    assert all(name in text for name in measured) and "tuned: " in text and SHAPE.name in text
    data = json.loads(json.dumps(suite.as_json([result], 2)))
    assert len(data["forms"][0]["rows"]) == len(result.rows)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["float32", "int4"])
def test_with_peers(precision: forms.Precision, tmp_path: Path) -> None:
    result = forms.run_case(SHAPE, precision, [1], 2, tmp_path, rounds=3)
    names = {row.model for row in result.rows} | set(result.left_out)
    wanted = {"com.microsoft::MoE (onnxruntime-genai)", "PyTorch eager"} if precision == "float32" else set()
    assert names >= wanted and len(names) > 6


def test_wrong_answers_are_not_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sparse_onnx.bench.peers.largest_error", lambda *_: 0.5)
    with pytest.raises(VerificationError, match=r"off by 0\.5 at 1 tokens"):
        forms.run_case(SHAPE, "float32", [1], 2, tmp_path, rounds=3, peers=False)


def test_the_limit_reads_what_one_token_uses() -> None:
    layers = SHAPE.build()
    x = np.random.default_rng(0).standard_normal((1, 64), dtype=np.float32)
    read: list[int] = []

    def read_limit(sample, threads):
        read.append(sum(array.nbytes for array in sample))
        return "fake", lambda arrays: None

    for precision in forms.PRECISIONS:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("sparse_onnx.bench.limits.read_limit", read_limit)
            forms.limit(layers, [x], precision, 1)
    one = SHAPE.top_k * 3 * 64 * 64
    router = 4 * 6 * 64
    assert read == [4 * one + router, 4 * one + router, one + router, one // 2 + one // 8 + router]


def test_the_table_compares_with_the_best_form() -> None:
    rows = [
        BenchRow("grouped", 1, 1.0, 1.0, 1.0, 1.0),
        BenchRow("fused", 1, 0.9, 0.9, 0.9, 0.9),
        BenchRow("peer", 1, 2.0, 2.0, 2.0, 2.0),
    ]
    costs = [BenchModel("grouped", 1.0, 10.0), BenchModel("fused", 0.1, 5.0)]
    text = forms.as_text(
        forms.Result("a case", "float32", {1: "grouped"}, rows, costs, {"fused": 1e-7}, {"other": "why"})
    )
    best = next(line for line in text.splitlines() if "best form" in line)
    assert "0.90" in best and "2.00" in text and "left out: other: why" in text
