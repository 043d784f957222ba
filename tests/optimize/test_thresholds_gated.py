"""`optimize --method cats` from end to end: layers and experts, budgets, refusals, wrong weights that are seen."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from builders import Shape, layered_model, save_external
from dense_layers import dense_model, prepared
from gated_models import Net, gated_model, rows

import sparse_onnx
from sparse_onnx.core.errors import ImpossibleError, VerificationError
from sparse_onnx.graph import io
from sparse_onnx.optimize.kept_weights import compare_weights
from sparse_onnx.sparsify.record import acting, thresholds_of
from sparse_onnx.targets import session as sessions

LEVEL = "sparsity_level"
NET = Net()


def calibrated(folder: Path, width: int) -> Path:
    for name, seed in (("train", 0), ("eval", 1)):
        x = np.random.default_rng(seed).standard_normal((3000, width)).astype(np.float32)
        np.savez(folder / f"{name}.npz", x=x)
    sparse_onnx.calibrate(folder / "in.onnx", folder / "train.npz", folder / "calib.json", threads=1)
    return folder


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dense")
    onnx.save(gated_model(NET), folder / "in.onnx")
    return calibrated(folder, NET.width)


@pytest.fixture(scope="module", params=[False, True], ids=["fused", "separate"])
def moe(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("moe")
    shape = Shape(experts=4, hidden=32, inner=64, biases=True, separate=request.param)
    save_external(layered_model(shape), folder / "in.onnx")
    return calibrated(folder, shape.hidden)


def optimized(folder: Path, **options: Any) -> Any:
    given = {
        "thresholds": folder / "calib.json",
        "method": "cats",
        "threads": 1,
        "eval_data": [folder / "eval.npz"],
    }
    return sparse_onnx.optimize(folder / "in.onnx", folder / "out.onnx", **given | options)


@pytest.mark.parametrize("mode", ["native", "simulate"])
def test_a_sparsity_is_a_share_of_all_linear_weights(dense: Path, mode: str) -> None:
    report = optimized(dense, sparsity=0.3, threshold_mode=mode)
    found = report.thresholds
    assert found.method == "cats" and found.bytes == 2 * 3 * 32 * 72 * 4
    assert found.share_skipped == pytest.approx(0.3, abs=0.02) and found.measured
    for site in found.sites:
        assert site.bytes == 2 * 32 * 72 * 4 and site.measured == pytest.approx(site.expected, abs=0.03)
    assert report.verify.method == "whole" and report.verify.passed and report.verify.max_rel_error < 1e-6
    assert any("2 thresholded layers agree with numpy" in note for note in report.notes)
    session = sessions.create_session(dense / "out.onnx")
    feeds = rows(NET, 9, 5)
    plain = sessions.run(sessions.create_session(dense / "in.onnx"), feeds)[0]
    errors = [
        float(
            np.abs(sessions.run(session, feeds | {LEVEL: np.array(level)})[0] - plain).max()
            / np.abs(plain).max()
        )
        for level in (0, 20, 50, 90)
    ]
    assert errors[0] < 1e-6 and errors == sorted(errors) and errors[1] > 1e-4


def test_gathering_is_for_much_that_is_skipped(dense: Path) -> None:
    report = optimized(dense, sparsity=0.5, threshold_mode="gather")
    assert report.verify.passed and report.thresholds.share_skipped == pytest.approx(0.5, abs=0.03)
    kinds = {node.op_type for node in io.load(dense / "out.onnx").graph}
    assert "ThresholdedGatedMLP" not in kinds and "If" in kinds


def test_a_budget_is_kept(dense: Path) -> None:
    report = optimized(dense, budget="cosine>=0.99")
    cosine = report.thresholds.quality[0]
    assert cosine.kept and cosine.value >= 0.99 and report.thresholds.level > 10


def test_more_than_up_and_down_cannot_be_skipped(dense: Path) -> None:
    with pytest.raises(ImpossibleError, match=r"cannot be skipped, 6.% at most"):
        optimized(dense, sparsity=0.7)


def test_a_model_without_gates_is_refused(tmp_path: Path) -> None:
    onnx.save(dense_model(), tmp_path / "in.onnx")
    calibrated(tmp_path, 48)
    with pytest.raises(ImpossibleError, match="no gated layer was measured"):
        optimized(tmp_path, sparsity=0.2)


def test_a_calibration_with_other_gates_leaves_them_dense(dense: Path, tmp_path: Path) -> None:
    data = json.loads((dense / "calib.json").read_text())
    data["gated"][0]["name"] = "another"
    (tmp_path / "calib.json").write_text(json.dumps(data))
    report = optimized(dense, sparsity=0.2, thresholds=tmp_path / "calib.json")
    assert len(report.thresholds.sites) == 1 and report.verify.passed
    assert any("does not know it" in refusal.reason for refusal in report.refusals)


@pytest.mark.parametrize("form", ["grouped", "branched"])
def test_experts(moe: Path, form: str) -> None:
    report = optimized(moe, sparsity=0.3, form=form)
    found = report.thresholds
    assert [site.name for site in found.sites] == [f"layers.{at}.experts.gated" for at in (0, 1)]
    assert found.share_skipped == pytest.approx(0.3, abs=0.03) and report.verify.passed
    assert {block.form for block in report.blocks} == {form}
    assert found.bytes == 2 * 2 * 3 * 32 * 64 * 4, "of one token's two experts, in two layers"
    session = sessions.create_session(moe / "out.onnx")
    feeds = {"x": np.load(moe / "eval.npz")["x"][:50]}
    plain = sessions.run(sessions.create_session(moe / "in.onnx"), feeds)[0]
    off = sessions.run(session, feeds | {LEVEL: np.array(0)})[0]
    assert np.abs(off - plain).max() < 3e-6 * np.abs(plain).max()
    if form == "grouped":
        assert any("8 thresholded layers agree with numpy" in note for note in report.notes)


def test_experts_are_simulated(moe: Path) -> None:
    report = optimized(moe, sparsity=0.3, threshold_mode="simulate")
    assert report.verify.passed and any("8 thresholded layers agree" in note for note in report.notes)


@pytest.mark.parametrize("bits", ["int4", "int8"])
def test_quantized_experts(moe: Path, bits: str) -> None:
    report = optimized(moe, sparsity=0.3, quantize=bits)
    assert report.verify.passed and len(report.thresholds.sites) == 2
    assert report.thresholds.share_skipped == pytest.approx(0.3, abs=0.04)
    kinds = [node.op_type for node in io.load(moe / "out.onnx").graph]
    assert kinds.count("ThresholdedGatedMLPNBits") == 8
    assert any("8 thresholded layers agree with numpy" in note for note in report.notes)


@pytest.mark.parametrize("method", ["cats", "scap"])
def test_quantized_experts_give_branches_up(moe: Path, method: str) -> None:
    report = optimized(moe, sparsity=0.2, quantize="int8", form="branched", method=method)
    assert {block.form for block in report.blocks} == {"grouped"} and report.verify.passed
    assert any("integers in a branch" in refusal.reason for refusal in report.refusals)
    sessions.create_session(moe / "out.onnx")


def test_weights_that_are_not_what_they_were_are_seen(dense: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a model that is not compared as a whole: layer by layer."""
    monkeypatch.setattr("sparse_onnx.verify.lowering.WHOLE_BYTES", 0)
    monkeypatch.setattr("sparse_onnx.optimize.checks._fits", lambda model: False)
    report = optimized(dense, sparsity=0.3)
    assert any("2 thresholded layers have the weights and biases" in note for note in report.notes)
    before, after = prepared(io.load(dense / "in.onnx")), io.load(dense / "out.onnx")
    assert compare_weights(before, after) == len(acting(after)) == 2
    assert thresholds_of(after) is not None
    node = next(node for node in after.graph if node.op_type == "ThresholdedGatedMLP")
    for at, what in ((2, "other weights"), (3, "another bias"), (4, "other weights"), (6, "another bias")):
        value = node.inputs[at]
        assert value is not None and value.const_value is not None
        kept, wrong = value.const_value, value.const_value.numpy().copy()
        wrong.flat[1] += 1e-3
        value.const_value = ir.Tensor(wrong, name=value.name)
        with pytest.raises(VerificationError, match=what):
            compare_weights(before, after)
        value.const_value = kept
