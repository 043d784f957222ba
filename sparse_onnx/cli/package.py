"""`sparse-onnx package`."""

from __future__ import annotations

from pathlib import Path

import click

from sparse_onnx.cli import options
from sparse_onnx.cli.output import Output


@click.command("package")
@options.model("model")
@click.argument("folder", metavar="DIR", type=click.Path(path_type=Path))
@options.target
@click.option(
    "--variant",
    "forms",
    metavar="FORM",
    multiple=True,
    help="Ship the model in this execution form too; repeatable. `run.py --tune` takes the fastest on the device.",
)
@click.option("--variants", is_flag=True, help="Each form that the target takes and the model can have.")
@click.option(
    "--page/--no-page",
    default=None,
    help="A page that generates text in a browser and shows each byte's experts. [default: for wasm and webgpu, "
    "where it can run the model]",
)
@options.reporting
def command(
    model: Path,
    folder: Path,
    target: str,
    forms: tuple[str, ...],
    variants: bool,
    page: bool | None,
    output: Output,
) -> None:
    """Write DIR: MODEL with all that it needs, a manifest, and runners that check it where it arrives.

    The runners (run.py, run.mjs, run.cc) verify the files, run a smoke input and compare its outputs with those of
    this machine. DIR must not exist, or be empty; it appears whole or not at all.
    """
    from sparse_onnx.package.api import package

    with output.progress(f"packaging {model}") as progress:
        report = package(
            model, folder, target=target, forms=forms, all_forms=variants, page=page, progress=progress
        )
    output.report(report)
