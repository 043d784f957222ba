"""`package`: a model as a folder that can be shipped, with a runner that checks it where it arrives."""

from __future__ import annotations

import dataclasses
import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import onnx_ir as ir

from sparse_onnx import targets
from sparse_onnx.core.errors import ImpossibleError, OutsideError, UsageError
from sparse_onnx.core.report import Report, VerifyRecord
from sparse_onnx.graph import io, stats
from sparse_onnx.inspect.blocks import block_records
from sparse_onnx.optimize.static import open_axes
from sparse_onnx.package import contents, manifest, smoke, variants
from sparse_onnx.package import page as pages
from sparse_onnx.targets.profile import TargetProfile


def package(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    target: str = "cpu",
    forms: Sequence[str] = (),
    all_forms: bool = False,
    page: bool | None = None,
    progress: Callable[[str], None] | None = None,
) -> Report:
    """Writes a folder with the model, what it needs beside it, and runners that check it on another machine.

    A model with blocks in neutral form is lowered for the target first; any other is shipped as it is.

    Args:
        source: the model.
        out: the folder; it must not exist, or be empty. It appears whole or not at all.
        target: a target's name.
        forms: variants of the model to ship with it, one an execution form, for the runner to choose among.
        all_forms: a variant in each form that the target takes and the model can have.
        page: write a page that generates text in a browser (targets wasm and webgpu); None: where it can run the model.
        progress: called with a line at each step.

    Raises:
        UsageError: unknown target or form, a page for a target that no browser has, or a folder that is not empty.
        ModelError: the model is unreadable, unsafe or broken.
        VerificationError: a variant differs from the model, or the target gives other outputs; nothing was written.
        ImpossibleError: the model cannot be run here to learn what it gives, or the target cannot run it.
    """
    profile = targets.get(target)
    with_page = pages.wanted(page, profile)
    folder = _free(out)
    say = progress or (lambda line: None)
    model = io.load(source)
    report = Report("package", target=profile.name, model=stats.record(model, os.fspath(source)))
    _require_fitting(model, profile)
    staged = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=".tmp", dir=folder.parent))
    try:
        staged.chmod(0o755)
        main = contents.copy_model(Path(source), model, staged)
        made = variants.build(main, profile, forms, all_forms, report.notes, say)
        graph = io.load(main)
        report.blocks = block_records(graph)
        report.output = stats.record(graph, str(folder / main.name))
        report.notes += contents.copy_companions(Path(source), main, profile)
        kernels = contents.copy_kernels(graph, staged, report.notes)
        say("running the smoke input")
        recorded = smoke.record(graph, made, staged, profile, kernels is not None)
        report.verify = VerifyRecord(
            "whole",
            True,
            recorded.runs,
            max_rel_error=recorded.error,
            inputs=[f"smoke input of {recorded.label}"],
            on=recorded.on,
        )
        report.notes += recorded.notes
        entry = None
        if with_page:
            say("making the page")
            entry, notes = pages.build(main, recorded, Path(source), page, profile)
            report.notes += notes
        if profile.format == "ort":
            say("converting to .ort")
            made = variants.to_ort(made, staged, recorded, report.notes)
            report.output = dataclasses.replace(report.output, path=str(folder / made[0].model.name))
        described = manifest.describe(graph, made, profile, recorded, kernels)
        described["page"] = entry
        contents.copy_runners(staged)
        manifest.write(described, staged)
        _put(staged, folder)
    except OSError as error:
        raise OutsideError(
            f"the package cannot be written: {error.strerror or error}", where=str(folder)
        ) from error
    finally:
        shutil.rmtree(staged, ignore_errors=True)
    return report


def _free(out: str | os.PathLike[str]) -> Path:
    folder = Path(os.path.realpath(out))
    if not folder.parent.is_dir():
        raise UsageError("is in a folder that does not exist", "make that folder first", os.fspath(out))
    if folder.exists() and not folder.is_dir():
        raise UsageError("is a file", "name a new folder", os.fspath(out))
    if folder.is_dir() and any(folder.iterdir()):
        raise UsageError("is a folder that is not empty", "name a new folder, or empty it", os.fspath(out))
    return folder


def _require_fitting(model: ir.Model, profile: TargetProfile) -> None:
    names = open_axes(model) if profile.static else []
    if names:
        sizes = ",".join(f"{name}=1" for name in names)
        raise ImpossibleError(
            f"target '{profile.name}' runs graphs of fixed sizes alone, and '{names[0]}' is open",
            f"`sparse-onnx optimize --target {profile.name} --static {sizes}` fixes them",
        )


def _put(staged: Path, folder: Path) -> None:
    """The rename fails where somebody filled the folder meanwhile."""
    os.rename(staged, folder)
