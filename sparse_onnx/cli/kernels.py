"""`sparse-onnx kernels`."""

from __future__ import annotations

import click

from sparse_onnx.cli import options
from sparse_onnx.cli.output import Output


@click.command("kernels")
@click.argument("action", type=click.Choice(["build", "path"]))
@click.option("--force", is_flag=True, help="Compile even if it was done already.")
@options.reporting
def command(action: str, force: bool, output: Output) -> None:
    """The native kernels: `kernels build` compiles them with this machine's C++ compiler, `kernels path` says where
    they are.

    They run thresholded layers without reading the weights of skipped inputs. The same model runs without them, at the
    speed of a dense one.
    """
    from sparse_onnx.kernels import build, path

    if action == "build":
        with output.progress("building the kernels") as progress:
            found = build(force=force, progress=progress)
    else:
        found = path()
    output.catalogue(
        "kernels", [{"path": str(found)}], lambda out: out.print(str(found), soft_wrap=True, highlight=False)
    )
