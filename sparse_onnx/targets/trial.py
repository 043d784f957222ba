"""Runs a model once on a target: does it run, is it right, and does it lie on the provider as a whole?"""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping, Sequence

import numpy as np
import onnx_ir as ir

from sparse_onnx.core.errors import SparseOnnxError
from sparse_onnx.targets import session as sessions
from sparse_onnx.targets.placement import Placement, placed
from sparse_onnx.targets.profile import FormResult, TargetProfile

#: Accepted error relative to the largest value, by what the target computes in.
TOLERANCES = {"float32": 1e-4, "float16": 2e-2}


def attempt(
    model: ir.Model | str | os.PathLike[str],
    feeds: Sequence[Mapping[str, np.ndarray]],
    expected: Sequence[np.ndarray],
    target: TargetProfile,
    where: str,
    outside: Collection[str] = (),
) -> tuple[FormResult, Placement | None]:
    """
    Args:
        model: whose first output is compared.
        feeds: of one run each.
        expected: the first output of each run.
        target: the target.
        where: a place that runs it.
        outside: names of nodes that may run anywhere.

    Returns:
        The result, and where the nodes are, if the runtime tells.
    """
    try:
        session = sessions.create_session(model, threads=2, provider=where, record=True)
        actual = [sessions.run(session, dict(each))[0] for each in feeds]
        at = placed(session, target.provider)
    except SparseOnnxError as error:
        return FormResult(False, False, False, note=error.message[:200]), None
    wrong = [
        text for want, got in zip(expected, actual, strict=True) if (text := _difference(want, got, target))
    ]
    left = sorted({op for name, op in at.fallen(target.provider) if name not in outside}) if at else []
    return FormResult(True, not wrong, not left, tuple(left), wrong[0] if wrong else ""), at


def _difference(expected: np.ndarray, actual: np.ndarray, target: TargetProfile) -> str:
    if expected.shape != actual.shape:
        return f"shape {list(actual.shape)} instead of {list(expected.shape)}"
    scale = max(float(np.abs(expected).max(initial=0.0)), 1e-6)
    error = float(np.abs(actual.astype(np.float64) - expected).max(initial=0.0)) / scale
    return (
        f"relative error {error:.1e}"
        if not error <= (target.tolerance or TOLERANCES[target.precision])
        else ""
    )
