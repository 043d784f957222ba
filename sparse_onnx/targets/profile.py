"""Target profiles, one TOML file each in this folder."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import importlib.resources
import sys
from typing import Any

from sparse_onnx.core.errors import UsageError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


@dataclasses.dataclass(frozen=True)
class TargetProfile:
    """What a target runs. `forms` is ordered, best first; `provenance` says where each entry was measured or read."""

    name: str
    provider: str
    summary: str
    onnxruntime: str
    forms: tuple[str, ...]
    dtypes: tuple[str, ...]
    provenance: dict[str, str]


@functools.cache
def _profiles() -> dict[str, TargetProfile]:
    profiles = {}
    for entry in importlib.resources.files(__package__).iterdir():
        if entry.name.endswith(".toml"):
            data: dict[str, Any] = tomllib.loads(entry.read_text(encoding="utf-8"))
            data["forms"], data["dtypes"] = tuple(data["forms"]), tuple(data["dtypes"])
            profiles[data["name"]] = TargetProfile(**data)
    return profiles


def names() -> list[str]:
    return sorted(_profiles())


def get(name: str) -> TargetProfile:
    """The profile of a target, by its short name (`cpu`) or its provider's (`CPUExecutionProvider`).

    Raises:
        UsageError: no such target.
    """
    for profile in _profiles().values():
        if name.lower() in (profile.name, profile.provider.lower()):
            return profile
    close = difflib.get_close_matches(name.lower(), names(), n=1, cutoff=0.6)
    hint = f"did you mean '{close[0]}'?" if close else f"known targets: {', '.join(names())}"
    raise UsageError(f"unknown target '{name}'", hint)
