"""`optimize`: recognise, lower for the target, verify, write."""

from __future__ import annotations

import contextlib
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
from sparse_onnx.core.errors import ImpossibleError, UsageError, VerificationError
from sparse_onnx.core.report import Refusal, Report, StaticRecord, VerifyRecord
from sparse_onnx.graph import files, genai, io, stats
from sparse_onnx.graph.save import place
from sparse_onnx.graph.valid import invalid
from sparse_onnx.inspect.blocks import block_records
from sparse_onnx.optimize import fitting, runner
from sparse_onnx.optimize import static as fixed
from sparse_onnx.optimize.checks import OUR_FAULT, Checks, Verify, require_dtypes
from sparse_onnx.optimize.choose import choose, parse_form
from sparse_onnx.optimize.materialised import materialised
from sparse_onnx.optimize.placing import place_model, require_no_fallback
from sparse_onnx.optimize.prepacked import save_prepacked
from sparse_onnx.optimize.request import request
from sparse_onnx.optimize.resident import note, residency
from sparse_onnx.optimize.thresholds import Thresholds
from sparse_onnx.optimize.tuned import tuned
from sparse_onnx.optimize.tuning_file import TuningFile
from sparse_onnx.passes import Phase
from sparse_onnx.passes.fuse_moe_op import REQUIRES_KEY
from sparse_onnx.passes.insert_thresholds import InsertThresholds
from sparse_onnx.sparsify.plan import Plan
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
    thresholds: str | os.PathLike[str] | None = None,
    budget: str | None = None,
    sparsity: float | None = None,
    eval_data: Sequence[str | os.PathLike[str]] = (),
    method: str = "scap",
    allocation: str = "blocks",
    threshold_mode: str = "native",
    dense_first: int | None = None,
    tokenizer: str | os.PathLike[str] | None = None,
    prefill: str = "shared",
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
        thresholds: what `calibrate` measured of the model: layers skip inputs near a centre, a lossy step.
        budget: the quality that thresholds must keep, as `perplexity<=2%`; see `optimize.quality`.
        sparsity: or the share of the bytes of linear weights that they are to skip.
        eval_data: files that calibration has not seen, which quality and sparsity are measured on.
        method: of the thresholds: `scap`, `teal`, `topk`, `relu` or `cats`.
        allocation: over layers: `blocks` that skip alike, within them by error for bytes; `greedy` over all; `uniform`.
        threshold_mode: `native`, `gather` or `simulate`.
        dense_first: so many first positions, and all of prefill, skip nothing; None: every token skips.
        tokenizer: of `eval_data`, where none lies beside the model.
        prefill: `shared` (the thresholded layers compute runs of many rows, too) or `copy` (layers that round their
            inputs to 8 bits keep their own weights for those, as they were).
        static: sizes by axis, ``{"batch": 1, "sequence": 1}``, each for a graph without open sizes: the first is `out`,
            others go beside it and share its weights.
        no_fallback: nodes that the target's provider does not run are an error.
        progress: called with a line at each step.

    Raises:
        UsageError: unknown target, form, pass or option.
        ModelError: the model is unreadable, unsafe or broken.
        VerificationError: the result differs, or misses its budget; nothing was written.
        ImpossibleError: the target cannot run the result, or not all of it where `no_fallback` asks for that; or so
            much cannot be skipped.
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
    skipping = None
    if thresholds is not None:
        skipping = request(
            thresholds,
            budget=budget,
            sparsity=sparsity,
            evaluation=eval_data,
            method=method,
            allocation=allocation,
            mode=threshold_mode,
            dense_first=dense_first,
            tokenizer=tokenizer,
            prefill=prefill,
        )
        settings.setdefault("insert_thresholds", {})
        if profile.provider != CPU:  # nothing else loads the kernel of the form `gathered`
            settings.setdefault("gather_experts", {}).setdefault("thresholds", "false")
    elif any(given is not None for given in (budget, sparsity, dense_first, tokenizer)) or (
        tuple(eval_data),
        method,
        allocation,
        threshold_mode,
        prefill,
    ) != ((), "scap", "blocks", "native", "shared"):
        raise UsageError("thresholds come from a calibration", "--thresholds CALIB.json names it")
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
    skips = None
    if skipping is not None:
        assert report.model is not None and report.model.fingerprint is not None
        skips = Thresholds(skipping, io.load(source), source, report.model.fingerprint, threads, progress)

    def build(copy: ir.Model, plan: Plan) -> None:
        """A copy at the beginning of the lossy steps, as it will be deployed but for the plan."""
        steps = [
            _with_plan(item, plan) for item in planned if item.step.phase in ("sparsify", "lower", "finish")
        ]
        runner.run(copy, steps, before=lambda phase, each: _chosen(phase, each, profile, asked))

    def before(phase: Phase, model: ir.Model) -> None:
        if phase == "sparsify" and skips is not None:
            plan = skips.choose(model, build)
            planned[:] = [_with_plan(item, plan) for item in planned]
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
                asked_threads = threads or machine.cores()
                with contextlib.nullcontext() if skips is None else skips.turned(model):
                    report.tuning, measured_forms = tuned(
                        model, profile, planned, tune, measured, tokens, asked_threads, folder, progress
                    )
                found = found | measured_forms
            report.notes += choose(model, profile, asked, found)
        checks.before(phase, model)

    result = runner.run(model, planned, checks.after, progress, before)
    for block in neutral_blocks(model):
        want(block.node, [])
    report.passes, report.refusals = result.records, result.refusals
    if not result.changed:
        if skips is not None:
            raise ImpossibleError("no layer can skip inputs", _first_reason(report.refusals))
        model = io.load(source)
        report.verify = VerifyRecord("none", None)
        report.notes.append(_nothing_to_do(report))
    else:
        require_dtypes(model, profile)
        _require_valid(model, source)
        with materialised(model) if skips is not None else contextlib.nullcontext(model) as runnable:
            report.verify = checks.finish(runnable)
            if skips is not None:
                report.thresholds, notes = skips.finish(
                    runnable, verify != "none", whole=report.verify.method == "whole"
                )
                report.notes += notes
        if skips is not None:
            skips.set(model)
            if report.verify.passed is None and skips.all_compared:
                each = f"each of {skips.compared} thresholded layers, and no more than these"
                report.verify = VerifyRecord("blocks", True, inputs=[each])
        report.notes += [*result.notes, *checks.notes]
        if REQUIRES_KEY in model.metadata_props:
            report.notes.append(f"the result needs {model.metadata_props[REQUIRES_KEY]}")
        if _multiplies(model, ir.DataType.FLOAT16):
            report.notes.append(
                "float16 weights: the provider computes in float32, and keeps float32 copies of them"
            )
    report.blocks = block_records(model)
    if report.verify.passed is not None:
        report.notes += checks.where_verified()
    fixed_graphs = [fixed.specialise(model, sizes) for sizes in graphs]
    report.static = [
        StaticRecord(
            None if out is None else os.fspath(fixed.beside(Path(out), sizes, at == 0)),
            sizes,
            checks.static(model, graph, f"the graph of {fixed.named(sizes)}"),
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


def _first_reason(refusals: Sequence[Refusal]) -> str:
    own = [refusal.reason for refusal in refusals if refusal.by == InsertThresholds.name]
    return own[-1] if own else ""


def _with_plan(item: runner.Planned, plan: Plan) -> runner.Planned:
    if isinstance(item.run, InsertThresholds):
        return dataclasses.replace(item, run=dataclasses.replace(item.run, plan=plan))
    return item


def _chosen(phase: Phase, model: ir.Model, profile: targets.TargetProfile, asked: Form | None) -> None:
    if phase == "lower":
        choose(model, profile, asked, {})


def _tokens(graphs: Sequence[Mapping[str, int]]) -> int | None:
    """Of one run of the first static graph, as far as its sizes tell; None where there is none."""
    if not graphs:
        return None
    return math.prod(size for name, size in graphs[0].items() if not re.search("past|total", name.lower()))


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
