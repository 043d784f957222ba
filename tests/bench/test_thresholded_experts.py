"""Thresholds in experts in each form: the models that are timed, and the table."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from sparse_onnx.bench.thresholded import experts as bench
from sparse_onnx.optimize import tune
from sparse_onnx.optimize.watched import Counted, Dialled
from sparse_onnx.sparsify.record import acting


@pytest.mark.parametrize("dtype", ["float32", "int8", "int4"])
def test_the_forms_compute_the_same_and_skip_what_the_level_says(dtype: str) -> None:
    block = bench.Block.parse("4x2x96x64")
    rng = np.random.default_rng(0)
    feeds = {
        "tokens": rng.standard_normal((30, 64), np.float32),
        "index": rng.integers(0, 4, (30, 2)),
        "weight": np.full((30, 2), 0.5, np.float32),
    }
    results = []
    for at in (0, 2):
        made = bench.model(block, dtype, at)
        results.append(Dialled(made, "sparsity_level")(feeds, 40)[0])
        counted = Counted(made, "sparsity_level", 40)
        counted(feeds)
        assert len(acting(made)) == (8 if at == 0 else 2)
        assert all(0.3 < (each.share or 0) < 0.5 for each in counted.seen.values())
    assert np.abs(results[0] - results[1]).max() < 1e-5 * np.abs(results[0]).max()


@pytest.mark.parametrize("more", [[], ["--bodies"]])
def test_the_table(kernels: Path, monkeypatch: pytest.MonkeyPatch, more: list[str]) -> None:
    monkeypatch.setattr(tune, "_MOST_CACHE", 1 << 16)
    options = ["--blocks", "4x2x96x64", "--types", "float32,int8", "--tokens", "1,3", "--rounds", "2", *more]
    result = CliRunner().invoke(bench.main, options)
    assert result.exit_code == 0, result.output
    rows = [line.split("|")[1:-1] for line in result.stdout.splitlines() if line.startswith("| 4, top-2")]
    forms = [row[4].strip() for row in rows]
    assert forms == [*["grouped", "branched", "gathered"] * 2, *["grouped", "gathered"] * 2]
    assert all(float(cell) > 0 for row in rows for cell in (row[3], *row[5:]))
