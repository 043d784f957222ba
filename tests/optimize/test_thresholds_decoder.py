"""A transformer with its cache: thresholds while it generates, and what stays dense."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import sparse_onnx  # noqa: E402
from sparse_onnx.graph import io  # noqa: E402
from sparse_onnx.sparsify.record import thresholds_of  # noqa: E402
from sparse_onnx.targets import session as sessions  # noqa: E402

LEVEL = "sparsity_level"
VOCABULARY = 96


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama, exported with its cache and calibrated on random tokens."""
    place = tmp_path_factory.mktemp("decoder")
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=160,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        bos_token_id=None,
        eos_token_id=None,
    )
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(place / "config")
    sparse_onnx.export(place / "config", place / "model.onnx", random_weights=True, past=True)
    for name, seed in (("train", 0), ("eval", 1)):
        ids = np.random.default_rng(seed).integers(0, VOCABULARY, (24, 40))
        np.savez(place / f"{name}.npz", input_ids=ids)
    sparse_onnx.calibrate(place / "model.onnx", place / "train.npz", place / "calib.json", threads=1)
    return place


def optimized(folder: Path, name: str, **options: Any) -> Any:
    return sparse_onnx.optimize(
        folder / "model.onnx", folder / name, thresholds=folder / "calib.json", threads=1, **options
    )


def step(
    path: Path, ids: np.ndarray, before: dict[str, np.ndarray], seen: int, **turned: int
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Logits and cache behind some tokens of one sequence."""
    session = sessions.create_session(path, threads=1)
    feeds: dict[str, np.ndarray] = {"input_ids": ids, **before}
    given = {value.name: value for value in session.get_inputs()}
    if "attention_mask" in given:
        feeds["attention_mask"] = np.ones((1, seen + ids.shape[1]), np.int64)
    if "position_ids" in given:
        feeds["position_ids"] = np.arange(seen, seen + ids.shape[1])[None]
    for name, value in given.items():
        if name.startswith("past") and name not in feeds:
            feeds[name] = np.zeros((1, value.shape[1], 0, value.shape[3]), np.float32)
    feeds |= {name: np.array(level) for name, level in turned.items()}
    results = dict(
        zip([value.name for value in session.get_outputs()], sessions.run(session, feeds), strict=True)
    )
    cache = {
        name.replace("present", "past_key_values"): array
        for name, array in results.items()
        if "present" in name
    }
    return results["logits"], cache


def test_projections_of_one_input_share_a_threshold(folder: Path) -> None:
    report = optimized(folder, "shared.onnx", sparsity=0.5, method="teal", allocation="uniform")
    names = [site.name for site in report.thresholds.sites]
    assert len(names) == 8 and [site.layers for site in report.thresholds.sites] == [3, 1, 2, 1] * 2
    model = io.load(folder / "shared.onnx")
    kinds = [node.op_type for node in model.graph]
    assert kinds.count("ThresholdedLinear") == 14 and kinds.count("Gather") >= 1
    assert any("output head" in refusal.reason for refusal in report.refusals)


@pytest.mark.parametrize("mode", ["native", "simulate"])
def test_prefill_and_first_positions_stay_dense(folder: Path, mode: str) -> None:
    report = optimized(folder, "dense.onnx", sparsity=0.5, dense_first=6, threshold_mode=mode)
    assert report.thresholds.dense_first == 6
    path, source = folder / "dense.onnx", folder / "model.onnx"
    ids = np.random.default_rng(5).integers(0, VOCABULARY, (1, 4))
    dense, cache = step(source, ids, {}, 0)
    prefill, ours = step(path, ids, {}, 0)
    assert np.abs(prefill - dense).max() < 1e-5, "prefill"
    token = np.array([[7]])
    for seen in range(4, 9):
        dense, new = step(source, token, cache, seen)
        sparse, _ = step(path, token, cache, seen)
        off, _ = step(path, token, cache, seen, **{LEVEL: 0})
        assert np.abs(off - dense).max() < 1e-5
        changed = np.abs(sparse - dense).max() > 1e-3
        assert changed == (seen >= 6), f"position {seen}"
        cache = new
    assert len(ours) == 4


def test_prefill_alone(folder: Path) -> None:
    optimized(folder, "prefill.onnx", sparsity=0.5, dense_first=0)
    ids = np.random.default_rng(5).integers(0, VOCABULARY, (1, 9))
    dense, cache = step(folder / "model.onnx", ids, {}, 0)
    prefill, _ = step(folder / "prefill.onnx", ids, {}, 0)
    assert np.abs(prefill - dense).max() < 1e-5
    token = np.array([[7]])
    first, _ = step(folder / "prefill.onnx", token, {}, 0)
    assert np.abs(first - step(folder / "model.onnx", token, {}, 0)[0]).max() > 1e-3, (
        "a single token is no prefill"
    )
    with_cache, _ = step(folder / "prefill.onnx", token, cache, 9)
    assert np.abs(with_cache - step(folder / "model.onnx", token, cache, 9)[0]).max() > 1e-3


def test_quality_is_measured_as_if_every_token_skipped(folder: Path) -> None:
    data = [folder / "eval.npz"]
    guarded = optimized(folder, "a.onnx", sparsity=0.5, dense_first=6, eval_data=data).thresholds
    plain = optimized(folder, "b.onnx", sparsity=0.5, eval_data=data).thresholds
    assert [q.metric for q in plain.quality] == ["perplexity", "top1", "cosine"]
    assert guarded.quality == plain.quality and plain.quality[1].value < 1
    assert plain.measured and plain.share_skipped == pytest.approx(0.5, abs=0.05)


def test_a_budget_of_agreement(folder: Path) -> None:
    report = optimized(folder, "top1.onnx", budget="top1>=0.8", eval_data=[folder / "eval.npz"])
    quality = report.thresholds.quality
    assert [each.metric for each in quality] == ["top1", "perplexity", "cosine"]
    assert quality[0].kept and quality[0].value >= 0.8 and quality[0].tokens == 12 * 40
    assert quality[1].dense == pytest.approx(VOCABULARY, rel=1), "of random weights"


def test_the_original_and_the_result_verify_at_level_zero(folder: Path) -> None:
    optimized(folder, "v.onnx", sparsity=0.4)
    record = thresholds_of(io.load(folder / "v.onnx"))
    assert record is not None
    report = sparse_onnx.verify(folder / "model.onnx", folder / "v.onnx")
    assert report.verify is not None and report.verify.passed is False, (
        "at its level it differs, and verify says so"
    )
