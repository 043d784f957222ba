"""What `optimize` makes of other exporters' graphs: each graph timed against what became of it.

The layers of one case are written in every spelling, optimized, and both files run in turn in one process. Nothing is
timed unless every block was recognised for what it is, the result verified, and both files give torch's answers.
"""

from __future__ import annotations

import dataclasses
import gc
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from sparse_onnx.bench.tables import markdown, number
from sparse_onnx.core.errors import VerificationError
from sparse_onnx.core.report import BenchRow, Report
from sparse_onnx.export.failure import root_line

if TYPE_CHECKING:
    import numpy as np

    from sparse_onnx.bench.layers import Case, SparseLayers
    from sparse_onnx.bench.spelled import Spelling

ORIGINAL, OPTIMIZED = "original", "optimized"

#: Inputs, and rounds at least: fewer than elsewhere, since large runs of an original take seconds.
_INPUTS, _FEWEST = 2, 5

#: Copies of weights that a graph may make in one product; with more, a run tells how a machine swaps.
FITS = 3e9
TOO_LARGE = "does not fit"


@dataclasses.dataclass(frozen=True)
class Recognised:
    """One spelling: rows of the original and of the optimized file, whose ratio is to the optimized one.

    `too_large` are the token counts at which the original copies more weights than fit. `left_out` says why there is
    no file to optimize.
    """

    name: str
    spelling: str
    rows: list[BenchRow]
    optimize_s: float | None = None
    nodes: tuple[int, int] | None = None
    too_large: list[int] = dataclasses.field(default_factory=list)
    left_out: str | None = None


@dataclasses.dataclass(frozen=True)
class RecognisedCase:
    """All spellings of one case."""

    case: str
    spellings: list[Recognised]


def run_case(
    case: Case,
    tokens: Sequence[int],
    threads: int,
    folder: Path,
    *,
    rounds: int | None = None,
    min_time: float = 1.0,
) -> RecognisedCase:
    """Writes, optimizes, checks and times the layers of one case in every spelling; files go to `folder`.

    Raises:
        VerificationError: a block was not recognised, or answers differ from torch's.
    """
    import torch

    from sparse_onnx.bench.spelled import MEASURED

    torch.set_num_threads(threads)
    layers = case.build()
    found = []
    for spelling in MEASURED:
        before, after = (folder / f"{spelling.spelling}{part}.onnx" for part in ("", ".optimized"))
        try:
            spelling.write(layers, before)
        except Exception as error:  # whatever others' exporters raise
            reason = f"not exported: {root_line(error)}"
            found.append(Recognised(spelling.name, spelling.spelling, [], left_out=reason))
            continue
        found.append(measure(spelling, layers, before, after, tokens, threads, rounds, min_time))
        gc.collect()
    return RecognisedCase(case.name, found)


def measure(
    spelling: Spelling,
    layers: SparseLayers,
    before: Path,
    after: Path,
    tokens: Sequence[int],
    threads: int,
    rounds: int | None = None,
    min_time: float = 1.0,
) -> Recognised:
    """Optimizes `before` to `after` and times both.

    Raises:
        VerificationError: see `run_case`.
    """
    from sparse_onnx.bench import contestants
    from sparse_onnx.bench.measure import interleave, rows
    from sparse_onnx.optimize.api import optimize

    start = time.perf_counter()
    report = optimize(before, after, target="cpu")
    seconds = time.perf_counter() - start
    require(report, spelling.spelling, len(layers.parts))
    sessions = {OPTIMIZED: contestants.create(after, threads), ORIGINAL: contestants.create(before, threads)}
    measured: list[BenchRow] = []
    too_large = []
    for count in tokens:
        feeds = inputs(layers, count)
        runs = [contestants.onnx(name, session, feeds) for name, session in sessions.items()]
        if spelling.gathers and copied_bytes(layers, count) > FITS:
            too_large.append(count)
            runs = runs[:1]
        eager = contestants.eager("torch", layers, feeds)
        contestants.check(eager, runs, len(feeds))
        times = interleave(runs, len(feeds), rounds=rounds, min_time=min_time, fewest=_FEWEST)
        measured += rows([run.name for run in runs], count, times)
    assert report.model is not None and report.output is not None
    nodes = (report.model.nodes, report.output.nodes)
    return Recognised(spelling.name, spelling.spelling, measured, seconds, nodes, too_large)


def require(report: Report, spelling: str, blocks: int) -> None:
    """Every block was recognised as `spelling`, lowered, and the result verified.

    Raises:
        VerificationError: it was not.
    """
    found = [(block.spelling, block.form) for block in report.blocks]
    if found != [(spelling, "grouped")] * blocks:
        reasons = "; ".join(refusal.reason for refusal in report.refusals)
        raise VerificationError(f"{blocks} blocks as {spelling} expected, found {found}. {reasons}".strip())
    if report.verify is None or not report.verify.passed:
        raise VerificationError(f"the optimized {spelling} graph was not verified")


def inputs(layers: SparseLayers, count: int) -> list[dict[str, np.ndarray]]:
    """Several inputs of `count` tokens, with routings of their own."""
    import numpy as np

    size = (count, layers.config.hidden_size)
    made = [np.random.default_rng(seed).standard_normal(size, dtype=np.float32) for seed in range(_INPUTS)]
    return [{"hidden_states": array} for array in made]


def copied_bytes(layers: SparseLayers, tokens: int) -> int:
    """What gathering the first matrix of each slot's expert takes: ``tokens * K`` float32 matrices."""
    return tokens * layers.top_k * int(layers.parts[0].experts.gate_up_proj[0].numel()) * 4


def as_text(result: RecognisedCase) -> str:
    """The table of one case: how many times faster each graph became."""
    counts = sorted({row.tokens for item in result.spellings for row in item.rows})
    lines = []
    for item in result.spellings:
        ratios = {row.tokens: row.ratio_to_first for row in item.rows if row.model == ORIGINAL}
        cells = [
            TOO_LARGE if count in item.too_large else number(ratios.get(count), ".2f") for count in counts
        ]
        nodes = "" if item.nodes is None else f"{item.nodes[0]} -> {item.nodes[1]}"
        lines.append([item.name, *cells, nodes, number(item.optimize_s, ".1f")])
    columns = [
        "time of the original / time after optimize, tokens:",
        *map(str, counts),
        "nodes",
        "optimize s",
    ]
    footer = "".join(
        f"\n\nleft out: {item.name}: {item.left_out}" for item in result.spellings if item.left_out
    )
    return f"{result.case}\n\n{markdown(columns, lines)}{footer}\n"
