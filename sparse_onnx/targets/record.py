"""The record of a probe as a file: what a target was seen to run, when, and by which versions."""

from __future__ import annotations

import dataclasses
import datetime
import json
import platform
from collections.abc import Mapping
from pathlib import Path

from sparse_onnx.core.errors import OutsideError
from sparse_onnx.targets.profile import FormResult, Operator, TargetProfile

SOURCE = "probe"


@dataclasses.dataclass(frozen=True)
class Record:
    """Operators and forms of a target, as probed by `versions`."""

    target: str
    versions: str
    operators: Mapping[str, Operator]
    results: Mapping[str, FormResult]

    def text(self) -> str:
        day = datetime.date.today().isoformat()
        source = f"probed {day}, {self.versions}, {platform.system()} {platform.machine()}"
        lines = [f"# Written by `sparse-onnx targets probe {self.target}`.", "", "[sources]"]
        lines += [f"{SOURCE} = {json.dumps(source)}", "", "[operators]"]
        lines += [f"{json.dumps(key)} = {_table(entry)}" for key, entry in self.operators.items()]
        lines += ["", "[results]"]
        lines += [f"{json.dumps(key)} = {_table(entry)}" for key, entry in self.results.items()]
        return "\n".join(lines) + "\n"

    def write(self, path: Path) -> None:
        """
        Raises:
            OutsideError: it cannot be written.
        """
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(self.text(), encoding="utf-8")
        except OSError as error:
            raise OutsideError(f"the record cannot be written: {error.strerror}", "", str(path)) from error


def _table(entry: Operator | FormResult) -> str:
    """An inline table of TOML; what is empty is left out."""
    parts = []
    for field in dataclasses.fields(entry):
        value = getattr(entry, field.name)
        if value == "" or (value == () and field.name != "types"):
            continue
        parts.append(f"{field.name} = {json.dumps(list(value) if isinstance(value, tuple) else value)}")
    return f"{{ {', '.join(parts)} }}"


def drift(profile: TargetProfile, record: Record) -> list[str]:
    """Where the probe says something else than the profile; notes are not compared."""
    found = []
    for key, entry in record.operators.items():
        known = profile.operators.get(key)
        if known is None or set(known.types) != set(entry.types):
            old = "nothing" if known is None else ", ".join(known.types) or "no type"
            found.append(f"{key}: the profile says {old}, the probe {', '.join(entry.types) or 'no type'}")
    for key, result in record.results.items():
        before = profile.results.get(key)
        if before is None or _verdict(before) != _verdict(result):
            old = "nothing" if before is None else _verdict(before)
            found.append(f"form {key}: the profile says {old}, the probe {_verdict(result)}")
    return found


def _verdict(result: FormResult) -> str:
    words = ["runs" if result.runs else "does not run"]
    if result.runs:
        words += ["right" if result.right else "wrong"]
        words += ["whole" if result.whole else f"not whole: {', '.join(result.left)}"]
    return ", ".join(words)
