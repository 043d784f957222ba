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
class Rule:
    """Blocks that run best in another form than the target's first; all conditions must hold.

    Attributes:
        form: name and options, as in ``branched:style=group``.
        reason: what was measured.
        bits: width of the stored weights, 0 for floating point; None for any.
        experts: least number of experts of the block.
        all_experts: least number of experts of all blocks of the model together.
    """

    form: str
    reason: str
    bits: int | None = None
    experts: int = 0
    all_experts: int = 0

    def holds(self, bits: int, experts: int, all_experts: int) -> bool:
        wide_enough = self.bits is None or self.bits == bits
        return wide_enough and experts >= self.experts and all_experts >= self.all_experts


@dataclasses.dataclass(frozen=True)
class TargetProfile:
    """What a target runs.

    Attributes:
        forms: that it can run; the first is taken where no rule holds, and where another form refuses.
        rules: the first that holds decides a block's form.
        candidates: what tuning measures, by the width of the stored weights in bits (``0``: floating point).
        provenance: where each entry was measured or read.
    """

    name: str
    provider: str
    summary: str
    onnxruntime: str
    forms: tuple[str, ...]
    dtypes: tuple[str, ...]
    provenance: dict[str, str]
    rules: tuple[Rule, ...] = ()
    candidates: dict[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)


@functools.cache
def _profiles() -> dict[str, TargetProfile]:
    profiles = {}
    for entry in importlib.resources.files(__package__).iterdir():
        if entry.name.endswith(".toml"):
            data: dict[str, Any] = tomllib.loads(entry.read_text(encoding="utf-8"))
            data["forms"], data["dtypes"] = tuple(data["forms"]), tuple(data["dtypes"])
            data["rules"] = tuple(Rule(**rule) for rule in data.get("rules", ()))
            data["candidates"] = {key: tuple(forms) for key, forms in data.get("candidates", {}).items()}
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
