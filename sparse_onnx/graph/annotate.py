"""Types and shapes that a file leaves out."""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.passes import common

from sparse_onnx.graph.infer import infer


def annotate(model: ir.Model) -> None:
    """Infers them as far as that goes, constants lifted to where they are looked for. The model computes the same."""
    common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    infer(model)
