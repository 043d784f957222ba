"""`sparse-onnx targets`."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import click
from rich.console import Console

from sparse_onnx.cli import options
from sparse_onnx.cli.output import Output


@click.command("targets")
@options.show
@options.reporting
def command(name: str | None, output: Output) -> None:
    """The catalogue of targets: execution providers, and what each one runs best.

    `targets show NAME` prints a profile, and where each entry was measured or read. NAME may be a provider's
    full name.
    """
    from sparse_onnx import targets

    if name is None:
        entries = [_entry(known) for known in targets.names()]
        output.catalogue("targets", entries, lambda out: _list(out, entries))
    else:
        entry = _entry(name)
        output.catalogue("targets", [entry], lambda out: _show(out, entry))


def _entry(name: str) -> dict[str, Any]:
    from sparse_onnx import targets

    entry = dataclasses.asdict(targets.get(name))
    return {key: list(value) if isinstance(value, tuple) else value for key, value in entry.items()}


def _list(out: Console, entries: list[dict[str, Any]]) -> None:
    from sparse_onnx.cli.render import table

    columns = ["name", "provider", "summary"]
    table(out, columns, [[entry[column] for column in columns] for entry in entries])


def _show(out: Console, entry: dict[str, Any]) -> None:
    from sparse_onnx.cli.render import table

    table(out, ["entry", "value"], _rows(entry))


def _rows(entry: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Nested tables as rows `table.key`."""
    for key, value in entry.items():
        if isinstance(value, dict):
            yield from _rows(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", ", ".join(value) if isinstance(value, list) else value
