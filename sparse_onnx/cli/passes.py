"""`sparse-onnx passes`."""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any

import click
from rich.console import Console

from sparse_onnx.cli import options
from sparse_onnx.cli.output import Output


@click.command("passes")
@options.show
@options.reporting
def command(name: str | None, output: Output) -> None:
    """The catalogue of passes, built-in and installed.

    `passes show NAME` prints a pass's own words - what it does, when, what it refuses - and its options.
    """
    from sparse_onnx.core import registry

    if name is None:
        entries = [_entry(known) for known in registry.names()]
        output.catalogue("passes", entries, lambda out: _list(out, entries))
    else:
        entry = {**_entry(name), "doc": inspect.getdoc(registry.get(name)) or ""}
        output.catalogue("passes", [entry], lambda out: _show(out, entry))


def _entry(name: str) -> dict[str, Any]:
    from sparse_onnx.core import passes, registry

    pass_class = registry.get(name)
    described = [
        {
            "name": option.name,
            "type": getattr(option.type, "__name__", str(option.type)),
            "default": None if option.default is dataclasses.MISSING else option.default,
            "help": option.help,
        }
        for option in passes.options(pass_class)
    ]
    return {"name": name, "kind": pass_class.kind, "summary": pass_class.summary, "options": described}


def _list(out: Console, entries: list[dict[str, Any]]) -> None:
    from sparse_onnx.cli.render import table

    columns = ["name", "kind", "summary"]
    table(out, columns, [[entry[column] for column in columns] for entry in entries])


def _show(out: Console, entry: dict[str, Any]) -> None:
    from sparse_onnx.cli.render import line, table

    line(out, f"{entry['name']} ({entry['kind']}): {entry['summary']}")
    line(out, "")
    for text in entry["doc"].splitlines():
        line(out, text)
    line(out, "")
    rows = [
        (option["name"], option["type"], option["default"], option["help"]) for option in entry["options"]
    ]
    if rows:
        table(out, ["option", "type", "default", ""], rows)
    else:
        line(out, "no options")
