"""Statistics of gates: what numpy says of the same rows, for layers and for experts."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from builders import Shape, expert_weights, layered_model, save_external
from gated_models import Net, activation, gated_model, numbers

import sparse_onnx
from sparse_onnx.core.calibration import SPARSITIES
from sparse_onnx.core.calibration_file import read_calibration


@pytest.mark.parametrize("activation_name", ["silu", "relu"])
def test_a_layer_is_what_numpy_says(activation_name: str, tmp_path: Path) -> None:
    net = Net(layers=1, activation=activation_name)
    onnx.save(gated_model(net), tmp_path / "in.onnx")
    x = np.random.default_rng(0).standard_normal((1000, net.width)).astype(np.float32)
    np.savez(tmp_path / "train.npz", x=x)
    found = sparse_onnx.calibrate(
        tmp_path / "in.onnx", tmp_path / "train.npz", tmp_path / "calib.json", threads=1
    )
    assert read_calibration(tmp_path / "calib.json") == found
    [record] = found.gated
    assert record.weights == tuple(f"layers.0.{role}.weight" for role in ("gate", "up", "down"))
    assert (record.activation, record.rows, record.tokens, record.block) == ("layers.0.a", 72, 1000, "")
    assert record.bytes == 2 * 72 * 32 * 4
    every = {name: array.astype(np.float64) for name, array in numbers(net).items()}
    n = (x - x.mean(axis=1, keepdims=True)) / np.sqrt(x.var(axis=1, keepdims=True) + 1e-5)
    a = activation(net.activation, n @ every["layers.0.gate"] + every["layers.0.gate.bias"])
    h = a * (n @ every["layers.0.up"] + every["layers.0.up.bias"])
    assert record.zeros == pytest.approx((a == 0).mean(), abs=1e-4)
    seen, held = slice(0, 800), slice(800, 1000)  # the last fifth of a single run is held out
    taus = np.quantile(np.abs(a[seen]), np.linspace(0, 1, 101))
    assert np.allclose(record.quantiles["zero"], taus, rtol=1e-4, atol=1e-6)
    down = every["layers.0.down"]
    results = h[held] @ down
    sizes = np.sqrt((results**2).sum(axis=1))
    largest = np.maximum(sizes, np.median(sizes))[:, None]  # a row counts no more than the median's
    for share, error in zip(SPARSITIES, record.errors["zero"], strict=True):
        tau = taus[round(share * 100)]
        lost = np.where(np.abs(a[held]) <= (tau if share else -1), h[held], 0) @ down
        levelled = np.linalg.norm(lost / largest) / np.linalg.norm(results / largest)
        assert error == pytest.approx(levelled, rel=0.02, abs=1e-5)


@pytest.mark.parametrize("separate", [False, True])
def test_experts_are_measured_each_by_its_own_gate(separate: bool, tmp_path: Path) -> None:
    shape = Shape(experts=3, top_k=3, hidden=16, inner=40, separate=separate)
    save_external(layered_model(shape, layers=1), tmp_path / "in.onnx")
    x = np.random.default_rng(0).standard_normal((800, 16)).astype(np.float32)
    np.savez(tmp_path / "train.npz", x=x)
    found = sparse_onnx.calibrate(tmp_path / "in.onnx", tmp_path / "train.npz", threads=1)
    [record] = found.gated
    assert (record.name, record.block, record.activation) == (
        "layers.0.experts.gated",
        "layers.0.experts",
        None,
    )
    assert record.tokens == 2400 and record.bytes == 3 * 2 * 40 * 16 * 4
    weights = expert_weights(shape, np.random.default_rng(0))
    gate = weights["gate"] if separate else weights["fc1"][:, :40]
    a = np.concatenate([activation("silu", x @ each.T) for each in gate])
    assert np.allclose(
        record.quantiles["zero"][20:90], np.quantile(np.abs(a), np.arange(20, 90) / 100), rtol=0.06
    )
    errors = record.errors["zero"]
    assert errors[0] == 0 and list(errors) == sorted(errors) and 0.05 < errors[10] < 0.5


@pytest.mark.parametrize("changed", [{"limit": 0.7}, {"beta": 1.0}, {"gate_layout": 2}, {"gate_layout": 0}])
def test_experts_that_are_not_a_gate_times_up_are_left_out(changed: dict, tmp_path: Path) -> None:
    save_external(layered_model(Shape(**changed), layers=1), tmp_path / "in.onnx")
    np.savez(tmp_path / "train.npz", x=np.random.default_rng(0).standard_normal((50, 16)).astype(np.float32))
    assert sparse_onnx.calibrate(tmp_path / "in.onnx", tmp_path / "train.npz", threads=1).gated == ()
