"""Target profiles: one TOML file each in this folder, and one in `probed` of what was run on the target itself."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import importlib.resources
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sparse_onnx.core.errors import UsageError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

#: Records of probes on this machine, which come before the shipped ones.
PROBED_VARIABLE = "SPARSE_ONNX_PROBED"


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
class Operator:
    """What a provider runs of an operator.

    Attributes:
        types: element types of its first input, as `float32`, that it runs; ``*``: all that the provider has. Integers
            are probed as experts' indices are: not negative.
        source: key of the profile's `sources`.
        note: limits that types do not tell, and how it fails.
    """

    types: tuple[str, ...]
    source: str
    note: str = ""

    def runs(self, dtype: str | None) -> bool:
        return bool(self.types) and (dtype is None or "*" in self.types or dtype in self.types)


@dataclasses.dataclass(frozen=True)
class FormResult:
    """A block in one form on the target: whether it runs, is right, lies on the provider as a whole, and what of it
    does not."""

    runs: bool
    right: bool
    whole: bool
    left: tuple[str, ...] = ()
    note: str = ""
    source: str = "probe"


@dataclasses.dataclass(frozen=True)
class TargetProfile:
    """What a target runs.

    Attributes:
        forms: that it can run, best first, with their options; the first is taken where no rule holds, and where
            another form refuses.
        rules: the first that holds decides a block's form.
        never: forms that are never taken, and why.
        candidates: what tuning measures, by the width of the stored weights in bits (``0``: floating point).
        static: whether it runs graphs of static shapes alone.
        precision: what it computes float32 in.
        tolerance: accepted relative error where it computes less exactly than its type; 0: as the type.
        format: ``onnx``, or ``ort`` for the files of minimal builds.
        runtime: name of the runtime that it is tried on; None where that is this onnxruntime.
        needs: what a machine must have to run it, where no runtime can be installed.
        provider_options: for sessions on it.
        config: session configuration entries that we recommend.
        session: other options of sessions that we recommend, as onnxruntime's `SessionOptions` calls them.
        operators: what it runs, by operator: ``TopK``, ``com.microsoft.MoE``, ``ScatterND(add)``, ``Split(runtime)``.
        results: of blocks in each form, as probed.
        sources: what `source` of an entry names: a probe with its date and versions, or an address.
        provenance: where each entry beside operators and results was measured or read.
        bugs: faults of the runtime that are worked round, by a name of ours.
    """

    name: str
    provider: str
    summary: str
    onnxruntime: str
    forms: tuple[str, ...]
    dtypes: tuple[str, ...]
    provenance: dict[str, str]
    rules: tuple[Rule, ...] = ()
    never: dict[str, str] = dataclasses.field(default_factory=dict)
    candidates: dict[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    static: bool = False
    precision: str = "float32"
    tolerance: float = 0.0
    format: str = "onnx"
    runtime: str | None = None
    needs: str = ""
    provider_options: dict[str, str] = dataclasses.field(default_factory=dict)
    config: dict[str, str] = dataclasses.field(default_factory=dict)
    session: dict[str, str] = dataclasses.field(default_factory=dict)
    operators: dict[str, Operator] = dataclasses.field(default_factory=dict)
    results: dict[str, FormResult] = dataclasses.field(default_factory=dict)
    sources: dict[str, str] = dataclasses.field(default_factory=dict)
    bugs: dict[str, str] = dataclasses.field(default_factory=dict)

    @property
    def form_names(self) -> tuple[str, ...]:
        """The forms without their options, each once."""
        return tuple(dict.fromkeys(form.partition(":")[0] for form in self.forms))

    def form(self, name: str) -> str:
        """The form of that name with the target's options."""
        return next((form for form in self.forms if form.partition(":")[0] == name), name)


def read(text: str, probed: str = "") -> TargetProfile:
    """A profile from its file, and the record of a probe, whose entries come before the file's own."""
    data: dict[str, Any] = tomllib.loads(text)
    record: dict[str, Any] = tomllib.loads(probed)
    for table in ("operators", "sources", "results"):
        data[table] = {**data.get(table, {}), **record.get(table, {})}
    data["forms"], data["dtypes"] = tuple(data["forms"]), tuple(data["dtypes"])
    data["rules"] = tuple(Rule(**rule) for rule in data.get("rules", ()))
    data["candidates"] = {key: tuple(forms) for key, forms in data.get("candidates", {}).items()}
    data["operators"] = {key: Operator(**_tuples(value)) for key, value in data["operators"].items()}
    data["results"] = {key: FormResult(**_tuples(value)) for key, value in data["results"].items()}
    return TargetProfile(**data)


def _tuples(entry: Mapping[str, Any]) -> dict[str, Any]:
    return {key: tuple(value) if isinstance(value, list) else value for key, value in entry.items()}


@functools.cache
def _profiles() -> dict[str, TargetProfile]:
    folder = importlib.resources.files(__package__)
    profiles = {}
    for entry in sorted(folder.iterdir(), key=lambda each: each.name):
        if entry.name.endswith(".toml") and entry.name != "runtimes.toml":
            found = read(entry.read_text(encoding="utf-8"), _record(entry.name.removesuffix(".toml")))
            profiles[found.name] = found
    return profiles


def _record(name: str) -> str:
    """What was probed on this machine, else what is shipped; nothing where neither is there."""
    for path in (probed_here(name), shipped(name)):
        try:
            return path.read_text(encoding="utf-8")
        except OSError:
            continue
    return ""


def probed_here(name: str) -> Path:
    """Where the record of a probe on this machine lies."""
    given = os.environ.get(PROBED_VARIABLE)
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = Path(given) if given else Path(cache) / "sparse-onnx" / "probed"
    return folder / f"{name}.toml"


def shipped(name: str) -> Path:
    return Path(__file__).parent / "probed" / f"{name}.toml"


def forget() -> None:
    """Files are read again: a probe has written one."""
    _profiles.cache_clear()


def names() -> list[str]:
    return sorted(_profiles())


def get(name: str) -> TargetProfile:
    """The profile of a target, by its short name (`cpu`) or its provider's (`CPUExecutionProvider`).

    Raises:
        UsageError: no such target.
    """
    wanted = name.lower()
    for key in (lambda each: each.name, lambda each: each.provider.lower()):
        for profile in _profiles().values():
            if wanted == key(profile):
                return profile
    close = difflib.get_close_matches(wanted, names(), n=1, cutoff=0.6)
    hint = f"did you mean '{close[0]}'?" if close else f"known targets: {', '.join(names())}"
    raise UsageError(f"unknown target '{name}'", hint)
