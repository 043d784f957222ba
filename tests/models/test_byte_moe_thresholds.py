"""The trained mixture of experts with thresholds, measured as the zoo measures quality."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch")

import sparse_onnx
from sparse_onnx.models.corpus import held_out_text, training_text
from sparse_onnx.models.quality import bits_per_byte
from sparse_onnx.targets import session as sessions

LEVEL = "sparsity_level"


@pytest.mark.slow
def test_a_budget_holds_in_bits_per_byte(tmp_path: Path) -> None:
    model, out = tmp_path / "model.onnx", tmp_path / "out.onnx"
    sparse_onnx.export("zoo:byte-moe", model)
    (tmp_path / "train.txt").write_bytes(training_text()[:80_000])
    text = held_out_text()
    (tmp_path / "eval.txt").write_bytes(text[:16_000])
    sparse_onnx.calibrate(model, tmp_path / "train.txt", tmp_path / "calib.json")
    report = sparse_onnx.optimize(
        model,
        out,
        thresholds=tmp_path / "calib.json",
        budget="perplexity<=1%",
        eval_data=[tmp_path / "eval.txt"],
    )
    assert report.thresholds is not None and report.verify is not None and report.verify.passed
    assert report.thresholds.quality[0].kept and report.thresholds.share_skipped > 0.25
    names = {site.name.rsplit(".", 1)[-1] for site in report.thresholds.sites}
    assert {"up", "down", "qkv"} <= names, "experts and attention both"
    session = sessions.create_session(out)

    def bits(level: int) -> float:
        fed = {LEVEL: np.array(level)}
        return bits_per_byte(lambda ids: sessions.run(session, {"input_ids": ids, **fed})[0], text[16_000:])

    dense, sparse = bits(0), bits(report.thresholds.level)
    plain = sessions.create_session(model)
    same = bits_per_byte(lambda ids: sessions.run(plain, {"input_ids": ids})[0], text[16_000:])
    assert dense == pytest.approx(same, rel=1e-5)
    # perplexity 1 % up is log2(1.01) = 0.0144 bits; on other text than it was searched on, a little more or less.
    assert 0 < sparse - dense < 0.02
