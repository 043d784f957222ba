"""A model with a given plan of thresholds, as `optimize` would deploy it: its pipeline without its checks."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Literal

import onnx_ir as ir

from sparse_onnx import targets
from sparse_onnx.core.errors import ImpossibleError
from sparse_onnx.graph import io
from sparse_onnx.optimize import runner
from sparse_onnx.optimize.choose import choose
from sparse_onnx.passes import Phase
from sparse_onnx.passes.insert_thresholds import InsertThresholds
from sparse_onnx.sparsify.plan import Plan
from sparse_onnx.sparsify.record import thresholds_of


def write(source: Path, out: Path, plan: Plan | None, quantize: Literal["int8", "int4"] | None) -> None:
    """
    Raises:
        ImpossibleError: no layer can skip inputs.
    """
    profile = targets.get("cpu")
    settings: dict[str, dict[str, str]] = {}
    if quantize is not None:
        settings["quantize_experts"] = {"bits": quantize.removeprefix("int")}
    if plan is not None:
        settings["insert_thresholds"] = {}
    steps = [
        dataclasses.replace(step, run=dataclasses.replace(step.run, plan=plan))
        if plan is not None and isinstance(step.run, InsertThresholds)
        else step
        for step in runner.plan(profile.form_names, settings)
    ]
    model = io.load(source)

    def before(phase: Phase, model: ir.Model) -> None:
        if phase == "lower":
            choose(model, profile, None, {})

    result = runner.run(model, steps, before=before)
    if plan is not None and thresholds_of(model) is None:
        raise ImpossibleError(
            "no layer can skip inputs", "; ".join({each.reason for each in result.refusals})
        )
    io.save(model, out, weights="copy")
