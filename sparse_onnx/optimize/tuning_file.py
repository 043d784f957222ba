"""Measured forms in a file, so that a model is tuned once on its device and optimized anywhere."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sparse_onnx.blocks.lowering import Form
from sparse_onnx.core.errors import OutsideError, UsageError
from sparse_onnx.core.report import tool_versions
from sparse_onnx.graph.text import printable
from sparse_onnx.optimize.candidates import Kind
from sparse_onnx.optimize.tune import Measurement
from sparse_onnx.targets import machine

SCHEMA = 1


class TuningFile:
    """What a file holds of measurements: one entry a kind of block.

    Raises:
        UsageError: it cannot be read, or is no tuning file.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.entries: dict[str, dict[str, Any]] = {}
        self.environment: dict[str, Any] = {}
        if not self.path.exists():
            return
        try:
            data = json.loads(self.path.read_text(encoding="utf-8"))
            if data["schema"] != SCHEMA or data["command"] != "tuning":
                raise ValueError("another schema")
            self.entries = {entry["key"]: entry for entry in data["entries"]}
            self.environment = data["environment"]
            for entry in self.entries.values():
                _measurement(Kind(entry["block"], ("",)), entry)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UsageError(
                f"this is no tuning file: {printable(str(error))}",
                "`optimize --tune --tuning FILE` writes one",
                printable(str(path)),
            ) from None

    def get(self, kind: Kind, tokens: Sequence[int] | None = None) -> Measurement | None:
        """The measurement of a kind; None where there is none, or none at these token counts."""
        entry = self.entries.get(kind.key)
        if entry is None:
            return None
        found = _measurement(kind, entry)
        measured = {count for by_count in found.ratios.values() for count in by_count}
        return found if tokens is None or measured == set(tokens) else None

    def fits(self, environment: dict[str, Any]) -> bool:
        """Whether the measurements are of this machine, runtime and number of threads."""
        return self.environment == environment

    def save(self, measurements: Sequence[Measurement], environment: dict[str, Any]) -> None:
        """Adds measurements and writes the file, whole or not at all. Those of another machine are dropped.

        Raises:
            OutsideError: it cannot be written.
        """
        if not self.fits(environment):
            self.entries = {}
        for item in measurements:
            self.entries[item.kind.key] = {
                "key": item.kind.key,
                "block": item.kind.facts,
                "chosen": str(item.chosen),
                "median_ms": _plain(item.median_ms),
                "ratios": _plain(item.ratios),
                "left_out": item.left_out,
            }
        data = {
            "schema": SCHEMA,
            "command": "tuning",
            "environment": environment,
            "entries": list(self.entries.values()),
        }
        staged = self.path.with_name(f".{self.path.name}.{os.getpid()}")
        try:
            staged.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
            os.replace(staged, self.path)
        except OSError as error:
            staged.unlink(missing_ok=True)
            raise OutsideError(
                f"the tuning file could not be written: {error.strerror}", "", printable(str(self.path))
            ) from error


def environment(threads: int) -> dict[str, Any]:
    """What a measurement depends on beside the block."""
    return {**tool_versions(), "processor": machine.processor(), "threads": threads}


def _plain(table: dict[str, dict[int, float]]) -> dict[str, dict[str, float | None]]:
    return {
        form: {str(count): None if math.isnan(value) else value for count, value in by_count.items()}
        for form, by_count in table.items()
    }


def _measurement(kind: Kind, entry: dict[str, Any]) -> Measurement:
    def table(name: str) -> dict[str, dict[int, float]]:
        return {
            str(form): {
                int(count): math.nan if value is None else float(value) for count, value in row.items()
            }
            for form, row in entry[name].items()
        }

    left_out = {str(form): str(reason) for form, reason in entry["left_out"].items()}
    return Measurement(kind, Form.parse(entry["chosen"]), table("median_ms"), table("ratios"), left_out)
