"""What `sparse_onnx.bench.thresholded` found: kept as JSON, from which a run goes on, and as tables of a page."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from sparse_onnx.bench.tables import markdown as table
from sparse_onnx.core.errors import ModelError
from sparse_onnx.core.report import tool_versions
from sparse_onnx.targets import machine

BEGIN, END = "<!-- thresholded layers: begin -->", "<!-- thresholded layers: end -->"
_SIZES = ("dtype", "inputs", "outputs", "tokens", "threads")


@dataclasses.dataclass(frozen=True)
class Row:
    """One kind of layer: milliseconds a layer by share of inputs skipped, a percentage; of dense ones by "0"."""

    name: str
    native: bool
    ms: dict[str, float]


def read(file: Path | None, stack_mb: float, rounds: int) -> dict[str, Any]:
    """The results of an earlier run, or none.

    Raises:
        ModelError: the file holds something else, or was measured in another way, with other versions or elsewhere.
    """
    document = {
        "schema": 1,
        "command": "thresholded",
        "tool": tool_versions(),
        "machine": {"processor": machine.processor(), "cores": os.cpu_count()},
        "stack_mb": stack_mb,
        "rounds": rounds,
        "cells": [],
    }
    if file is None or not file.exists():
        return document
    try:
        found: dict[str, Any] = json.loads(file.read_text())
        same = {key: found[key] for key in document if key != "cells"}
        list(_cells(found))
    except (ValueError, KeyError, TypeError) as error:
        raise ModelError("the file holds no results of this benchmark", where=str(file)) from error
    if same != {key: value for key, value in document.items() if key != "cells"}:
        raise ModelError(
            "the results are of other versions, another machine or other settings",
            "name another file",
            where=str(file),
        )
    return found


def known(document: dict[str, Any], *sizes: object) -> bool:
    return any(tuple(cell[name] for name in _SIZES) == sizes for cell in document["cells"])


def add(
    document: dict[str, Any],
    dtype: str,
    inputs: int,
    outputs: int,
    tokens: int,
    threads: int,
    rows: Sequence[Row],
    file: Path | None,
) -> None:
    """Into the document, and the file, which is whole at any time."""
    sizes = dict(zip(_SIZES, (dtype, inputs, outputs, tokens, threads), strict=True))
    document["cells"].append({**sizes, "rows": [dataclasses.asdict(row) for row in rows]})
    if file is None:
        return
    file.parent.mkdir(parents=True, exist_ok=True)
    written = file.with_name(f"{file.name}.part")
    written.write_text(json.dumps(document, indent=1) + "\n")
    os.replace(written, file)


def put(path: Path, document: dict[str, Any]) -> None:
    """Puts the tables between the marks of a page.

    Raises:
        ModelError: the page has no such marks.
    """
    text = path.read_text()
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ModelError(f"the page has no marks '{BEGIN}' and '{END}'", where=str(path))
    path.write_text(f"{before}{BEGIN}\n\n{markdown(document)}\n\n{END}{after}")


def markdown(document: dict[str, Any]) -> str:
    """The tables: of few tokens one a shape and number of threads, of many one for all."""
    about, tool = document["machine"], document["tool"]
    lines = [
        f"{about['processor']}, {about['cores']} cores, ONNX Runtime {tool['onnxruntime']}; wall clock, medians of "
        f"{document['rounds']} rounds in which all take turns, stacks of {document['stack_mb']:g} MB. "
        "Ratios to the fastest dense layer of the type; at a share s the limit is 1 / (1 - s)."
    ]
    cells = [(cell, [Row(**row) for row in cell["rows"]]) for cell in _cells(document)]
    groups: dict[tuple[int, ...], list[tuple[dict[str, Any], list[Row]]]] = {}
    for cell, rows in cells:
        key: tuple[int, ...] = (cell["tokens"], cell["inputs"], cell["outputs"], cell["threads"])
        if all(len(row.ms) == 1 for row in rows):
            key = key[:1]
        groups.setdefault(key, []).append((cell, rows))
    for key, members in groups.items():
        lines += ["", _title(key), "", _many(members) if len(key) == 1 else _few(members)]
    return "\n".join(lines)


def _title(key: tuple[int, ...]) -> str:
    tokens = f"{key[0]} token{'s' if key[0] > 1 else ''}"
    if len(key) == 1:
        return f"{tokens}, nothing skipped:"
    return f"{tokens}, {key[1]}x{key[2]}, {key[3]} thread{'s' if key[3] > 1 else ''}:"


def _few(members: Sequence[tuple[dict[str, Any], list[Row]]]) -> str:
    shares = sorted({share for _, rows in members for row in rows for share in row.ms}, key=int)
    lines = []
    for cell, rows in members:
        dense = _fastest(rows)
        for row in rows:
            if row.native:
                ratios = [_ratio(dense, row, share) for share in shares]
                lines.append([cell["dtype"], f"{dense.name}, {dense.ms['0']:.2f}", _scales(row), *ratios])
    return table(["type", "fastest dense, ms", "thresholded", *(f"{share} %" for share in shares)], lines)


def _many(members: Sequence[tuple[dict[str, Any], list[Row]]]) -> str:
    """A row a type and kind, a column a shape and number of threads."""
    places = dict.fromkeys((c["inputs"], c["outputs"], c["threads"]) for c, _ in members)
    found: dict[tuple[str, str], dict[tuple[int, ...], str]] = {}
    for cell, rows in members:
        dense, place = _fastest(rows), (cell["inputs"], cell["outputs"], cell["threads"])
        found.setdefault((cell["dtype"], "fastest dense, ms"), {})[place] = (
            f"{dense.name}, {dense.ms['0']:.1f}"
        )
        for row in rows:
            if row is not dense:
                found.setdefault((cell["dtype"], _scales(row)), {})[place] = _ratio(dense, row, "0")
    columns = ["type", "layer", *(f"{k}x{n}, {t} thread{'s' if t > 1 else ''}" for k, n, t in places)]
    return table(columns, [[*key, *(each.get(place, "") for place in places)] for key, each in found.items()])


def _fastest(rows: Sequence[Row]) -> Row:
    return min((row for row in rows if not row.native), key=lambda row: row.ms["0"])


def _ratio(dense: Row, row: Row, share: str) -> str:
    return f"{dense.ms['0'] / row.ms[share]:.2f}" if share in row.ms else ""


def _scales(row: Row) -> str:
    return row.name if not row.native else row.name.removeprefix("thresholded, ")


def _cells(document: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for cell in document["cells"]:
        if [*cell] != [*_SIZES, "rows"]:
            raise KeyError("a cell")
        yield cell
