"""Compares what `optimize` makes with what it was made from, on the target where it can be run here."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from typing import Literal

import onnx_ir as ir

from sparse_onnx import targets
from sparse_onnx.core.collector import paused
from sparse_onnx.core.errors import ImpossibleError, VerificationError
from sparse_onnx.core.passes import Outcome
from sparse_onnx.core.report import VerifyRecord
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
from sparse_onnx.targets import places
from sparse_onnx.verify.api import available_memory
from sparse_onnx.verify.compare import TOLERANCES
from sparse_onnx.verify.inputs import Case, Size, sized_inputs
from sparse_onnx.verify.lowering import WHOLE_BYTES, default_threads, verify_lowering
from sparse_onnx.verify.routing import NEAR_TIE
from sparse_onnx.verify.whole import compare_whole

Verify = Literal["each", "final", "none"]

OUR_FAULT = "nothing was written; please report it, this is a fault of sparse-onnx"

#: What two sessions may need for each byte of weights.
_COPIES = 4
#: Inputs of a graph of one size: that many draws, and one for which all tokens are alike.
_DRAWS = 12


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
        self.where = places.place(profile) or places.CPU
        self.original: ir.Model | None = None
        self.skips = ""
        """The mode of the thresholds that were inserted."""
        self.fixed = False
        """Whether graphs of one size are made, which alone run on the target."""
        self.neutral: ir.Model | None = None
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
        where = places.CPU if self.fixed else self.where  # see `static`
        record, note = self._run(original, neutral, candidate, where, exact)
        if note and note not in self.notes:
            self.notes.append(note)
        if record.passed is None and self.skips:  # no blocks: layers are compared one by one, later
            return record
        if not record.passed:
            theirs = where != places.CPU and bool(
                self._run(original, neutral, candidate, places.CPU, exact)[0].passed
            )
            raise self._differs(what, where, record, theirs)
        return dataclasses.replace(record, on=None if where == places.CPU else places.described(where))

    def _run(
        self, original: ir.Model, neutral: ir.Model, model: ir.Model, where: str, exact: bool
    ) -> tuple[VerifyRecord, str]:
        tolerance, near_tie = self._tolerances(where)
        return verify_lowering(
            original,
            neutral,
            model,
            provider=where,
            tolerance=tolerance,
            near_tie=near_tie,
            progress=self.progress,
            entries=EXACT if exact else None,
            whole=bool(self.skips) and _fits(original),
        )

    def where_verified(self) -> list[str]:
        """What must be said where the target could not be tried."""
        if (
            self.when == "none"
            or self.profile.provider == places.CPU
            or places.place(self.profile) is not None
        ):
            return []
        needs = (
            self.profile.needs
            or f"its runtime: python -m sparse_onnx.targets.runtimes install {self.profile.runtime}"
        )
        return [
            f"{self.profile.provider} cannot be run here (it needs {needs}): compared on {places.CPU}, "
            "placed by the profile"
        ]

    def static(self, dynamic: ir.Model, model: ir.Model, what: str) -> VerifyRecord:
        """A graph of one size, on the target where it can be run, with the dynamic one, which was verified."""
        if self.when == "none":
            return VerifyRecord("none", None)
        if stats.weight_bytes(model) > WHOLE_BYTES:
            return VerifyRecord(
                "none", None, failure=f"not run: its weights are more than {WHOLE_BYTES >> 20} MiB"
            )
        if self.progress is not None:
            self.progress(f"verifying {what}")
        record = self._run_static(dynamic, model, what, self.where)
        if record.passed is False:
            elsewhere = self.where != places.CPU
            fault = elsewhere and self._run_static(dynamic, model, what, places.CPU).passed
            raise self._differs(what, self.where, record, theirs=bool(fault))
        return dataclasses.replace(
            record, on=None if self.where == places.CPU else places.described(self.where)
        )

    def _run_static(self, dynamic: ir.Model, model: ir.Model, what: str, where: str) -> VerifyRecord:
        tolerance, near_tie = self._tolerances(where)
        return compare_whole(
            dynamic,
            model,
            _draws(model),
            threads=default_threads(),
            provider=where,
            tolerance=tolerance,
            near_tie=near_tie,
            names=("the graph of any size", what),
            progress=self.progress,
            cover=False,
        )

    def _tolerances(self, where: str) -> tuple[float | None, float | None]:
        """Accepted error, and margin of a near-tie: what the target computes in decides how far from the CPU's results
        its own may be. None: as the model's type."""
        profile = self.profile
        if where == places.CPU or (profile.precision == "float32" and not profile.tolerance):
            return None, None
        return (
            profile.tolerance or TOLERANCES[profile.precision],
            max(profile.tolerance, NEAR_TIE[profile.precision]),
        )

    def _differs(self, what: str, where: str, record: VerifyRecord, theirs: bool) -> VerificationError:
        """`theirs`: the very same graph is right on the CPU, so that the target's kernels are at fault."""
        if not theirs:
            return VerificationError(
                f"{what} differs from its original{_on(where)}: {record.failure}", OUR_FAULT
            )
        return VerificationError(
            f"{self.profile.provider} ({places.described(where)}) gets {what} wrong, and {places.CPU} gets it right: "
            f"{record.failure}",
            "nothing was written; another size or --form may go round the fault",
        )


def _on(where: str) -> str:
    return "" if where == places.CPU else f" on {places.described(where)}"


def _draws(model: ir.Model) -> list[Case]:
    kinds = [*(("random", seed) for seed in range(_DRAWS)), ("one", _DRAWS)]
    return [
        Case(f"draw {seed}", Size(1, 1), sized_inputs(model, 1, 1, kind=kind, seed=seed))  # type: ignore[arg-type]
        for kind, seed in kinds
    ]


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
