"""Models of gated layers with thresholds in them, as the pass leaves them."""

from __future__ import annotations

import copy

import numpy as np
import onnx
import onnx_ir as ir
from dense_layers import prepared

from sparse_onnx.core.passes import Outcome
from sparse_onnx.passes.insert_thresholds import InsertThresholds
from sparse_onnx.sparsify.gated_sites import gated_sites
from sparse_onnx.sparsify.plan import Mode, Plan, SitePlan

LEVEL = "sparsity_level"
TABLE = np.concatenate([[-1.0], np.linspace(0, 1, 100)])


def plan_for(model: ir.Model, mode: Mode, level: int = 50, least: float = 0.0) -> Plan:
    """Thresholds that are TABLE, plus a tenth a site."""
    names = [site.name for site in gated_sites(model).found]
    plans = {
        name: SitePlan(
            name, np.zeros(1, np.float32), np.where(TABLE < 0, -1, TABLE + at / 10), (TABLE >= 0) * 0.5
        )
        for at, name in enumerate(names)
    }
    return Plan(plans, level, mode, False, least, True)


def after(model: onnx.ModelProto, mode: Mode) -> tuple[ir.Model, Outcome]:
    changed = prepared(ir.from_proto(copy.deepcopy(model)))
    outcome = InsertThresholds(plan_for(changed, mode))(changed)
    assert isinstance(outcome, Outcome)
    onnx.checker.check_model(ir.to_proto(changed), full_check=True)
    return changed, outcome


def close(wanted: np.ndarray, actual: np.ndarray, tolerance: float) -> bool:
    return bool(np.abs(actual.astype(np.float64) - wanted).max() <= tolerance * np.abs(wanted).max())
