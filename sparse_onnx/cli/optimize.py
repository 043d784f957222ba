"""`sparse-onnx optimize`."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import click

from sparse_onnx.cli import options, skipping
from sparse_onnx.cli.output import Output
from sparse_onnx.core.settings import parse_settings


def parse_passes(texts: tuple[str, ...]) -> dict[str, dict[str, str]]:
    """`NAME:option=value,option=value` each -> {NAME: {option: value}}; a NAME given twice adds up."""
    passes: dict[str, dict[str, str]] = {}
    for text in texts:
        try:
            name, settings = parse_settings(text)
        except ValueError as error:
            raise click.BadParameter(str(error), param_hint="--pass") from None
        passes.setdefault(name, {}).update(settings)
    return passes


@click.command("optimize")
@options.model("in")
@click.argument("out", metavar="OUT", required=False, type=click.Path(path_type=Path))
@options.target
@click.option(
    "--form",
    metavar="auto|grouped|branched|gathered|fused|dense",
    default="auto",
    show_default=True,
    help="Execution form of the sparse blocks; auto: the target's profile decides.",
)
@click.option("--tune", is_flag=True, help="Measure the forms here and give each block the fastest.")
@options.tokens("1,64", "Token counts that --tune measures at.")
@options.threads(None, "Threads that --tune and --eval-data measure with; default: all processors.")
@click.option(
    "--tuning",
    metavar="FILE",
    type=click.Path(path_type=Path),
    help="With --tune: keep the measurements there, and use those it has; without: let them decide.",
)
@click.option(
    "--quantize",
    type=click.Choice(["int4", "int8"]),
    help="Store experts in 4 or 8 bits (lossy); --pass quantize_experts:... for the block size.",
)
@skipping.thresholds
@click.option(
    "--pass",
    "passes",
    metavar="NAME:option=value,...",
    multiple=True,
    help="Run a pass with these options; repeatable. `sparse-onnx passes` lists them.",
)
@click.option("--skip", metavar="NAME", multiple=True, help="Leave a pass out; repeatable.")
@click.option(
    "--weights",
    type=click.Choice(["link", "copy", "prepacked"]),
    help="Name the input's weight file, copy it, or copy it with packed weights, which keeps unused experts out of "
    "memory and doubles the file; default: link beside the input, else copy.",
)
@click.option(
    "--verify",
    type=click.Choice(["each", "final", "none"]),
    default="final",
    show_default=True,
    help="Compare with the original after each pass, at the end, or not at all.",
)
@click.option(
    "--static",
    metavar="AXIS=N,...",
    multiple=True,
    help="A graph of these sizes, as batch=1,sequence=1, instead of open ones; each further one goes beside OUT.",
)
@click.option(
    "--no-fallback", is_flag=True, help="Fail where the target's provider leaves nodes to another one."
)
@click.option("--dry-run", is_flag=True, help="Show what would be done; nothing is written.")
@click.option(
    "--explain", is_flag=True, help="Show every reason why something is left alone; with -v, every node too."
)
@options.reporting
def command(
    out: Path | None,
    target: str,
    form: str,
    tune: bool,
    tokens: tuple[int, ...],
    threads: int | None,
    tuning: Path | None,
    quantize: Literal["int4", "int8"] | None,
    skipping: dict[str, Any],
    passes: tuple[str, ...],
    skip: tuple[str, ...],
    weights: Literal["link", "copy", "prepacked"] | None,
    verify: Literal["each", "final", "none"],
    static: tuple[str, ...],
    no_fallback: bool,
    dry_run: bool,
    explain: bool,
    output: Output,
    **positional: Path,
) -> None:
    """Rewrite IN so that ONNX Runtime neither computes nor reads what is not active, and write OUT.

    The result is compared with IN before anything is written (exit code 4 where it differs). OUT may be IN,
    and may be left out of a dry run. A model in which nothing can be done is copied, and the report says why.
    """
    from sparse_onnx.optimize.api import optimize
    from sparse_onnx.optimize.static import parse as parse_sizes

    source = positional["in"]  # a keyword of the language, hence not a parameter
    chosen = parse_passes(passes)
    with output.progress(f"optimizing {source}") as progress:
        report = optimize(
            source,
            out,
            target=target,
            form=form,
            passes=chosen or None,
            skip=skip,
            weights=weights or "auto",
            verify=verify,
            dry_run=dry_run,
            quantize=quantize,
            tune=tune,
            tokens=tokens,
            threads=threads,
            tuning=tuning,
            **skipping,
            static=[parse_sizes(text) for text in static],
            no_fallback=no_fallback,
            progress=progress,
        )
    output.report(report, explain=explain)
