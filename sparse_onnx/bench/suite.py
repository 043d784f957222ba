"""The benchmark behind `docs/benchmarks.md`: `python -m sparse_onnx.bench.suite`.

Every contestant has the same weights and inputs, is checked against torch before anything is timed, and runs
once in every round of one process. Reported are ratios; absolute times belong to the machine. Needs torch and
transformers, 20 GB of memory and 15 GB of disk; peers that are installed take part (the extra `bench-peers`).

Two sections: `forms`, every execution form against `--tune` and against everything else that runs the same layers, and
`recognised`, the graphs of other exporters before and after `optimize`.
"""

from __future__ import annotations

import dataclasses
import gc
import json
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from sparse_onnx.bench import forms, recognised
from sparse_onnx.core.errors import SparseOnnxError
from sparse_onnx.core.report import tool_versions
from sparse_onnx.targets import machine

TOKENS = (1, 8, 64, 256, 1024)
SECTIONS = FORMS, RECOGNISED = ("forms", "recognised")


def pin_threads(threads: int, module: str, arguments: Sequence[str]) -> None:
    """Starts the program again with the environment that OpenMP and BLAS read when they are loaded."""
    wanted = {
        "OMP_NUM_THREADS": str(threads),
        "OPENBLAS_NUM_THREADS": str(threads),
        "OPENBLAS_THREAD_TIMEOUT": "16",  # spin for 2^16 cycles, not for tens of milliseconds
    }
    if any(os.environ.get(name) != value for name, value in wanted.items()):
        os.execve(sys.executable, [sys.executable, "-m", module, *arguments], {**os.environ, **wanted})


def as_json(
    results: Sequence[forms.Result], threads: int, recognisable: Sequence[recognised.RecognisedCase] = ()
) -> dict[str, Any]:
    import torch
    import transformers

    return {
        "schema": 1,
        "command": "suite",
        "tool": {**tool_versions(), "torch": torch.__version__, "transformers": transformers.__version__},
        "machine": {"processor": machine.processor(), "cores": os.cpu_count(), "threads": threads},
        "forms": [dataclasses.asdict(result) for result in results],
        "recognised": [dataclasses.asdict(result) for result in recognisable],
    }


@click.command()
@click.option("--tokens", default=",".join(map(str, TOKENS)), show_default=True, help="Token counts.")
@click.option("--threads", type=click.IntRange(min=1), default=2, show_default=True)
@click.option("--case", "chosen", type=click.IntRange(min=1), help="Run one case, by its number, not all.")
@click.option("--only", type=click.Choice(SECTIONS), help="Run one section, not all.")
@click.option(
    "--precision",
    "precisions",
    type=click.Choice(forms.PRECISIONS),
    multiple=True,
    help="Of `forms`; default: all.",
)
@click.option("--peers/--no-peers", default=True, show_default=True, help="Time everybody else, too.")
@click.option("--rounds", type=click.IntRange(min=1), help="Rounds a token count; default: by time.")
@click.option(
    "--min-time", type=float, default=1.0, show_default=True, help="Seconds a contestant and count."
)
@click.option("--json", "json_to", type=click.Path(path_type=Path), default="out/bench.json")
def main(
    tokens: str,
    threads: int,
    chosen: int | None,
    only: str | None,
    precisions: tuple[forms.Precision, ...],
    peers: bool,
    rounds: int | None,
    min_time: float,
    json_to: Path,
) -> None:
    """Times of every execution form, and of everything else that runs the same MoE layers, relative to `--tune`.

    Then, of other exporters' graphs of these layers, the time of the original relative to what `optimize` made of it.
    """
    pin_threads(threads, "sparse_onnx.bench.suite", sys.argv[1:])
    from sparse_onnx.bench.layers import CASES

    json_to.parent.mkdir(parents=True, exist_ok=True)
    counts = [int(text) for text in tokens.split(",")]
    results: list[forms.Result] = []
    recognisable: list[recognised.RecognisedCase] = []

    def one(folder: Path, section: str, case: Any, precision: forms.Precision | None) -> str:
        if section == FORMS:
            assert precision is not None
            results.append(
                forms.run_case(
                    case, precision, counts, threads, folder, rounds=rounds, min_time=min_time, peers=peers
                )
            )
            return forms.as_text(results[-1])
        recognisable.append(
            recognised.run_case(case, counts, threads, folder, rounds=rounds, min_time=min_time)
        )
        return recognised.as_text(recognisable[-1])

    def part(cases: Sequence[Any]) -> Sequence[Any]:
        return cases if chosen is None else cases[chosen - 1 : chosen]

    plan: list[tuple[str, Any, forms.Precision | None]] = []
    if only in (None, FORMS):
        plan += [
            (FORMS, shape, each) for shape in part(forms.SHAPES) for each in precisions or forms.PRECISIONS
        ]
    if only in (None, RECOGNISED):
        plan += [(RECOGNISED, case, None) for case in part(CASES)]
    for section, case, precision in plan:
        with tempfile.TemporaryDirectory(dir=json_to.parent, prefix="bench-") as name:
            try:
                text = one(Path(name), section, case, precision)
            except SparseOnnxError as error:
                raise click.ClickException(str(error)) from error
        gc.collect()
        click.echo(f"\n{text}")
        json_to.write_text(json.dumps(as_json(results, threads, recognisable), indent=1) + "\n")
    click.echo(f"written: {json_to}")


if __name__ == "__main__":
    main()
