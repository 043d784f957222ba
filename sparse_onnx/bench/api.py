"""`bench`: models against each other, interleaved in one process."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from sparse_onnx.core.errors import UsageError
from sparse_onnx.core.report import BenchRecord, BenchRow, Report

if TYPE_CHECKING:
    import numpy as np
    import onnx_ir as ir

#: Different inputs a token count: routing varies, and no model runs on weights that are in the cache by luck.
INPUTS = 6


def bench(
    models: Sequence[str | os.PathLike[str]],
    *,
    tokens: Sequence[int] = (1, 64, 256),
    threads: int = 2,
    rounds: int | None = None,
    min_time: float = 1.0,
    progress: Callable[[str], None] | None = None,
) -> Report:
    """Times models on the same inputs, one run of each a round; a note says where their first outputs differ.

    A token count N is one sequence of N tokens, or N rows where the model takes rows.

    Args:
        models: paths; ratios are to the first.
        tokens: token counts.
        threads: intra-op threads of each session; inter-op is 1.
        rounds: runs of each model a token count; None takes what `min_time` allows, 7 to 200.
        min_time: seconds a model and token count.
        progress: called with a line at each step.

    Raises:
        UsageError: no model, or models whose inputs do not match.
        ModelError, ImpossibleError: a model does not load.
        OutsideError: a model fails while running.
    """
    from sparse_onnx.bench import contestants, measure, memory
    from sparse_onnx.graph import io, stats

    if not models or not tokens:
        raise UsageError("nothing to measure", "name a model and a token count")
    names = [os.fspath(path) for path in models]
    first = io.load(names[0])
    report = Report("bench", target="cpu", model=stats.record(first, names[0]))
    costs = []
    for name in names:
        _say(progress, f"creating {name}")
        costs.append(memory.measure(name, threads, tokens))
        if costs[-1].create_s is None:
            report.notes.append(f"{name}: no memory figure, its process failed")
    sessions = [contestants.create(name, threads) for name in names]
    rows: list[BenchRow] = []
    fewest = None
    differing: set[str] = set()
    for count in tokens:
        _say(progress, f"{count} tokens")
        feeds = _inputs(first, count)
        runs = [contestants.onnx(name, session, feeds) for name, session in zip(names, sessions, strict=True)]
        for name, reason in contestants.disagreements(runs[0], runs[1:], INPUTS).items():
            if name not in differing:
                report.notes.append(f"{name} {reason}; verify compares them apart from near-tied routing")
            differing.add(name)
        times = measure.interleave(runs, INPUTS, rounds=rounds, min_time=min_time)
        rows += measure.rows(names, count, times)
        fewest = len(times) if fewest is None else min(fewest, len(times))
    if _is_static(first):
        report.notes.append("the model's sizes are fixed: every token count ran the same size")
    report.bench = BenchRecord(threads, fewest or 0, rows, costs)
    return report


def _say(progress: Callable[[str], None] | None, line: str) -> None:
    if progress is not None:
        progress(line)


def _inputs(model: ir.Model, tokens: int) -> list[dict[str, np.ndarray]]:
    from sparse_onnx.verify.inputs import sized_inputs

    return [sized_inputs(model, 1, tokens, seed=seed) for seed in range(INPUTS)]


def _is_static(model: ir.Model) -> bool:
    return all(
        value.shape is not None and all(isinstance(size, int) for size in value.shape)
        for value in model.graph.inputs
    )
