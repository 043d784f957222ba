"""`calibrate`: runs a model over the user's data and keeps statistics of what its layers read and where tokens go."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from sparse_onnx.calibrate.collect import Sizes
from sparse_onnx.calibrate.data import LENGTH, Data
from sparse_onnx.calibrate.describe import rounded
from sparse_onnx.calibrate.digests import digests
from sparse_onnx.calibrate.gated import gated_records
from sparse_onnx.calibrate.measure import Progress, records
from sparse_onnx.calibrate.observe import Observed
from sparse_onnx.calibrate.plan import Plan, groups, plan, prepare
from sparse_onnx.calibrate.reservoir import Store
from sparse_onnx.core.calibration import Calibration, DataRecord, ZerosRecord
from sparse_onnx.core.errors import ImpossibleError, UsageError
from sparse_onnx.graph import io, stats
from sparse_onnx.graph.files import stage

#: Rows sampled of each site for statistics; a quarter as many of the held-out runs.
ROWS = 1024
_HELD_OUT = 4
#: Of the runs every fifth is held out; of fewer the last; of a single one the last fifth of its rows.
_FIFTH = 5


def calibrate(
    model: str | os.PathLike[str],
    data: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    out: str | os.PathLike[str] | None = None,
    *,
    length: int = LENGTH,
    runs: int | None = None,
    tokenizer: str | os.PathLike[str] | None = None,
    rows: int = ROWS,
    seed: int = 0,
    threads: int | None = None,
    progress: Progress | None = None,
) -> Calibration:
    """Statistics of the inputs of all linear layers and of the routing of all blocks.

    Zeros, means and loads are counted over all tokens; medians, modes, quantiles and output errors are of samples of
    fixed size, drawn with a fixed seed: memory depends on neither the data's size nor the weights'.

    Args:
        model: path of an .onnx file, of any exporter, dense or quantized. It is not changed.
        data: files and folders: texts, which the tokenizer beside the model reads, or ``.npz`` and ``.npy`` arrays.
        out: where the statistics go, as JSON; appears whole or not at all.
        length: tokens of a window of text.
        runs: use so many windows (or pieces of arrays), evenly spread over the data; None: all.
        tokenizer: a tokenizer.json, or the folder that holds it; None: beside the model.
        rows: sampled of each site.
        seed: of the samples.
        threads: of ONNX Runtime.
        progress: told what is done, and how much of it.

    Raises:
        UsageError: data that the model cannot be run over.
        ModelError: an unreadable or unsafe model, or one that computes NaN on the data.
        ImpossibleError: nothing in it can be measured.
        OutsideError: the runtime failed, or no space is left.
    """
    if rows < 1 or length < 1 or (runs is not None and runs < 1):
        raise UsageError("rows, length and runs must be at least 1")
    loaded = io.load(model)
    fingerprint = stats.fingerprint(loaded)
    prepare(loaded)
    planned = plan(loaded)
    if not planned.collectors and not planned.rectified:
        raise ImpossibleError(
            "it has no linear layer, block or ReLU that can be measured", _reasons(planned), os.fspath(model)
        )
    paths = [data] if isinstance(data, (str, os.PathLike)) else list(data)
    source = Data(loaded, paths, model_path=model, length=length, runs=runs, tokenizer=tokenizer)
    names = dict.fromkeys(name for collector in planned.collectors for name in collector.names)
    observed = Observed(loaded, names, planned.rectified, threads)
    sizes = Sizes(rows, max(1, rows // _HELD_OUT))
    store = Store(4 * sizes.both * sum(collector.width for collector in planned.collectors))
    for at, collector in enumerate(planned.collectors):
        collector.open(sizes, store, (seed, at))
    record, counted = _run(source, planned, observed, paths, progress)
    layers, refusals = records(planned, sizes, seed, progress)
    measured = {layer.name for layer in layers}
    blocks = tuple(
        block.routing.record(
            tuple(site.name for site in planned.experts.get(block.name, ()) if site.name in measured)
        )
        for block in planned.blocks
    )
    result = Calibration(
        path=os.fspath(model),
        fingerprint=fingerprint,
        data=record,
        layers=tuple(layers),
        blocks=blocks,
        activations=counted,
        refusals=(*planned.refusals, *refusals),
        notes=(source.note,) if source.note else (),
        gated=gated_records(planned.gated, planned.blocks, sizes, seed),
    )
    if out is not None:
        target = Path(out)
        os.replace(stage(target, result.dumps().encode()), target)
    return result


def _reasons(planned: Plan) -> str:
    return "; ".join(dict.fromkeys(refusal.reason for refusal in planned.refusals))


def _run(
    source: Data,
    planned: Plan,
    observed: Observed,
    paths: Sequence[str | os.PathLike[str]],
    progress: Progress | None,
) -> tuple[DataRecord, tuple[ZerosRecord, ...]]:
    total = len(source)
    tokens = held = 0
    zeros = np.zeros((len(observed.counted), 2), np.int64)
    for at, run in enumerate(source):
        if progress is not None:
            progress("running", at, total)
        share = _held_out(at, total)
        tokens += run.tokens
        held += round(run.tokens * share)
        positions = run.tokens if run.mask is None else run.mask.size
        extra = [name for item in observed.counted for name in (item.zeros, item.size)]
        for group in list(groups(planned.collectors, positions)) or [[]]:
            names = list(dict.fromkeys([name for collector in group for name in collector.names] + extra))
            values = observed(run.feeds, names)
            for collector in group:
                collector.add(run, values, share)
            for row, item in zip(zeros, observed.counted if extra else (), strict=False):
                row += [int(values[item.zeros]), int(values[item.size])]
            extra = []
    if progress is not None:
        progress("running", total, total)
    files = tuple(os.fspath(path) for path in paths)
    record = DataRecord(files, total, tokens, held, digests(source.files))
    return record, tuple(
        ZerosRecord(item.name, item.operator, int(size), rounded(found / max(1, size)))
        for item, (found, size) in zip(observed.counted, zeros, strict=True)
    )


def _held_out(at: int, total: int) -> float:
    """The share of a run's rows that is held out."""
    if total == 1:
        return 1 / _FIFTH
    if total < _FIFTH:
        return float(at == total - 1)
    return float(at % _FIFTH == _FIFTH - 1)
