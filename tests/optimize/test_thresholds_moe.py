"""Experts that skip inputs: calibrated, measured, verified whole and block by block, quantized as well."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from builders import Shape, layered_model, save_external

import sparse_onnx
from sparse_onnx.graph import io
from sparse_onnx.targets import session as sessions

SHAPE = Shape(experts=4, hidden=32, inner=48, biases=True)
LEVEL = "sparsity_level"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("moe")
    save_external(layered_model(SHAPE), place / "in.onnx")
    for name, seed in (("train", 0), ("eval", 1)):
        x = np.random.default_rng(seed).standard_normal((2000, SHAPE.hidden)).astype(np.float32)
        np.savez(place / f"{name}.npz", x=x)
    sparse_onnx.calibrate(place / "in.onnx", place / "train.npz", place / "calib.json", threads=1)
    return place


def optimized(folder: Path, **options: Any) -> Any:
    return sparse_onnx.optimize(
        folder / "in.onnx",
        folder / "out.onnx",
        thresholds=folder / "calib.json",
        eval_data=[folder / "eval.npz"],
        threads=1,
        **options,
    )


@pytest.mark.parametrize("method", ["whole", "blocks"])
def test_experts_skip_what_was_asked_for(folder: Path, monkeypatch: pytest.MonkeyPatch, method: str) -> None:
    if method == "blocks":
        monkeypatch.setattr("sparse_onnx.verify.lowering.WHOLE_BYTES", 0)
        monkeypatch.setattr("sparse_onnx.verify.lowering.GROUP_BYTES", 40_000)  # two experts at a time
        monkeypatch.setattr("sparse_onnx.optimize.checks._fits", lambda model: False)
    report = optimized(folder, sparsity=0.4)
    assert report.verify.method == method and report.verify.passed and report.verify.max_rel_error < 1e-5
    found = report.thresholds
    assert [site.name for site in found.sites] == [
        f"layers.{at}.experts.{role}" for at in (0, 1) for role in ("up", "down")
    ]
    assert found.share_skipped == pytest.approx(0.4, abs=0.03)
    read = (2 * 48 + 48) * 32 * 4 * SHAPE.top_k * 2
    assert found.bytes == read, "one token's experts, of two layers"
    session = sessions.create_session(folder / "out.onnx")
    feeds = {"x": np.load(folder / "eval.npz")["x"][:50]}
    dense = sessions.run(sessions.create_session(folder / "in.onnx"), feeds)[0]
    off = sessions.run(session, feeds | {LEVEL: np.array(0)})[0]
    assert np.abs(off - dense).max() < 3e-6 * np.abs(dense).max()


@pytest.mark.parametrize("bits", ["int4", "int8"])
def test_quantized_experts_skip_too(folder: Path, bits: str) -> None:
    report = optimized(folder, sparsity=0.4, quantize=bits)
    assert report.verify.passed and len(report.thresholds.sites) == 4
    kinds = [node.op_type for node in io.load(folder / "out.onnx").graph]
    assert kinds.count("ThresholdedLinearNBits") == 2 * 2 * SHAPE.experts and "MatMulNBits" not in kinds
    assert any("thresholded layers agree with numpy" in note for note in report.notes)
    assert report.thresholds.share_skipped == pytest.approx(0.4, abs=0.03), "of the bytes as they are stored"
    values = (2 * 48 + 48) * 32 * SHAPE.top_k * 2
    weights = values // (2 if bits == "int4" else 1)
    assert weights <= report.thresholds.bytes < weights * 1.6, "scales of 16 inputs, zero points"


def test_a_form_of_one_operator_gives_way(folder: Path) -> None:
    report = optimized(folder, sparsity=0.4, form="fused")
    assert {block.form for block in report.blocks} == {"grouped"}
    assert any("experts' layers" in refusal.reason for refusal in report.refusals)
    assert len(report.thresholds.sites) == 4


def test_branches_are_not_watched_and_the_report_says_so(folder: Path) -> None:
    report = optimized(folder, sparsity=0.4, form="branched")
    assert all(site.measured is None for site in report.thresholds.sites)
    assert not report.thresholds.measured, "what is expected is not called measured"
    assert any("were not reached" in note for note in report.notes) and report.verify.passed


@pytest.mark.parametrize("bits", [None, "int4", "int8"])
@pytest.mark.parametrize("method", ["whole", "blocks"])
def test_experts_by_one_operator(
    folder: Path, kernels: Path, monkeypatch: pytest.MonkeyPatch, method: str, bits: str | None
) -> None:
    if method == "blocks":
        monkeypatch.setattr("sparse_onnx.verify.lowering.WHOLE_BYTES", 0)
        monkeypatch.setattr("sparse_onnx.verify.lowering.GROUP_BYTES", 40_000)
        monkeypatch.setattr("sparse_onnx.optimize.checks._fits", lambda model: False)
    report = optimized(folder, sparsity=0.4, form="gathered", quantize=bits)
    apart = optimized(folder, sparsity=0.4, form="grouped", quantize=bits)
    assert report.verify.method == method and report.verify.passed
    assert {block.form for block in report.blocks} == {"gathered"}
    found = report.thresholds
    assert found.share_skipped == pytest.approx(0.4, abs=0.03)
    assert (found.bytes, found.bytes_skipped) == (apart.thresholds.bytes, apart.thresholds.bytes_skipped)
    assert all(site.measured is not None for site in found.sites)
    assert any("4 thresholded layers agree with numpy" in note for note in report.notes)


def test_a_budget_is_searched_for_and_kept(folder: Path) -> None:
    report = optimized(folder, budget="cosine>=0.97", form="gathered")
    assert {block.form for block in report.blocks} == {"gathered"}
    [quality] = [each for each in report.thresholds.quality if each.budget is not None]
    assert quality.kept and quality.value >= 0.97 and report.thresholds.share_skipped > 0.2


def test_units_behind_a_gate_give_way_to_layers_of_their_own(folder: Path) -> None:
    report = optimized(folder, sparsity=0.2, method="cats", form="gathered")
    assert {block.form for block in report.blocks} == {"grouped"}
    assert any("behind a gate" in refusal.reason for refusal in report.refusals)


def test_rows_of_zeros_in_a_model_without_biases(tmp_path: Path) -> None:
    """Such a run gives zeros throughout, but for the rounding of centres that are not zero."""
    shape = Shape(experts=6, hidden=32, inner=48)
    save_external(layered_model(shape), tmp_path / "in.onnx")
    x = np.random.default_rng(0).standard_normal((500, 32)).astype(np.float32)
    np.savez(tmp_path / "train.npz", x=x)
    sparse_onnx.calibrate(tmp_path / "in.onnx", tmp_path / "train.npz", tmp_path / "c.json", threads=1)
    report = sparse_onnx.optimize(
        tmp_path / "in.onnx",
        tmp_path / "out.onnx",
        thresholds=tmp_path / "c.json",
        sparsity=0.3,
        threads=1,
    )
    assert report.verify is not None and report.verify.passed and "6 tokens ties" in report.verify.inputs
    feeds = {"x": np.zeros((6, 32), np.float32), LEVEL: np.array(0)}
    rounding = sessions.run(sessions.create_session(tmp_path / "out.onnx"), feeds)[0]
    assert 0 < np.abs(rounding).max() < 1e-6, "what the comparison has to stand"
