"""`sparse-onnx inspect`."""

from __future__ import annotations

from pathlib import Path

import click

from sparse_onnx.cli import options
from sparse_onnx.cli.output import Output


@click.command("inspect")
@options.model("model")
@options.reporting
def command(model: Path, output: Output) -> None:
    """What is sparse in MODEL: blocks, routers, experts, total and active parameters, and known hazards.

    Also what `optimize` would leave alone, and why. Many equal layers are one row; -v lists each. The model is read,
    never run; weights are not loaded.
    """
    from sparse_onnx.inspect.api import inspect

    with output.progress(f"reading {model}"):
        report = inspect(model)
    output.report(report, explain=True)
