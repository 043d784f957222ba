"""`sparse-onnx diff`."""

from __future__ import annotations

from pathlib import Path

import click

from sparse_onnx.cli import options
from sparse_onnx.cli.output import Output


@click.command("diff")
@options.model("a")
@options.model("b")
@options.reporting
def command(a: Path, b: Path, output: Output) -> None:
    """What changed from A to B: nodes by operator, forms of blocks, weights, interface, functions."""
    from sparse_onnx.inspect.api import diff

    with output.progress(f"comparing {a} with {b}"):
        report = diff(a, b)
    output.report(report)
