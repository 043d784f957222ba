"""The benchmark behind `docs/benchmarks.md`: `python -m sparse_onnx.bench.suite`.

Every contestant has the same weights and inputs, is checked against torch before anything is timed, and runs
once in every round of one process. Reported are ratios; absolute times belong to the machine. Needs torch and
transformers, 8 GB of memory and 5 GB of disk.

Two sections: `rivals`, everything that runs the same layers, and `recognised`, the graphs of other exporters before and
after `optimize`.
"""

from __future__ import annotations

import dataclasses
import gc
import json
import os
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from sparse_onnx.bench import recognised
from sparse_onnx.bench.tables import markdown, number
from sparse_onnx.core.errors import SparseOnnxError
from sparse_onnx.core.report import BenchModel, BenchRow, tool_versions
from sparse_onnx.export.failure import root_line
from sparse_onnx.targets import machine

if TYPE_CHECKING:
    import numpy as np

    from sparse_onnx.bench.layers import Case, SparseLayers
    from sparse_onnx.bench.measure import Contestant

OURS = "sparse-onnx"
DENSE, TRANSFORMERS, FUSED, CONTRIB, EAGER, LIMIT = (
    "dense batched export",
    "transformers OnnxExporter",
    "transformers OnnxExporter, ort_fusions=cpu",
    "com.microsoft::MoE",
    "PyTorch eager",
    "read active weights once",
)
TOKENS = (1, 8, 64, 256, 1024)
SECTIONS = RIVALS, RECOGNISED = ("rivals", "recognised")


@dataclasses.dataclass(frozen=True)
class Result:
    """One case: rows as `bench` reports them, the first contestant being ours, and what the files cost.

    `left_out` has the rivals that could not be exported, loaded or agreed with, and why.
    """

    case: str
    rows: list[BenchRow]
    models: list[BenchModel]
    reader: str
    left_out: dict[str, str]


def pin_threads(threads: int, module: str, arguments: Sequence[str]) -> None:
    """Starts the program again with the environment that OpenMP and BLAS read when they are loaded."""
    wanted = {
        "OMP_NUM_THREADS": str(threads),
        "OPENBLAS_NUM_THREADS": str(threads),
        "OPENBLAS_THREAD_TIMEOUT": "16",  # spin for 2^16 cycles, not for tens of milliseconds
    }
    if any(os.environ.get(name) != value for name, value in wanted.items()):
        os.execve(sys.executable, [sys.executable, "-m", module, *arguments], {**os.environ, **wanted})


def run_case(
    case: Case,
    tokens: Sequence[int],
    threads: int,
    folder: Path,
    *,
    rounds: int | None = None,
    min_time: float = 1.0,
) -> Result:
    """Builds, checks and times all contestants of one case; files go to `folder`.

    Raises:
        VerificationError: our model does not give torch's answers. A rival that does not is left out.
    """
    import numpy as np
    import torch

    from sparse_onnx.bench import contestants, memory
    from sparse_onnx.bench.api import INPUTS
    from sparse_onnx.bench.measure import interleave, rows

    torch.set_num_threads(threads)
    layers = case.build()
    paths, left_out = write_models(layers, folder)
    costs = [
        dataclasses.replace(memory.measure(path, threads, tokens), model=name) for name, path in paths.items()
    ]
    sessions = {}
    for name, path in paths.items():
        try:
            sessions[name] = contestants.create(path, threads)
        except SparseOnnxError as error:
            if name == OURS:
                raise
            left_out[name] = root_line(error)
    measured: list[BenchRow] = []
    reader = ""
    for count in tokens:
        size = (count, layers.config.hidden_size)
        feeds = [
            {"hidden_states": np.random.default_rng(seed).standard_normal(size, dtype=np.float32)}
            for seed in range(INPUTS)
        ]
        runs = [contestants.onnx(name, session, feeds) for name, session in sessions.items()]
        eager = contestants.eager(EAGER, layers, feeds)
        contestants.check(eager, runs[:1], INPUTS)
        left_out |= wrong(eager, runs[1:], INPUTS)
        runs = [run for run in runs if run.name not in left_out] + [eager]
        if count == 1:
            reader, limit = _limit(layers, feeds, threads)
            runs.append(limit)
        times = interleave(runs, INPUTS, rounds=rounds, min_time=min_time)
        measured += rows([run.name for run in runs], count, times)
    return Result(case.name, measured, costs, reader, left_out)


def wrong(reference: Contestant, rivals: Sequence[Contestant], inputs: int) -> dict[str, str]:
    """Rivals that give other answers than the reference, or none, and how."""
    from sparse_onnx.bench import contestants

    found: dict[str, str] = {}
    for rival in rivals:
        try:
            found |= contestants.disagreements(reference, [rival], inputs)
        except SparseOnnxError as error:
            found[rival.name] = root_line(error)
    return found


