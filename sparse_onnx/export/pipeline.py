"""The steps of an export, from a loaded module to a verified file."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
import torch

from sparse_onnx import blocks
from sparse_onnx.core.errors import ModelError, UsageError, VerificationError
from sparse_onnx.core.report import Report, VerifyRecord
from sparse_onnx.export import (
    adapters,
    attempts,
    block_check,
    calls,
    check,
    experts,
    operator_types,
    past,
    planning,
    recognised,
    samples,
    sixteen,
    trace,
    translate,
    twin,
)
from sparse_onnx.export.checkpoint.stored import is_stored
from sparse_onnx.export.failure import first_line
from sparse_onnx.export.sources import Source
from sparse_onnx.graph import io, stats
from sparse_onnx.inspect.blocks import block_records
from sparse_onnx.inspect.hazards import hazards
from sparse_onnx.passes.repair_cast_transpose import RepairCastTranspose
from sparse_onnx.passes.repair_scatter_add import RepairScatterAdd
from sparse_onnx.verify.compare import TOLERANCES


def run(
    source: Source,
    out: Path,
    folder: Path,
    *,
    opset: int,
    say: Callable[[str], None],
    given: Sequence[adapters.Named] = (),
    link: bool = False,
) -> Report:
    """Traces, checks, and puts the result at `out`; `folder` is scratch space on the same file system, `given` the
    user's adapters. `link`: weights that a checkpoint stores as the graph wants them stay in its files.

    Raises:
        ImpossibleError, VerificationError: as `sparse_onnx.export` says; nothing is at `out` then.
    """
    if isinstance(source, past.CrossSource) and source.encoder_path is None:
        from sparse_onnx.export.past import pair  # which uses the steps below

        return pair.run(source, out, folder, opset=opset, say=say, given=given)
    if is_stored(source.module):
        from sparse_onnx.export.checkpoint import streamed  # which uses the steps below

        if given:
            raise UsageError(
                "adapters cannot be tried on weights that stay in their files",
                "leave out --stream, or --adapter",
            )
        return streamed.run(source, out, folder, opset=opset, link=link, say=say)
    calls.refuse_memory(source)
    say("finding experts")
    # Tried without a cache, which a second call would find filled.
    plain = source.plain if isinstance(source, past.PastSource) and source.plain else source
    adapted = adapters.adapt(plain, given, share=source.owned)
    with adapted.in_place(source) as replaced:
        found = experts.find(replaced.module)
        notes = [*source.notes, *adapted.notes, *about(found)]
        say("tracing")
        traced, plan, plan_notes = attempts.trace(replaced, found, opset)
    notes += plan_notes
    half = half_type(source)
    narrow = traced.model
    wide = narrow.clone() if half else None  # before constants are folded, and so rounded, in half precision
    say("writing")
    path = _finished(narrow, traced.symbols, found, folder / out.name)
    say("comparing each expert")
    block_check.compare_blocks(path, found)
    if half is None or wide is None:
        alongside = adapted.alongside if adapted.replaced else None
        record = _compare(
            path, source, found, plan, TOLERANCES["float32"], say, program=traced.program, alongside=alongside
        )
    else:
        record, half_notes = _check_half(source, found, traced, wide, path, folder, plan, half, say)
        notes += half_notes
    must_agree(record, source)
    say(f"saving {out.name}")
    io.save(io.load(path), out, weights="copy")
    if isinstance(source, past.PastSource) and source.generates:
        notes.append(past.write_config(source, out))
    model = io.load(out)
    if not found:
        notes += recognised.notes(out)
    notes += hazards(model)
    return Report(
        "export", model=stats.record(model, out), blocks=block_records(model), verify=record, notes=notes
    )


def _compare(
    path: Path,
    source: Source,
    found: list[experts.Experts],
    plan: list[samples.Run],
    tolerance: float,
    say: Callable[[str], None],
    *,
    program: Callable[..., Any] | None = None,
    alongside: Callable[[], contextlib.AbstractContextManager[None]] | None = None,
) -> VerifyRecord:
    record = check.compare(
        path, source, found, plan, tolerance=tolerance, program=program, alongside=alongside, progress=say
    )
    if isinstance(source, past.PastSource) and source.generates:
        record = past.check_generation(record, path, source, found, tolerance=tolerance, progress=say)
    return record


def must_agree(record: VerifyRecord, source: Source) -> None:
    """Raises VerificationError for a comparison that failed."""
    if not record.passed:
        raise VerificationError(
            f"onnxruntime and torch differ: {record.failure}",
            "nothing was written; please report this",
            where=source.name,
        )


def about(found: list[experts.Experts]) -> list[str]:
    """Notes on modules that are not kept whole."""
    return [
        f"{entry.path}: {entry.reason}; exported operator by operator, not as a block"
        for entry in found
        if entry.spec is None
    ]


def half_type(source: Source) -> str | None:
    """`float16` or `bfloat16` if any weight is."""
    for parameter in source.module.parameters():
        if parameter.dtype in (torch.float16, torch.bfloat16):
            return str(parameter.dtype).removeprefix("torch.")
    return None


def _finished(model: ir.Model, symbols: Mapping[str, str], found: list[experts.Experts], path: Path) -> Path:
    """Tidied, labelled, in neutral form with its functions, valid and on disk."""
    neutral(model, symbols, found)
    io.save(model, path)
    check_valid(path)
    return path


def neutral(model: ir.Model, symbols: Mapping[str, str], found: list[experts.Experts]) -> None:
    """Tidied, labelled, in neutral form with its functions, in place."""
    translate.tidy(model)
    values = (value for node in model.graph.all_nodes() for value in (*node.inputs, *node.outputs))
    if any(value is not None and value.dtype in twin.HALF for value in values):  # of a float32 model too
        operator_types.cast_where_undefined(model)
    RepairCastTranspose()(model)
    if (
        found
    ):  # scattered sums that are left are no experts'; in other models recognisers read them as they are
        RepairScatterAdd()(model)
    translate.label(model, symbols, found)
    blocks.attach_functions(model)


def check_valid(path: Path) -> None:
    """Raises ModelError for a file that onnx's checker refuses."""
    try:
        onnx.checker.check_model(str(path))
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise ModelError(f"the exported graph is invalid: {first_line(error)}") from error


def _check_half(
    source: Source,
    found: list[experts.Experts],
    traced: trace.Traced,
    wide: ir.Model,
    path: Path,
    folder: Path,
    plan: list[samples.Run],
    half: str,
    say: Callable[[str], None],
) -> tuple[VerifyRecord, list[str]]:
    """The float32 twin against the module in float32; and the file itself against the module."""
    twin.widen(wide)
    twin_path = _finished(wide, traced.symbols, found, folder / f"float32.{path.name}")
    widened = source.widened()
    wide_plan, _ = planning.plan(widened, traced.assumptions, long=bool(traced.lifted))
    parts = dict(widened.module.named_modules())
    wide_found = [
        dataclasses.replace(entry, module=parts[entry.path])
        for entry in found
        if experts.is_part(source.module, entry)
    ]
    # Constants that the program makes in its own type are rounded in the graph, and are not in the module.
    tolerance = TOLERANCES[half] / 10
    record = _compare(twin_path, widened, wide_found, wide_plan, tolerance, say)
    notes = [f"verified on a float32 twin: the same graph and weights, widened from {half}"]
    notes.append(sixteen.compare(source, path, plan, half))
    return record, notes
