"""`sparse-onnx calibrate`."""

from __future__ import annotations

from pathlib import Path

import click

from sparse_onnx.cli import options
from sparse_onnx.cli.output import Output, unwritable


@click.command("calibrate")
@options.model("model")
@click.option(
    "--data",
    metavar="PATH",
    multiple=True,
    required=True,
    type=click.Path(path_type=Path),
    help="Text, .npz or .npy arrays by input name, or a folder of either; repeatable.",
)
@click.option(
    "-o",
    "--out",
    metavar="CALIB.json",
    type=click.Path(path_type=Path),
    help="Where the statistics go; without it they are only shown.",
)
@click.option(
    "--length", type=click.IntRange(min=2), default=256, show_default=True, help="Tokens of a window of text."
)
@click.option(
    "--runs", type=click.IntRange(min=1), help="Use so many windows, spread over the data; default: all."
)
@click.option(
    "--tokenizer",
    metavar="PATH",
    type=click.Path(path_type=Path),
    help="A tokenizer.json or its folder; default: the one beside MODEL.",
)
@click.option(
    "--rows",
    type=click.IntRange(min=8),
    default=1024,
    show_default=True,
    help="Rows sampled of what each layer reads; memory and disk grow with them.",
)
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Of the samples.")
@options.threads(None, "ONNX Runtime threads; default: all processors.")
@options.reporting
def command(
    model: Path,
    data: tuple[Path, ...],
    out: Path | None,
    length: int,
    runs: int | None,
    tokenizer: Path | None,
    rows: int,
    seed: int,
    threads: int | None,
    output: Output,
) -> None:
    """Run MODEL over your data; write what its linear layers read and where its tokens go.

    For each layer: zeros, median, mode, medians of channels, quantiles, and how far its results move when small
    inputs are dropped, measured on held-out rows. For each mixture of experts: loads, co-activation, weights, experts
    that no token reaches. `optimize --thresholds CALIB.json` reads the file; it is of this model alone.
    """
    from sparse_onnx.calibrate.api import calibrate
    from sparse_onnx.cli.calibration import render

    if out is not None and (reason := unwritable(str(out))):
        raise click.BadParameter(reason, param_hint="-o")
    with output.bar(f"preparing {model}") as progress:
        found = calibrate(
            model,
            data,
            out,
            length=length,
            runs=runs,
            tokenizer=tokenizer,
            rows=rows,
            seed=seed,
            threads=threads,
            progress=progress,
        )
    output.document(found.dumps(), lambda console: render(found, console, verbose=output.verbose))
