"""Which form each block gets by measurement, made here or read from a file."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import onnx_ir as ir

from sparse_onnx import targets
from sparse_onnx.blocks.lowering import Form
from sparse_onnx.core.errors import UsageError
from sparse_onnx.core.report import TuningRecord
from sparse_onnx.optimize import runner, tuning_file
from sparse_onnx.optimize.candidates import kinds
from sparse_onnx.optimize.tuning_file import TuningFile


def tuned(
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
