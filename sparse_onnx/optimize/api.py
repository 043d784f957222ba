"""`optimize`: recognise, lower for the target, verify, write."""

from __future__ import annotations

import dataclasses
import functools
import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Literal

import onnx_ir as ir

from sparse_onnx import targets
from sparse_onnx.blocks import neutral_blocks
from sparse_onnx.blocks.lowering import Form, want
from sparse_onnx.core.errors import UsageError, VerificationError
from sparse_onnx.core.report import Report, StaticRecord, TuningRecord, VerifyRecord
from sparse_onnx.graph import files, genai, io, stats
from sparse_onnx.graph.save import place
from sparse_onnx.graph.valid import invalid
from sparse_onnx.inspect.blocks import block_records
from sparse_onnx.optimize import fitting, runner, tuning_file
from sparse_onnx.optimize import static as fixed
from sparse_onnx.optimize.candidates import kinds
from sparse_onnx.optimize.checks import OUR_FAULT, Checks, Verify, require_dtypes
from sparse_onnx.optimize.choose import choose, parse_form
from sparse_onnx.optimize.placing import place_model, require_no_fallback
from sparse_onnx.optimize.prepacked import save_prepacked
from sparse_onnx.optimize.resident import note, residency
from sparse_onnx.optimize.tuning_file import TuningFile
from sparse_onnx.passes import Phase
from sparse_onnx.passes.fuse_moe_op import REQUIRES_KEY
from sparse_onnx.targets import machine
from sparse_onnx.targets.places import CPU
from sparse_onnx.verify.inputs import sized_inputs


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
    static: Sequence[Mapping[str, int]] = (),
    no_fallback: bool = False,
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
        static: sizes by axis, ``{"batch": 1, "sequence": 1}``, each for a graph without open sizes: the first is `out`,
            others go beside it and share its weights.
        no_fallback: nodes that the target's provider does not run are an error.
        progress: called with a line at each step.

    Raises:
        UsageError: unknown target, form, pass or option.
        ModelError: the model is unreadable, unsafe or broken.
        VerificationError: the result differs; nothing was written.
        ImpossibleError: the target cannot run the result, or not all of it where `no_fallback` asks for that.
    """
    if out is None and not dry_run:
        raise UsageError("no OUT given", "name the file to write, or ask for a dry run")
    if out is not None:
        place(out)
    profile = targets.get(target)
    asked = parse_form(form, profile)
    if asked is not None and (tune or tuning is not None):
        raise UsageError(f"form '{form}' leaves nothing to tune", "leave out --form, --tune or --tuning")
    if tune and profile.provider != CPU:
        raise UsageError(
            f"--tune measures on {CPU}, and target '{profile.name}' is {profile.provider}", "leave out --tune"
        )
    settings = {name: dict(chosen) for name, chosen in (passes or {}).items()}
    if quantize is not None:
        settings.setdefault("quantize_experts", {})["bits"] = quantize.removeprefix("int")
    planned = runner.plan(profile.form_names, settings, skip)
    measured = TuningFile(tuning) if tuning is not None else None
    if measured is not None and not tune and not measured.entries:
        raise UsageError(
            "the tuning file does not exist", "--tune measures and writes it", os.fspath(measured.path)
        )
    model = io.load(source)
    report = Report("optimize", target=profile.name, model=stats.record(model, os.fspath(source)))

    graphs = fixed.required(model, static, profile.name, profile.static)
    for sizes in graphs:
        fixed.specialise(model, sizes)  # what is wrong with them is said before anything is done
    checks = Checks(verify, profile, source, progress)
    checks.fixed = bool(graphs)

    def before(phase: Phase, model: ir.Model) -> None:
        if phase == "lower":
            found: dict[str, Form] = {}
            folder = Path(os.path.abspath(out if out is not None else source)).parent
            if asked is None and fitting.needed(profile):
                report.fitting = fitting.fit(
                    model, profile, planned, tokens=_tokens(graphs), folder=folder, progress=progress
                )
                found = fitting.chosen(report.fitting)
                report.notes += fitting.described(report.fitting, profile)
            if tune or measured is not None:
                report.tuning, measured_forms = _tuned(
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
                found = found | measured_forms
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
        require_dtypes(model, profile)
        _require_valid(model, source)
        report.verify = checks.finish(model)
        report.notes += [*result.notes, *checks.notes]
        if REQUIRES_KEY in model.metadata_props:
            report.notes.append(f"the result needs {model.metadata_props[REQUIRES_KEY]}")
        if _multiplies(model, ir.DataType.FLOAT16):
            report.notes.append(
                "float16 weights: the provider computes in float32, and keeps float32 copies of them"
            )
    report.blocks = block_records(model)
    report.notes += checks.where_verified()
    fixed_graphs = [fixed.specialise(model, sizes) for sizes in graphs]
    report.static = [
        StaticRecord(
            None if out is None else os.fspath(fixed.beside(Path(out), sizes, at == 0)),
            sizes,
            checks.static(graph, f"the graph of {fixed.named(sizes)}"),
            place_model(graph, profile, functools.partial(sized_inputs, graph, 1, 1), static=True),
        )
        for at, (sizes, graph) in enumerate(zip(graphs, fixed_graphs, strict=True))
    ] or None
    if report.static is not None:
        report.placement = report.static[0].placement
    else:
        report.placement = place_model(model, profile, functools.partial(sized_inputs, model, 1, 4))
    for placement in [report.placement, *(each.placement for each in report.static or ())]:
        if no_fallback:
            require_no_fallback(placement, profile)
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
    if graphs:
        fixed.save(out, graphs)
    report.output = stats.record(io.load(out), os.fspath(out))
    if resident is not None:
        report.notes.append(resident)
    carried = genai.carry(Path(source), Path(out))
    if carried is not None:
        report.notes.append(carried)
    if was_packed:
        report.notes.append("packed weights of the input are left out: --weights prepacked makes them again")
    return report


def _tokens(graphs: Sequence[Mapping[str, int]]) -> int | None:
    """Of one run of the first static graph, as far as its sizes tell; None where there is none."""
    if not graphs:
        return None
    return math.prod(size for name, size in graphs[0].items() if not re.search("past|total", name.lower()))


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


def _require_valid(model: ir.Model, source: str | os.PathLike[str]) -> None:
    """Before anything of the old model is replaced, whatever the user asked to be verified.

    A source that breaks a rule already (operators of ORT's that onnx does not know) is left to ORT to judge.
    """
    reason = invalid(model)
    if reason and not invalid(io.load(source)):
        raise VerificationError(f"the optimized model is not valid: {reason}", OUR_FAULT)


def _nothing_to_do(report: Report) -> str:
    if report.refusals:
        return f"nothing rewritten: {len(report.refusals)} refused, copied as it is (--explain says why)"
    return "nothing to do: no sparse block that this target runs better in another form"


def _multiplies(model: ir.Model, dtype: ir.DataType) -> bool:
    """Whether a matrix of that type is multiplied by as it is stored."""
    return any(
        value.dtype == dtype and any(use.node.op_type in ("Gemm", "MatMul") for use in value.uses())
        for graph in model.graphs()
        for value in graph.initializers.values()
    )
