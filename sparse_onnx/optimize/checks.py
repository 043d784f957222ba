"""When `optimize` compares what it made with what it was given."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Literal

import onnx_ir as ir

from sparse_onnx import targets
from sparse_onnx.core.collector import paused
from sparse_onnx.core.errors import ImpossibleError, VerificationError
from sparse_onnx.core.passes import Outcome
from sparse_onnx.core.report import PlacementRecord, VerifyRecord
from sparse_onnx.graph import io, stats
from sparse_onnx.graph.annotate import annotate
from sparse_onnx.optimize import runner
from sparse_onnx.optimize.watched import EXACT, unrounded
from sparse_onnx.passes import Phase
from sparse_onnx.passes.insert_thresholds import InsertThresholds
from sparse_onnx.passes.repair_cast_transpose import RepairCastTranspose
from sparse_onnx.passes.repair_scatter_add import RepairScatterAdd
from sparse_onnx.sparsify.dial import set_level
from sparse_onnx.sparsify.record import thresholds_of
from sparse_onnx.verify.api import available_memory
from sparse_onnx.verify.lowering import verify_lowering

#: What two sessions may need for each byte of weights.
_COPIES = 4

Verify = Literal["each", "final", "none"]

OUR_FAULT = "nothing was written; please report it, this is a fault of sparse-onnx"


class Checks:
    """Compares lowered models with what they were lowered from, at the times that the user asked for.

    Models that run whole are compared with the original itself; larger ones, block by block, with the neutral form
    that the exact passes before the lowering made of it.
    """

    def __init__(
        self,
        when: Verify,
        profile: targets.TargetProfile,
        source: str | os.PathLike[str],
        progress: Callable[[str], None] | None,
    ) -> None:
        self.when, self.profile, self.source, self.progress = when, profile, source, progress
        self.original: ir.Model | None = None
        self.skips = ""
        """The mode of the thresholds that were inserted."""
        self.neutral: ir.Model | None = None
        self.placement: list[PlacementRecord] | None = None
        self.notes: list[str] = []

    def before(self, phase: Phase, model: ir.Model) -> None:
        """Called before the first pass of each phase."""
        if phase == "lower" and self.when == "final":
            self.neutral = _copy(model)

    def after(self, phase: Phase, item: runner.Planned, model: ir.Model, outcome: Outcome) -> None:
        """Called behind each pass that changed the model."""
        del outcome
        inserted = isinstance(item.run, InsertThresholds)
        record = thresholds_of(model) if inserted else None
        if record is not None:  # where nothing is skipped, the model is what it was
            set_level(model, record.level_input, 0)
            self.skips = record.mode
        if self.when == "none" or phase == "finish":
            return
        if self.when == "each" and (phase != "sparsify" or inserted):
            require_dtypes(model, self.profile)
            self._compare(model, f"the model behind pass '{item.step.name}'")
        if phase == "sparsify" or (phase != "lower" and self.when == "each"):
            self.neutral = _copy(model)
        if phase == "sparsify" and not inserted:  # a lossy step is measured against its budget, not here
            self.original = self.neutral

    def finish(self, model: ir.Model) -> VerifyRecord:
        if self.when == "none":
            return VerifyRecord("none", None)
        return self._compare(model, "the optimized model")

    def _compare(self, model: ir.Model, what: str) -> VerifyRecord:
        if self.progress is not None:
            self.progress(f"verifying {what}")
        if self.original is None:  # read again rather than copied: most models need neither
            self.original = _reference(self.source)
        original, neutral, candidate = self.original, self.neutral or self.original, model
        # Layers that skip inputs do not round them to 8 bits, as products of integers do on request.
        exact = self.skips not in ("", "simulate")
        if exact:
            original, neutral, candidate = (unrounded(each) for each in (original, neutral, candidate))
        record, note = verify_lowering(
            original,
            neutral,
            candidate,
            provider=self.profile.provider,
            progress=self.progress,
            entries=EXACT if exact else None,
            whole=bool(self.skips) and _fits(original),
        )
        if note and note not in self.notes:
            self.notes.append(note)
        alone = record.passed is None and bool(self.skips)  # no blocks: layers are compared one by one, later
        if not record.passed and not alone:
            raise VerificationError(f"{what} differs from its original: {record.failure}", OUR_FAULT)
        self.placement = [PlacementRecord(self.profile.provider, stats.node_count(model))]
        return record


def _fits(model: ir.Model) -> bool:
    """Whether two such models run in memory, with packed copies of their weights."""
    free = available_memory()
    return free is not None and _COPIES * stats.weight_bytes(model) < free


def _reference(source: str | os.PathLike[str]) -> ir.Model:
    """The model as it was, as ORT can load it and gets it right."""
    model = io.load(source)
    with paused():
        annotate(model)
        _repair(model)
    return model


def _copy(model: ir.Model) -> ir.Model:
    """The model in neutral form, as ORT can load it and gets it right."""
    with paused():
        copy = model.clone()
        _repair(copy)
    return copy


def _repair(model: ir.Model) -> None:
    """Repairs what ORT computes wrongly, or does not load."""
    RepairScatterAdd()(model)
    RepairCastTranspose()(model)


def require_dtypes(model: ir.Model, profile: targets.TargetProfile) -> None:
    """Refuses types that the target cannot compute with."""
    if "bfloat16" not in profile.dtypes and _holds(model, ir.DataType.BFLOAT16):
        raise ImpossibleError(
            f"target '{profile.name}' has no bfloat16 arithmetic, and the model has bfloat16 weights",
            "export with --dtype float32 or --dtype float16",
        )


def _holds(model: ir.Model, dtype: ir.DataType) -> bool:
    return any(value.dtype == dtype for graph in model.graphs() for value in graph.initializers.values())
