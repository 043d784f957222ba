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
@click.argument(
    "action", metavar="[show NAME | probe [NAME]]", required=False, type=click.Choice(["show", "probe"])
)
@click.argument("name", metavar="", required=False)
@click.option(
    "--shipped", is_flag=True, help="probe: write the record into the package, not into the user's cache."
)
@options.reporting
def command(action: str | None, name: str | None, shipped: bool, output: Output) -> None:
    """The catalogue of targets: execution providers, and what each one runs best.

    `targets show NAME` prints a profile, and where each entry was measured or read. NAME may be a provider's
    full name. `targets probe NAME` runs tiny models on the target and writes down what it runs; without NAME, on each
    target that this machine can run. `optimize` follows the record from then on.
    """
    from sparse_onnx import targets

    if action == "show" and name is None:
        raise click.UsageError("'show' needs a NAME")
    if action == "probe":
        _probe(name, shipped, output)
    elif name is None:
        entries = [_entry(known) for known in targets.names()]
        output.catalogue("targets", entries, lambda out: _list(out, entries))
    else:
        entry = _entry(name)
        output.catalogue("targets", [entry], lambda out: _show(out, entry))


def _probe(name: str | None, shipped: bool, output: Output) -> None:
    from sparse_onnx import targets
    from sparse_onnx.bench.probing import probe
    from sparse_onnx.targets import places, profile, record

    if name is None:
        names = [each for each in targets.names() if places.place(targets.get(each)) is not None]
    else:
        names = [targets.get(name).name]
    entries = []
    for each in names:
        known = targets.get(each)
        with output.progress(f"probing {each}") as progress:
            found = probe(known, progress)
        path = profile.shipped(each) if shipped else profile.probed_here(each)
        found.write(path)
        changes = record.drift(known, found)
        entries.append({"name": each, "path": str(path), "versions": found.versions, "drift": changes})
    profile.forget()
    output.catalogue("probes", entries, lambda out: _probed(out, entries))


def _probed(out: Console, entries: list[dict[str, Any]]) -> None:
    from sparse_onnx.cli.render import line

    for entry in entries:
        line(out, f"{entry['name']}: probed with {entry['versions']}, written to {entry['path']}")
        for change in entry["drift"]:
            line(out, f"  {change}")
        if not entry["drift"]:
            line(out, "  as its profile says")


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
    """Nested tables as rows `table.key`, lists of tables as rows `table.number`; an operator or form is one row."""
    for key, value in entry.items():
        if key in ("operators", "results"):
            for name, item in value.items():
                yield f"{key}.{name}", _words(item)
        elif isinstance(value, dict):
            yield from _rows(value, f"{prefix}{key}.")
        elif isinstance(value, list) and value and isinstance(value[0], dict):
            for number, item in enumerate(value, start=1):
                conditions = ", ".join(f"{name} {given}" for name, given in item.items() if given)
                yield f"{prefix}{key}.{number}", conditions
        else:
            yield f"{prefix}{key}", ", ".join(value) if isinstance(value, list) else value


def _words(item: dict[str, Any]) -> str:
    """What a provider runs of an operator, or how a form went, in one cell."""
    if "types" in item:
        said = ", ".join(item["types"]) or "-"
    else:
        said = ", ".join(word for word in ("runs", "right", "whole") if item[word]) or "does not run"
        said += f"; not on the provider: {', '.join(item['left'])}" if item["left"] else ""
    return f"{said}{'; ' + item['note'] if item['note'] else ''} [{item['source']}]"
