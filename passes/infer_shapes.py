"""Types and shapes that the file leaves out, by onnx's inference, as far as that goes.

Exact: only annotations change. Enters subgraphs. Weights are not read. Refused: nothing.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import onnx_ir as ir

from sparse_onnx.core.passes import Outcome, Pass
from sparse_onnx.graph.infer import infer


@dataclasses.dataclass(frozen=True)
class InferShapes(Pass):
    __doc__ = __doc__
    name: ClassVar[str] = "infer_shapes"
    summary: ClassVar[str] = "types and shapes that the file leaves out"

    def call(self, model: ir.Model) -> Outcome:
        changed = infer(model)
        return Outcome(model, changed > 0, changed, changed)
