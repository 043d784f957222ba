"""The benchmark of thresholded layers on layers that are small: what is run is right, and a run goes on."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from sparse_onnx.bench.thresholded import __main__ as thresholded
from sparse_onnx.bench.thresholded import layers
from sparse_onnx.bench.thresholded import page as pages
from sparse_onnx.bench.thresholded.page import BEGIN, END
from sparse_onnx.core.errors import ModelError

SIZE = 256


@pytest.mark.parametrize("dtype", (*layers.TYPES, "gated"))
def test_every_kind_runs_and_a_copy_computes_what_it_copies(dtype: str, kernels: Path) -> None:
    for kind in layers.kinds(dtype):
        session = thresholded._session(kind, SIZE, SIZE, 2, 1)
        for tokens in (1, 5):
            x = np.random.default_rng(tokens).standard_normal((tokens, SIZE)).astype(np.float32)
            dense = thresholded._runner(session, [x], -1.0 if kind.native else None)(0)
            assert len(dense) == 2 and dense[0].shape == (tokens, SIZE), kind.name
            assert not np.array_equal(dense[0], dense[1]), "weights of their own"
            if kind.native:
                half = thresholded._runner(session, [x], kind.tau(50, SIZE))(0)
                assert np.array_equal(half[0], dense[0]) == (kind.many and tokens > 4), kind.name


def test_thresholds_skip_the_share_that_they_are_named_for() -> None:
    x = np.random.default_rng(0).standard_normal(200_000)
    for share, tau in layers.TAU.items():
        assert np.mean(np.abs(x) <= tau) * 100 == pytest.approx(share, abs=0.5)


def test_a_run_goes_on_and_writes_the_page(
    kernels: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page, file = tmp_path / "page.md", tmp_path / "out" / "found.json"
    page.write_text(f"# Page\n\n{BEGIN}\nstale figures\n{END}\n\nafter\n")
    common = [
        "--shapes",
        f"{SIZE}x{SIZE}",
        "--threads",
        "1",
        "--stack-mb",
        "0.5",
        "--rounds",
        "2",
        "--json",
        str(file),
    ]

    def invoke(*more: str) -> str:
        result = CliRunner().invoke(thresholded.main, [*common, *more])
        assert result.exit_code == 0, result.output
        return result.stderr

    assert "float32" in invoke("--types", "float32", "--tokens", "1,8")
    held = json.loads(file.read_text())
    assert [(cell["tokens"], len(cell["rows"])) for cell in held["cells"]] == [(1, 2), (8, 2)]
    said = invoke("--types", "float32,int4", "--tokens", "1,8", "--docs", str(page))
    assert "float32" not in said and said.count("int4") == 2, "what is known is not measured again"
    text = page.read_text()
    assert text.startswith("# Page\n\n") and text.endswith(f"{END}\n\nafter\n") and "stale" not in text
    assert "| 70 % |" in text and "with a copy of level 4" in text and "8 tokens, nothing skipped" in text
    cell = held["cells"][0]
    ratio = cell["rows"][0]["ms"]["0"] / cell["rows"][1]["ms"]["50"]
    assert f"{ratio:.2f}" in text

    def fail(*_: object, **__: object) -> None:
        raise AssertionError("measured again")

    monkeypatch.setattr(thresholded, "measure", fail)
    invoke("--types", "float32,int4", "--tokens", "1,8", "--docs", str(page))
    assert page.read_text() == text


def test_results_of_something_else_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "found.json"
    document = pages.read(None, 1.0, 2)
    file.write_text(json.dumps(document))
    assert pages.read(file, 1.0, 2) == document
    with pytest.raises(ModelError, match="other versions, another machine or other settings"):
        pages.read(file, 1.0, 3)
    file.write_text("[]")
    with pytest.raises(ModelError, match="holds no results"):
        pages.read(file, 1.0, 2)
    (tmp_path / "page.md").write_text("nothing")
    with pytest.raises(ModelError, match="no marks"):
        pages.put(tmp_path / "page.md", document)
