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

    return _plain(dataclasses.asdict(targets.get(name)))


def _plain(value: Any) -> Any:
    """Tuples as lists, at any depth."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


def _list(out: Console, entries: list[dict[str, Any]]) -> None:
    from sparse_onnx.cli.render import table

    columns = ["name", "provider", "summary"]
    table(out, columns, [[entry[column] for column in columns] for entry in entries])


def _show(out: Console, entry: dict[str, Any]) -> None:
    from sparse_onnx.cli.render import table

    table(out, ["entry", "value"], _rows(entry))


def _rows(entry: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Nested tables as rows `table.key`, lists of tables as rows `table.number`."""
    for key, value in entry.items():
        if isinstance(value, dict):
            yield from _rows(value, f"{prefix}{key}.")
        elif isinstance(value, list) and value and isinstance(value[0], dict):
            for number, item in enumerate(value, start=1):
                conditions = ", ".join(f"{name} {given}" for name, given in item.items() if given)
                yield f"{prefix}{key}.{number}", conditions
        else:
            yield f"{prefix}{key}", ", ".join(value) if isinstance(value, list) else value
