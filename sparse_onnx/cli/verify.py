"""`sparse-onnx verify`."""

from __future__ import annotations

from pathlib import Path

import click

from sparse_onnx.cli import options
from sparse_onnx.cli.output import Output
from sparse_onnx.core.errors import VerificationError


@click.command("verify")
@options.model("a")
@options.model("b")
@options.target
@options.threads(None, "ONNX Runtime threads; default: two to four.")
@click.option(
    "--tolerance",
    type=click.FloatRange(min=0),
    help="Accepted error relative to the scale of its row; default: by element type.",
)
@options.reporting
def command(
    a: Path, b: Path, target: str, threads: int | None, tolerance: float | None, output: Output
) -> None:
    """Does B give A's answers? Runs both on routing-aware inputs of several shapes. Exit code 4 if not."""
    from sparse_onnx.verify.api import verify

    with output.progress(f"comparing {a} with {b}") as progress:
        report = verify(a, b, target=target, threads=threads, tolerance=tolerance, progress=progress)
    output.report(report)
    if report.verify is not None and report.verify.passed is False:
        raise click.exceptions.Exit(VerificationError.exit_code)
