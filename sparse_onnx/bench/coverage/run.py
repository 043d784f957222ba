"""Each cell in a process of its own, with limits of time and memory, and the results in a file from which a long
run goes on."""

from __future__ import annotations

import dataclasses
import json
import os
import resource
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from sparse_onnx.bench.coverage import measure
from sparse_onnx.bench.coverage.cases import load
from sparse_onnx.core.errors import ModelError
from sparse_onnx.core.report import tool_versions

_WORKER = "sparse_onnx.bench.coverage.run"


def sweep(
    cases: str,
    names: Sequence[str],
    exporters: Sequence[str],
    *,
    file: Path | None,
    timeout: float,
    memory_gb: float,
    again: bool,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Measures the cells that `file` does not hold yet, and writes it behind each.

    Args:
        cases: ``package.module:FUNCTION``.
        names: of cases; empty: all.
        exporters: names of `exporters.EXPORTERS`.
        file: JSON of an earlier run; may be missing.
        timeout: seconds a cell.
        memory_gb: of data a cell.
        again: measure what the file holds too.
        say: called with a line a cell.

    Returns:
        The object that the file holds.
    """
    titles = {case.name: case.title for case in load(cases)}
    document = read(file)
    for name in names or titles:
        row = document["results"].setdefault(name, {"title": titles[name], "cells": {}})
        for exporter in exporters:
            if exporter in row["cells"] and not again:
                continue
            cell = _in_a_process(cases, name, exporter, timeout, memory_gb)
            row["cells"][exporter] = cell.to_json()
            say(f"{name} {exporter}: {cell.outcome} {cell.reason[:100]}".rstrip())
            if file is not None:
                _write(file, document)
    return document


def read(file: Path | None) -> dict[str, Any]:
    """The results of an earlier run, with today's versions; none where there is no such file.

    Raises:
        ModelError: the file holds something else.
    """
    import torch
    import transformers

    tool = {**tool_versions(), "torch": torch.__version__, "transformers": transformers.__version__}
    if file is None or not file.exists():
        return {"schema": 1, "command": "coverage", "tool": tool, "results": {}}
    try:
        document: dict[str, Any] = json.loads(file.read_text())
        document["results"].items()
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"no results of an earlier run: {error}", where=str(file)) from error
    return {**document, "tool": tool}


def _write(file: Path, document: dict[str, Any]) -> None:
    fresh = file.with_name(f".{file.name}.new")
    fresh.write_text(json.dumps(document, indent=1, sort_keys=True, allow_nan=False) + "\n")
    os.replace(fresh, file)


def _in_a_process(cases: str, name: str, exporter: str, timeout: float, memory_gb: float) -> measure.Cell:
    limit = int(memory_gb * (1 << 30))
    command = [sys.executable, "-m", _WORKER, cases, name, exporter]
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            timeout=timeout,
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_DATA, (limit, limit)),
            env={**os.environ, "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""},
        )
    except subprocess.TimeoutExpired:
        return measure.Cell(measure.FAILED, f"not done after {timeout:g} s", seconds=timeout)
    lines = done.stdout.strip().splitlines()
    if done.returncode == 0 and lines:
        return measure.Cell(**json.loads(lines[-1]))
    if done.returncode < 0:
        return measure.Cell(measure.FAILED, f"the process died of signal {-done.returncode}")
    said = done.stderr.strip().splitlines()
    return measure.Cell(measure.FAILED, said[-1][:300] if said else f"exit code {done.returncode}")


def _worker(cases: str, name: str, exporter: str) -> None:
    case = next(case for case in load(cases) if case.name == name)
    cell = measure.measure(case, exporter)
    print(json.dumps(dataclasses.asdict(cell)))


if __name__ == "__main__":
    _worker(*sys.argv[1:4])
