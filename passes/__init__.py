"""The rewrites, one a file, and the order in which `optimize` runs them."""

from __future__ import annotations

import dataclasses
from typing import Literal

Phase = Literal["prepare", "recognise", "sparsify", "lower", "finish"]
PHASES: tuple[Phase, ...] = ("prepare", "recognise", "sparsify", "lower", "finish")


@dataclasses.dataclass(frozen=True)
class Step:
    """One step of the pipeline.

    `name` is a registered pass, or `onnx_ir:CLASS` of onnx-ir's common passes. `forms` limits a lowering to the
    targets and blocks that take that form; empty means always.
    """

    phase: Phase
    name: str
    reason: str
    forms: tuple[str, ...] = ()


PIPELINE: tuple[Step, ...] = (
    Step(
        "prepare",
        "onnx_ir:InlinePass",
        "a block inside a model-local function cannot have weights of its own",
    ),
    Step("prepare", "onnx_ir:NameFixPass", "nodes are named in reports, and names must be told apart"),
    Step("prepare", "onnx_ir:LiftConstantsToInitializersPass", "weights may be written as Constant nodes"),
    Step("prepare", "onnx_ir:ShapeInferencePass", "the number of a token's experts and the types of a block"),
    Step("prepare", "name_blocks", "an inlined function leaves the same name on each copy of its blocks"),
    Step("lower", "fuse_gating", "neutral blocks into the dispatch that ORT runs best", forms=("grouped",)),
    Step("finish", "onnx_ir:RemoveUnusedNodesPass", "what only a rewritten block read"),
    Step("finish", "onnx_ir:RemoveUnusedFunctionsPass", "bodies of neutral operators that are all lowered"),
    Step("finish", "onnx_ir:RemoveUnusedOpsetsPass", "the domain of those operators"),
)
