"""`sparse-onnx bench`."""

from __future__ import annotations

from pathlib import Path

import click

from sparse_onnx.cli import options
from sparse_onnx.cli.output import Output


class TokenCounts(click.ParamType):
    """`1,64,256` -> (1, 64, 256)."""

    name = "tokens"

    def convert(
        self, value: object, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[int, ...]:
        if isinstance(value, tuple):
            return value
        try:
            counts = tuple(int(part) for part in str(value).split(","))
        except ValueError:
            counts = ()
        if not counts or min(counts) < 1:
            self.fail(f"'{value}' is not a list of positive numbers such as 1,64,256", param, ctx)
        return counts


@click.command("bench")
@click.argument("models", metavar="A [B ...]", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option(
    "--tokens",
    type=TokenCounts(),
    default="1,64,256",
    show_default=True,
    metavar="N,N",
    help="Token counts to measure.",
)
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
