"""The user's data that quality is measured on: never what calibration has seen."""

from __future__ import annotations

import itertools
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx_ir as ir

from sparse_onnx.calibrate.data import Data
from sparse_onnx.calibrate.digests import digest
from sparse_onnx.core.calibration import Calibration
from sparse_onnx.core.errors import UsageError
from sparse_onnx.graph.annotate import annotate
from sparse_onnx.optimize.quality import Feeds

#: Runs that data should at least be.
_RUNS = 16


def evaluation_runs(
    model: ir.Model,
    source: str | os.PathLike[str],
    paths: Sequence[str],
    tokenizer: str | None,
    calibration: Calibration,
) -> list[Feeds]:
    """
    Args:
        model: as it was loaded; gets its types inferred.
        source: its path.
        paths: files and folders of text or arrays.
        tokenizer: that reads text; None: beside the model.
        calibration: whose data these may not be.

    Raises:
        UsageError: data that the model cannot be run over, or that calibration has seen.
    """
    annotate(model)
    data = Data(model, paths, model_path=source, tokenizer=tokenizer)
    _require_held_out(data.files, calibration)
    return _pieces(model, [run.feeds for run in data])


def _pieces(model: ir.Model, runs: list[Feeds]) -> list[Feeds]:
    """Runs of batches as runs of smaller ones, where there are few: halves must be halves, and errors come of
    spread."""
    each = -(-_RUNS // max(1, len(runs)))
    if each < 2:
        return runs
    open_batch = all(
        value.shape is not None and len(value.shape) > 0 and not isinstance(value.shape[0], int)
        for value in model.graph.inputs
        if not value.is_initializer()
    )
    found: list[Feeds] = []
    for feeds in runs:
        batches = {array.shape[0] if array.ndim else 0 for array in feeds.values()}
        batch = batches.pop() if len(batches) == 1 else 0
        parts = min(each, batch) if open_batch else 1
        cuts = np.linspace(0, batch, parts + 1).round().astype(int) if parts > 1 else []
        found += [
            {name: array[start:end] for name, array in feeds.items()}
            for start, end in itertools.pairwise(cuts)
        ] or [feeds]
    return found


def _require_held_out(files: Sequence[Path], calibration: Calibration) -> None:
    """
    Raises:
        UsageError: a file, under whatever name, that calibration has seen.
    """
    known = set(calibration.data.digests)
    for path in files:
        if digest(path) in known:
            raise UsageError(
                "calibration has seen this file: quality on it says nothing", "give other data", str(path)
            )