def write_models(layers: SparseLayers, folder: Path) -> tuple[dict[str, Path], dict[str, str]]:
    """ONNX files of the layers by name of the contestant, ours first; and why a rival has none."""
    import torch

    from sparse_onnx.bench import rivals
    from sparse_onnx.export.api import export
    from sparse_onnx.optimize.api import optimize

    paths = {OURS: folder / "sparse.cpu.onnx"}
    neutral = folder / "sparse.onnx"
    sample = {"hidden_states": torch.randn(7, layers.config.hidden_size)}
    axes = {"hidden_states": {0: "tokens"}}
    export((layers, sample, axes), neutral)
    optimize(neutral, paths[OURS], target="cpu")
    writers: dict[str, tuple[str, Callable[[Path], None]]] = {
        DENSE: (
            "dense",
            lambda path: rivals.export_dense(rivals.DenseLayers(layers).eval(), sample, axes, path),
        ),
        TRANSFORMERS: ("transformers", partial(rivals.export_transformers, layers, sample, axes)),
        FUSED: ("fused", partial(rivals.export_transformers, layers, sample, axes, fusions="cpu")),
        CONTRIB: ("contrib", partial(rivals.build_contrib_moe, layers)),
    }
    left_out = {}
    for name, (stem, write) in writers.items():
        path = folder / f"{stem}.onnx"
        try:
            write(path)
            paths[name] = path
        except Exception as error:  # whatever others' exporters raise
            left_out[name] = f"not exported: {root_line(error)}"
        gc.collect()
    return paths, left_out


def _limit(
    layers: SparseLayers, feeds: Sequence[Mapping[str, np.ndarray]], threads: int
) -> tuple[str, Contestant]:
    from sparse_onnx.bench.contestants import SETTLE_S
    from sparse_onnx.bench.limits import read_limit
    from sparse_onnx.bench.measure import Contestant
    from sparse_onnx.bench.rivals import active_weights

    needed = [active_weights(layers, feed["hidden_states"]) for feed in feeds]
    name, read = read_limit([view for views in needed for view in views], threads)
    return name, Contestant(LIMIT, lambda index: read(needed[index]), SETTLE_S)


def as_text(result: Result) -> str:
    """The table of one case: times relative to ours, creation time and memory."""
    counts = list(dict.fromkeys(row.tokens for row in result.rows))
    names = list(dict.fromkeys(row.model for row in result.rows))
    ratios = {(row.model, row.tokens): row.ratio_to_first for row in result.rows}
    costs = {model.model: model for model in result.models}
    lines = []
    for name in names:
        cost = costs.get(name, BenchModel(name, None, None))
        times = [number(ratios.get((name, count)), ".2f") for count in counts]
        lines.append([name, *times, number(cost.create_s, ".2f"), number(cost.rss_mb, ".0f")])
    columns = ["time relative to sparse-onnx, tokens:", *map(str, counts), "create s", "resident MB"]
    footer = f"\n\nweights read by {result.reader}" if result.reader else ""
    for name, reason in result.left_out.items():
        footer += f"\n\nleft out: {name}: {reason}"
    return f"{result.case}\n\n{markdown(columns, lines)}{footer}\n"


def as_json(
    results: Sequence[Result], threads: int, recognisable: Sequence[recognised.RecognisedCase] = ()
) -> dict[str, Any]:
    import torch
    import transformers

    return {
        "schema": 1,
        "command": "suite",
        "tool": {**tool_versions(), "torch": torch.__version__, "transformers": transformers.__version__},
        "machine": {"processor": machine.processor(), "cores": os.cpu_count(), "threads": threads},
        "results": [dataclasses.asdict(result) for result in results],
        "recognised": [dataclasses.asdict(result) for result in recognisable],
    }


@click.command()
@click.option("--tokens", default=",".join(map(str, TOKENS)), show_default=True, help="Token counts.")
@click.option("--threads", type=click.IntRange(min=1), default=2, show_default=True)
@click.option("--case", "chosen", type=click.IntRange(min=1), help="Run one case, by its number, not all.")
@click.option("--only", type=click.Choice(SECTIONS), help="Run one section, not all.")
@click.option("--rounds", type=click.IntRange(min=1), help="Rounds a token count; default: by time.")
@click.option(
    "--min-time",
    type=float,
    help="Seconds a contestant and count; default: 3, and 1 for the recognised graphs.",
)
@click.option("--json", "json_to", type=click.Path(path_type=Path), default="out/bench.json")
def main(
    tokens: str,
    threads: int,
    chosen: int | None,
    only: str | None,
    rounds: int | None,
    min_time: float | None,
    json_to: Path,
) -> None:
    """Time relative to sparse-onnx of everything else that runs the same MoE layers, fp32 on CPU.

    Then, of other exporters' graphs of these layers, the time of the original relative to what `optimize` made of it.
    """
    pin_threads(threads, "sparse_onnx.bench.suite", sys.argv[1:])
    from sparse_onnx.bench.layers import CASES

    json_to.parent.mkdir(parents=True, exist_ok=True)
    counts = [int(text) for text in tokens.split(",")]
    results: list[Result] = []
    recognisable: list[recognised.RecognisedCase] = []
    for section, case in (
        (section, case)
        for section in (SECTIONS if only is None else (only,))
        for case in (CASES if chosen is None else CASES[chosen - 1 : chosen])
    ):
        with tempfile.TemporaryDirectory(dir=json_to.parent, prefix="bench-") as name:
            folder = Path(name)
            try:
                if section == RIVALS:
                    seconds = min_time or 3.0
                    results.append(run_case(case, counts, threads, folder, rounds=rounds, min_time=seconds))
                    text = as_text(results[-1])
                else:
                    seconds = min_time or 1.0
                    found = recognised.run_case(
                        case, counts, threads, folder, rounds=rounds, min_time=seconds
                    )
                    recognisable.append(found)
                    text = recognised.as_text(found)
            except SparseOnnxError as error:
                raise click.ClickException(str(error)) from error
        gc.collect()
        click.echo(f"\n{text}")
        json_to.write_text(json.dumps(as_json(results, threads, recognisable), indent=1) + "\n")
    click.echo(f"written: {json_to}")


if __name__ == "__main__":
    main()
