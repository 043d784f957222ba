"""`optimize`: recognise, lower for the target, verify, write."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Literal

import onnx_ir as ir

from sparse_onnx import targets
from sparse_onnx.blocks import neutral_blocks
from sparse_onnx.blocks.lowering import Form, want
from sparse_onnx.core.collector import paused
from sparse_onnx.core.errors import ImpossibleError, UsageError, VerificationError
from sparse_onnx.core.passes import Outcome
from sparse_onnx.core.report import PlacementRecord, Report, TuningRecord, VerifyRecord
from sparse_onnx.graph import files, genai, io, stats
from sparse_onnx.graph.annotate import annotate
from sparse_onnx.graph.save import place
from sparse_onnx.graph.valid import invalid
from sparse_onnx.inspect.blocks import block_records
from sparse_onnx.optimize import runner, tuning_file
from sparse_onnx.optimize.candidates import kinds
from sparse_onnx.optimize.choose import choose, parse_form
from sparse_onnx.optimize.prepacked import save_prepacked
from sparse_onnx.optimize.resident import note, residency
from sparse_onnx.optimize.tuning_file import TuningFile
from sparse_onnx.passes import Phase
from sparse_onnx.passes.fuse_moe_op import REQUIRES_KEY
from sparse_onnx.passes.repair_cast_transpose import RepairCastTranspose
from sparse_onnx.passes.repair_scatter_add import RepairScatterAdd
from sparse_onnx.targets import machine
from sparse_onnx.verify.lowering import verify_lowering

Verify = Literal["each", "final", "none"]

_OUR_FAULT = "nothing was written; please report it, this is a fault of sparse-onnx"


def optimize(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str] | None,
    *,
    target: str = "cpu",
    form: str = "auto",
    passes: Mapping[str, Mapping[str, str]] | None = None,
    skip: Sequence[str] = (),
    weights: Literal["auto", "link", "copy", "prepacked"] = "auto",
    verify: Verify = "final",
    dry_run: bool = False,
    quantize: Literal["int4", "int8"] | None = None,
    tune: bool = False,
    tokens: Sequence[int] = (1, 64),
    threads: int | None = None,
    tuning: str | os.PathLike[str] | None = None,
    progress: Callable[[str], None] | None = None,
) -> Report:
    """Rewrites a model so that the target neither computes nor reads what is not active.

    Args:
        source: the model.
        out: where the result goes; may be `source`. Nothing appears there unless everything succeeded.
        target: a target's name.
        form: `auto` (the target's profile decides) or one of the forms that the target takes.
        passes: options by pass name; a pass of others that is named here runs at the end of the lowering.
        skip: passes that do not run.
        weights: `link` (name the weights where they lie), `copy`, `auto` (link where possible), or `prepacked` (copy,
            with what the kernels of this ORT and processor make of them, so that sessions keep no copies).
        verify: compare the result with the model in neutral form: once (`final`), after each pass, or not at all.
        dry_run: do everything but write.
        quantize: store the experts' weights in 4 or 8 bits, a lossy step; its options by the pass `quantize_experts`.
        tune: measure the forms that the target takes here, and give each block the fastest.
        tokens: token counts that tuning measures at, all equally important.
        threads: of the sessions that tuning measures; None takes all processors.
        tuning: a file of measurements: with `tune` they are kept there, without it they decide.
        progress: called with a line at each step.

    Raises:
        UsageError: unknown target, form, pass or option.
        ModelError: the model is unreadable, unsafe or broken.
        VerificationError: the result differs; nothing was written.
        ImpossibleError: the target cannot run the result.
    """
    if out is None and not dry_run:
        raise UsageError("no OUT given", "name the file to write, or ask for a dry run")
    if out is not None:
        place(out)
    profile = targets.get(target)
    asked = parse_form(form, profile)
    if asked is not None and (tune or tuning is not None):
        raise UsageError(f"form '{form}' leaves nothing to tune", "leave out --form, --tune or --tuning")
    settings = {name: dict(chosen) for name, chosen in (passes or {}).items()}
    if quantize is not None:
        settings.setdefault("quantize_experts", {})["bits"] = quantize.removeprefix("int")
    planned = runner.plan(profile.forms, settings, skip)
    measured = TuningFile(tuning) if tuning is not None else None
    if measured is not None and not tune and not measured.entries:
        raise UsageError(
            "the tuning file does not exist", "--tune measures and writes it", os.fspath(measured.path)
        )
    model = io.load(source)
    report = Report("optimize", target=profile.name, model=stats.record(model, os.fspath(source)))

    checks = _Checks(verify, profile, source, progress)

    def before(phase: Phase, model: ir.Model) -> None:
        if phase == "lower":
            found: dict[str, Form] = {}
            if tune or measured is not None:
                folder = Path(os.path.abspath(out if out is not None else source)).parent
                report.tuning, found = _tuned(
                    model,
                    profile,
                    planned,
                    tune,
                    measured,
                    tokens,
                    threads or machine.cores(),
                    folder,
                    progress,
                )
            report.notes += choose(model, profile, asked, found)
        checks.before(phase, model)

    result = runner.run(model, planned, checks.after, progress, before)
    for block in neutral_blocks(model):
        want(block.node, [])
    report.passes, report.refusals = result.records, result.refusals
    if not result.changed:
        model = io.load(source)
        report.verify = VerifyRecord("none", None)
        report.notes.append(_nothing_to_do(report))
    else:
        _require_dtypes(model, profile)
        _require_valid(model, source)
        report.verify = checks.finish(model)
        report.placement = checks.placement
        report.notes += [*result.notes, *checks.notes]
        if REQUIRES_KEY in model.metadata_props:
            report.notes.append(f"the result needs {model.metadata_props[REQUIRES_KEY]}")
        if _multiplies(model, ir.DataType.FLOAT16):
            report.notes.append(
                "float16 weights: the provider computes in float32, and keeps float32 copies of them"
            )
    report.blocks = block_records(model)
    if dry_run:
        report.notes.append("dry run: nothing written")
        report.notes += [f"{item.step.phase}: {item.step.name} - {item.reason}" for item in planned]
        return report
    assert out is not None
    if progress is not None:
        progress(f"writing {os.fspath(out)}")
    found = residency(model)
    was_packed = weights != "prepacked" and files.mentions(Path(source), "prepacked_0")
    if weights == "prepacked":
        packed = save_prepacked(model, out, progress=progress)
        resident = note(found, packed.packed_bytes)
    else:
        io.save(model, out, weights=weights)
        resident = note(found)
    report.output = stats.record(io.load(out), os.fspath(out))
    if resident is not None:
        report.notes.append(resident)
    carried = genai.carry(Path(source), Path(out))
    if carried is not None:
        report.notes.append(carried)
    if was_packed:
        report.notes.append("packed weights of the input are left out: --weights prepacked makes them again")
    return report


def _tuned(
    model: ir.Model,
    profile: targets.TargetProfile,
    planned: Sequence[runner.Planned],
    tune: bool,
    file: TuningFile | None,
    tokens: Sequence[int],
    threads: int,
    folder: Path,
    progress: Callable[[str], None] | None,
) -> tuple[TuningRecord, dict[str, Form]]:
    """The form of each block, measured here or read from the file."""
    from sparse_onnx.optimize import tune as tuner

    if tune:
        environment = tuning_file.environment(threads)
        usable = file is not None and file.fits(environment)
        found = tuner.measure(
            model,
            profile,
            planned,
            tokens=tokens,
            threads=threads,
            folder=folder,
            known=lambda kind: file.get(kind, tokens) if file is not None and usable else None,
            progress=progress,
        )
        if file is not None:
            file.save(found, environment)
        source = None
    else:
        assert file is not None
        found, source = [], os.fspath(file.path)
        for kind in kinds(model):
            entry = file.get(kind)
            if entry is None:
                raise UsageError(
                    f"no measurement of blocks such as '{kind.names[0]}'",
                    "--tune adds it to the file",
                    source,
                )
            found.append(entry)
        tokens = sorted({count for item in found for row in item.ratios.values() for count in row})
        threads = int(file.environment.get("threads", threads))
    record = tuner.record(found, tokens, threads, source)
    if file is not None and not tune:
        record = dataclasses.replace(record, processor=str(file.environment.get("processor", "unknown")))
    return record, {name: item.chosen for item in found for name in item.kind.names}


def _require_dtypes(model: ir.Model, profile: targets.TargetProfile) -> None:
    if "bfloat16" not in profile.dtypes and _holds(model, ir.DataType.BFLOAT16):
        raise ImpossibleError(
            f"target '{profile.name}' has no bfloat16 arithmetic, and the model has bfloat16 weights",
            "export with --dtype float32 or --dtype float16",
        )


def _require_valid(model: ir.Model, source: str | os.PathLike[str]) -> None:
    """Before anything of the old model is replaced, whatever the user asked to be verified.

    A source that breaks a rule already (operators of ORT's that onnx does not know) is left to ORT to judge.
    """
    reason = invalid(model)
    if reason and not invalid(io.load(source)):
        raise VerificationError(f"the optimized model is not valid: {reason}", _OUR_FAULT)


def _nothing_to_do(report: Report) -> str:
    if report.refusals:
        return f"nothing rewritten: {len(report.refusals)} refused, copied as it is (--explain says why)"
    return "nothing to do: no sparse block that this target runs better in another form"


def _holds(model: ir.Model, dtype: ir.DataType) -> bool:
    return any(value.dtype == dtype for graph in model.graphs() for value in graph.initializers.values())


def _multiplies(model: ir.Model, dtype: ir.DataType) -> bool:
    """Whether a matrix of that type is multiplied by as it is stored."""
    return any(
        value.dtype == dtype and any(use.node.op_type in ("Gemm", "MatMul") for use in value.uses())
        for graph in model.graphs()
        for value in graph.initializers.values()
    )


class _Checks:
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
        if self.when == "none" or phase == "finish":
            return
        if self.when == "each" and phase != "sparsify":
            _require_dtypes(model, self.profile)
            self._compare(model, f"the model behind pass '{item.step.name}'")
        if phase == "sparsify" or (phase != "lower" and self.when == "each"):
            self.neutral = _copy(model)
        if phase == "sparsify":  # a lossy step is measured against its budget, not here
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
        record, note = verify_lowering(
            self.original,
            self.neutral or self.original,
            model,
            provider=self.profile.provider,
            progress=self.progress,
        )
        if note and note not in self.notes:
            self.notes.append(note)
        if not record.passed:
            raise VerificationError(f"{what} differs from its original: {record.failure}", _OUR_FAULT)
        self.placement = [PlacementRecord(self.profile.provider, stats.node_count(model))]
        return record


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
    RepairScatterAdd()(model)
    RepairCastTranspose()(model)
