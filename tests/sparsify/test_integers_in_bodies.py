"""Layers and experts of integers in the bodies of If: refused where the integers lie outside, in the mode `native`."""

from __future__ import annotations

import dense_layers
import gated_after
import numpy as np
import onnx_ir as ir
import pytest
from builders import Shape
from dense_layers import prepared
from gated_models import Net, quantized, rows
from harness import run_model
from in_bodies import in_body
from quantized_blocks import Storage, quantized_model

from sparse_onnx.core.passes import Outcome
from sparse_onnx.passes.fuse_gating import FuseGating
from sparse_onnx.passes.insert_thresholds import InsertThresholds
from sparse_onnx.sparsify.plan import Mode
from sparse_onnx.sparsify.record import acting

PLANS = {"gated": gated_after.plan_for, "inputs": dense_layers.plan_for}


def after(model: ir.Model, skipped: str, mode: Mode) -> tuple[ir.Model, Outcome]:
    changed = prepared(model)
    outcome = InsertThresholds(PLANS[skipped](changed, mode))(changed)
    assert isinstance(outcome, Outcome)
    return changed, outcome


@pytest.mark.parametrize("skipped", PLANS)
@pytest.mark.parametrize("where", ["inside", "outside", "dequantized"])
@pytest.mark.parametrize("separate", [False, True])
def test_experts(skipped: str, where: str, separate: bool) -> None:
    rng = np.random.default_rng(0)
    feeds = {
        "tokens": rng.standard_normal((5, 32)).astype(np.float32),
        "index": rng.integers(0, 4, (5, 2)),
        "weight": np.ones((5, 2), np.float32),
        "c": np.array(True),
    }
    shape = Shape(hidden=32, inner=64, separate=separate)
    for mode in ("native", "simulate"):
        stored = ir.to_proto(quantized_model(shape, Storage("int8", 0, 0, "none", 21)))
        changed, outcome = after(in_body(stored, where, "tokens"), skipped, mode)
        refused = mode == "native" and where == "dequantized"
        assert outcome.modified != refused
        assert any("integers outside" in refusal.reason for refusal in outcome.refusals) == refused
        FuseGating()(changed)
        assert bool(acting(changed)) != refused
        result = run_model(changed, feeds)[0]  # without the kernels
        assert result.shape == (5, 32) and result.any()


@pytest.mark.parametrize("skipped", PLANS)
@pytest.mark.parametrize("where", ["inside", "outside"])
@pytest.mark.parametrize("bits", [4, 8])
def test_layers(skipped: str, where: str, bits: int) -> None:
    net = Net(width=32, units=64, layers=1)
    for mode in ("native", "simulate"):
        changed, outcome = after(in_body(quantized(net, bits, "nbits"), where, "x"), skipped, mode)
        refused = mode == "native" and where == "outside"
        assert outcome.modified != refused
        assert any("integers outside" in refusal.reason for refusal in outcome.refusals) == refused
        result = run_model(changed, rows(net, 5) | {"c": np.array(True)})[0]
        assert result.shape == (5, 32) and result.any()
