"""Experts of integers that skip inputs or units: the opset that they need, and no branches."""

from __future__ import annotations

import dense_layers
import gated_after
import numpy as np
import onnx
import onnx_ir as ir
import pytest
from builders import Shape
from dense_layers import prepared
from gated_after import LEVEL, close
from harness import run_model
from quantized_blocks import Storage, quantized_model

from sparse_onnx.core.passes import Outcome
from sparse_onnx.optimize.watched import Dialled, check_layers
from sparse_onnx.passes.branch_experts import BranchExperts
from sparse_onnx.passes.fuse_gating import FuseGating
from sparse_onnx.passes.insert_thresholds import InsertThresholds

PLANS = {"gated": gated_after.plan_for, "inputs": dense_layers.plan_for}


def block(opset: int, separate: bool) -> ir.Model:
    """With one scale an expert, which opsets before 21 know, too."""
    shape = Shape(hidden=32, inner=64, separate=separate)
    return prepared(quantized_model(shape, Storage("int8", 0, 0, "none", opset)))


def feeds(tokens: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(tokens)
    return {
        "tokens": rng.standard_normal((tokens, 32)).astype(np.float32),
        "index": rng.integers(0, 4, (tokens, 2)),
        "weight": rng.random((tokens, 2)).astype(np.float32),
    }


@pytest.mark.parametrize("skipped", PLANS)
@pytest.mark.parametrize("separate", [False, True])
@pytest.mark.parametrize("opset", [18, 20, 21])
def test_the_model_becomes_as_new_as_the_operators(opset: int, separate: bool, skipped: str) -> None:
    model = block(opset, separate)
    outcome = InsertThresholds(PLANS[skipped](model, "native"))(model)
    assert isinstance(outcome, Outcome) and outcome.modified
    assert outcome.rewritten == (1 if skipped == "gated" else 2)
    assert model.opset_imports[""] == 21
    outcome = FuseGating()(model)
    assert isinstance(outcome, Outcome) and outcome.rewritten == 1
    onnx.checker.check_model(ir.to_proto(model), full_check=True)
    for tokens in (1, 20):
        plain = run_model(block(opset, separate), feeds(tokens))[0]
        [off] = Dialled(model, LEVEL)(feeds(tokens), 0)  # in which no product rounds activations
        assert close(plain, off, 1e-5)
    reached, _ = check_layers(model, LEVEL, 50, [feeds(20)], kernels=False)
    assert reached == 4 * (1 if skipped == "gated" else 3 if separate else 2)


@pytest.mark.parametrize("style", ["expert", "group"])
@pytest.mark.parametrize("skipped", PLANS)
def test_they_are_not_put_into_branches(skipped: str, style: str) -> None:
    for mode in ("native", "simulate"):
        model = block(21, True)
        InsertThresholds(PLANS[skipped](model, mode))(model)
        outcome = BranchExperts(style=style)(model)
        assert isinstance(outcome, Outcome)
        if mode == "native":
            [refusal] = outcome.refusals
            assert outcome.rewritten == 0 and "integers in a branch" in refusal.reason
            assert "grouped" in refusal.hint
        else:
            assert outcome.rewritten == 1 and not outcome.refusals
            run_model(model, feeds(5))
