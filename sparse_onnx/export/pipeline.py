"""The steps of an export, from a loaded module to a verified file."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import torch

from sparse_onnx import blocks
from sparse_onnx.core.errors import ModelError, OutsideError, VerificationError
from sparse_onnx.core.report import Report, VerifyRecord
from sparse_onnx.export import (
    attempts,
    block_check,
    check,
    experts,
    planning,
    recognised,
    samples,
    trace,
    translate,
    twin,
)
from sparse_onnx.export.failure import first_line
from sparse_onnx.export.sources import Source, leaves
from sparse_onnx.graph import io, stats
from sparse_onnx.inspect.blocks import block_records
from sparse_onnx.targets import session as sessions
from sparse_onnx.verify.compare import TOLERANCES


def run(source: Source, out: Path, folder: Path, *, opset: int, say: Callable[[str], None]) -> Report:
    """Traces, checks, and puts the result at `out`; `folder` is scratch space on the same file system.

    Raises:
        ImpossibleError, VerificationError: as `sparse_onnx.export` says; nothing is at `out` then.
    """
    say("finding experts")
    found = experts.find(source.module)
    notes = [*source.notes, *_about(found)]
    say("tracing")
    traced, plan, plan_notes = attempts.trace(source, found, opset)
    notes += plan_notes
    half = _half(source)
    narrow = traced.model
    wide = narrow.clone() if half else None  # before constants are folded, and so rounded, in half precision
    say("writing")
    path = _finished(narrow, traced.symbols, found, folder / out.name)
    say("comparing each expert")
    block_check.compare_blocks(path, found)
    if half is None or wide is None:
        record = check.compare(
            path, source, found, plan, tolerance=TOLERANCES["float32"], program=traced.program, progress=say
        )
    else:
        record, half_notes = _check_half(source, found, traced, wide, path, folder, plan, half, say)
        notes += half_notes
    if not record.passed:
        raise VerificationError(
            f"onnxruntime and torch differ: {record.failure}",
            "nothing was written; please report this",
            where=source.name,
        )
    say(f"saving {out.name}")
    io.save(io.load(path), out, weights="copy")
    model = io.load(out)
    if not found:
        notes += recognised.notes(out)
    return Report(
        "export", model=stats.record(model, out), blocks=block_records(model), verify=record, notes=notes
    )


def _about(found: list[experts.Experts]) -> list[str]:
    return [
        f"{entry.path}: {entry.reason}; exported operator by operator, not as a block"
        for entry in found
        if entry.spec is None
    ]


def _half(source: Source) -> str | None:
    """`float16` or `bfloat16` if any weight is."""
    for parameter in source.module.parameters():
        if parameter.dtype in (torch.float16, torch.bfloat16):
            return str(parameter.dtype).removeprefix("torch.")
    return None


def _finished(model: ir.Model, symbols: Mapping[str, str], found: list[experts.Experts], path: Path) -> Path:
    """Tidied, labelled, in neutral form with its functions, valid and on disk."""
    translate.tidy(model)
    translate.label(model, symbols, found)
    blocks.attach_functions(model)
    io.save(model, path)
    try:
        onnx.checker.check_model(str(path))
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise ModelError(f"the exported graph is invalid: {first_line(error)}") from error
    return path


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
    """The float32 twin against the module in float32; and the file itself, where ORT can run it."""
    twin.widen(wide)
    twin_path = _finished(wide, traced.symbols, found, folder / f"float32.{path.name}")
    widened = source.widened()
    wide_plan, _ = planning.plan(widened, traced.assumptions)
    wide_found = [
        dataclasses.replace(entry, module=widened.module.get_submodule(entry.path)) for entry in found
    ]
    # Constants that the program makes in its own type are rounded in the graph, and are not in the module.
    tolerance = TOLERANCES[half] / 10
    record = check.compare(twin_path, widened, wide_found, wide_plan, tolerance=tolerance, progress=say)
    notes = [f"verified on a float32 twin: the same graph and weights, widened from {half}"]
    if half == "float16":
        notes.append(_run_half(source, path, plan))
    else:
        notes.append("onnxruntime has no bfloat16 arithmetic on CPU: the file itself was not run")
    return record, notes


def _run_half(source: Source, path: Path, plan: list[samples.Run]) -> str:
    """Runs the float16 file as it is, and says how far from torch's float16 it lands. Near-tied routers make
    single tokens differ, so that the median over tokens is what tells a sound file from a broken one."""
    session = sessions.create_session(path, name=path.name)
    errors: list[np.ndarray] = []
    for run in plan:
        expected = leaves(source.forward(run.inputs))[0].float().numpy()
        try:
            actual = sessions.run(session, {name: value.numpy() for name, value in run.inputs.items()})[0]
        except OutsideError as failure:
            return f"the float16 file itself was not run: {failure.message}"
        per_token = np.abs(actual.astype(np.float32) - expected).reshape(-1, expected.shape[-1]).max(axis=1)
        errors.append(per_token / max(float(np.abs(expected).max()), 1e-30))
    error = np.concatenate(errors)
    median = float(np.median(error))
    if not median <= TOLERANCES["float16"]:
        raise VerificationError(
            f"the float16 file differs from torch by {median:.2g} in the median token",
            "try float32",
            where=source.name,
        )
    return (
        f"the float16 file itself, run on CPU, differs from torch's float16 by {median:.2g} in the median "
        f"token and {float(error.max()):.2g} at most"
    )
