"""`sparse-onnx bench`."""

from __future__ import annotations

from pathlib import Path

import click

from sparse_onnx.cli import options
from sparse_onnx.cli.output import Output


@click.command("bench")
@click.argument("models", metavar="A [B ...]", nargs=-1, required=True, type=click.Path(path_type=Path))
@options.tokens("1,64,256", "Token counts to measure.")
@options.threads(2, "ONNX Runtime threads.")
@click.option(
    "--rounds", type=click.IntRange(min=1), help="Runs of each model a token count; default: by time."
)
@options.reporting
def command(
    models: tuple[Path, ...], tokens: tuple[int, ...], threads: int, rounds: int | None, output: Output
) -> None:
    """Interleaved timing: every round runs each model once on the same input, in rotating order.

    Prints medians, 10th and 90th percentiles, the ratio to the first model (the median of the rounds'
    ratios), and each model's creation time and resident memory, from a process of its own.
    """
    from sparse_onnx.bench.api import bench

    with output.progress(f"measuring {len(models)} models") as progress:
        report = bench(models, tokens=tokens, threads=threads, rounds=rounds, progress=progress)
    output.report(report)
