"""`python -m sparse_onnx.bench.coverage`: which models each exporter takes.

Every architecture with experts of the installed transformers, tiny and with random weights, is exported by
torch.onnx.export, transformers' OnnxExporter and sparse-onnx; each file is run in ONNX Runtime on seven inputs of
sizes that were not traced and compared with torch. A cell runs in a process of its own. With --json an interrupted
run goes on where it was.
"""

from __future__ import annotations

import sys
from pathlib import Path

import click

from sparse_onnx.bench.coverage import cases as every_case
from sparse_onnx.bench.coverage import exporters, page, run, table
from sparse_onnx.core.errors import SparseOnnxError


@click.command(help=__doc__)
@click.option("--architecture", "names", multiple=True, metavar="NAME", help="Only these; default: all.")
@click.option("--exporter", "chosen", multiple=True, type=click.Choice(list(exporters.EXPORTERS)))
@click.option("--cases", default=every_case.ARCHITECTURES, metavar="MODULE:FUNCTION", help="Other models.")
@click.option("--rows", default="architecture", help="What a row of the table is called.")
@click.option("--json", "file", type=click.Path(path_type=Path), help="Results; an earlier run goes on.")
@click.option("--docs", type=click.Path(path_type=Path), help="Writes the table, Markdown.")
@click.option(
    "--with-cache",
    type=click.Path(path_type=Path, exists=True),
    metavar="JSON",
    help="Results of --cases sparse_onnx.bench.coverage.cases:with_cache, a second table of that page.",
)
@click.option(
    "--half",
    type=(click.Choice(list(every_case.HALF)), click.Path(path_type=Path, exists=True)),
    multiple=True,
    metavar="TYPE JSON",
    help="Results of --cases sparse_onnx.bench.coverage.cases:TYPE, what differs there.",
)
@click.option("--timeout", default=300.0, show_default=True, metavar="S", help="Seconds a cell.")
@click.option("--memory", default=12.0, show_default=True, metavar="GB", help="Memory a cell.")
@click.option("--again", is_flag=True, help="Measures what the JSON file holds already, too.")
def main(
    names: tuple[str, ...],
    chosen: tuple[str, ...],
    cases: str,
    rows: str,
    file: Path | None,
    docs: Path | None,
    with_cache: Path | None,
    half: tuple[tuple[str, Path], ...],
    timeout: float,
    memory: float,
    again: bool,
) -> None:
    columns = [name for name in exporters.EXPORTERS if name in (chosen or page.USUAL)]
    try:
        known = {case.name for case in every_case.load(cases)}
        unknown = sorted(set(names) - known)
        if unknown:
            raise click.UsageError(f"no such model: {', '.join(unknown)}")
        cached = None if with_cache is None else run.read(with_cache)
        halves = {kind: run.read(path) for kind, path in half}
        document = run.sweep(
            cases,
            names,
            columns,
            file=file,
            timeout=timeout,
            memory_gb=memory,
            again=again,
            say=lambda text: click.echo(text, err=True),
        )
    except SparseOnnxError as error:
        click.echo(f"error: {error}", err=True)
        sys.exit(error.exit_code)
    if docs is None:
        click.echo(table.markdown(document, page.columns(document), rows))
        return
    docs.write_text(page.markdown(document, cached, cases, rows, halves))


if __name__ == "__main__":
    main()
