"""The one report behind every command: `--json` prints it, the tables are views of it.

Field names are the JSON contract (schema 1). ``None`` stands for what does not apply; a NaN never appears.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import math
from typing import Any, Literal

SCHEMA = 1


@dataclasses.dataclass(frozen=True)
class Refusal:
    """Why a pass left something alone. A value, never an exception: not matching is an answer."""

    reason: str
    node: str = ""
    hint: str = ""
    by: str = ""

    def to_json(self) -> dict[str, Any]:
        return {"pass": self.by, "reason": self.reason, "node": self.node, "hint": self.hint}


@dataclasses.dataclass(frozen=True)
class ModelRecord:
    """A model on disk: nodes (subgraphs included, function bodies not), bytes of initializers, fingerprint."""

    path: str
    nodes: int
    weight_bytes: int
    fingerprint: str | None = None
    parameters: int | None = None
    active_parameters: int | None = None


@dataclasses.dataclass(frozen=True)
class BlockRecord:
    """One sparse block. `parameters` counts the experts'; `active_parameters` those that one token uses.

    `rounding` is how its kernels round activations: ``int8``, each row by itself; ``int8_batch``, all rows by one
    scale; None, not at all.
    """

    name: str
    kind: str
    spelling: str
    experts: int | None
    top_k: int | None
    hidden: int | None
    inner: int | None
    activation: str | None
    gated: bool | None
    router: str | None
    form: str | None
    parameters: int | None
    active_parameters: int | None
    rounding: str | None = None


@dataclasses.dataclass(frozen=True)
class PassRecord:
    """What one pass did."""

    name: str
    kind: Literal["exact", "lossy"]
    matched: int
    rewritten: int
    refused: int
    ms: float
    nodes_before: int
    nodes_after: int
    bytes_before: int
    bytes_after: int


@dataclasses.dataclass(frozen=True)
class VerifyRecord:
    """How a result was compared with its original.

    `passed` is None when nothing was compared. `inputs` describes each run. `tokens_left_out` counts tokens whose
    routing is a near-tie that rounding flips (`router_margin` is the smallest margin seen); they are not compared.
    `on` is what ran the result, where that is not this onnxruntime's CPU provider; `not_run` are runs that it fails
    with the original as well.
    """

    method: Literal["whole", "blocks", "none"]
    passed: bool | None
    runs: int = 0
    max_abs_error: float | None = None
    max_rel_error: float | None = None
    inputs: list[str] = dataclasses.field(default_factory=list)
    router_margin: float | None = None
    tokens_left_out: int = 0
    failure: str | None = None
    on: str | None = None
    not_run: list[str] = dataclasses.field(default_factory=list)


@dataclasses.dataclass(frozen=True)
class BenchRow:
    model: str
    tokens: int
    median_ms: float
    p10_ms: float
    p90_ms: float
    ratio_to_first: float


@dataclasses.dataclass(frozen=True)
class BenchModel:
    model: str
    create_s: float | None
    rss_mb: float | None


@dataclasses.dataclass(frozen=True)
class BenchRecord:
    """Interleaved measurement: rows a (model, token count), models with creation time and resident memory."""

    threads: int
    rounds: int
    rows: list[BenchRow]
    models: list[BenchModel]


@dataclasses.dataclass(frozen=True)
class TuningRow:
    """One form of one kind of block at one token count. `blocks` counts those of the kind; `ratio_to_default` is the
    time relative to the target's default form, the two in turn: least times of each input, averaged over inputs."""

    block: str
    blocks: int
    form: str
    tokens: int
    median_ms: float
    ratio_to_default: float
    chosen: bool


@dataclasses.dataclass(frozen=True)
class TuningRecord:
    """Forms measured on this machine, or read from `source`; `left_out` has the forms that could not be, and why."""

    tokens: list[int]
    threads: int
    processor: str
    source: str | None
    rows: list[TuningRow]
    left_out: list[str]


@dataclasses.dataclass(frozen=True)
class SiteRecord:
    """What one or several layers skip that read the same inputs.

    `layers` counts matrices, `centre` says what counts as nothing. Shares are of inputs: `expected` from calibration,
    `measured` on the evaluation data with the thresholds of all layers in effect, None without any. `bytes` of weights
    are read for one token where nothing is skipped, and `bytes_skipped` of them are not, on average.
    """

    name: str
    layers: int
    centre: str
    expected: float
    measured: float | None
    bytes: int
    bytes_skipped: int


@dataclasses.dataclass(frozen=True)
class QualityRecord:
    """One metric on evaluation data: of the result at its level, and of the dense model. `tokens` counts what was
    compared; `budget` is what was asked for, and `kept` whether it is."""

    metric: str
    value: float
    dense: float
    tokens: int
    budget: str | None
    kept: bool | None


@dataclasses.dataclass(frozen=True)
class ThresholdsRecord:
    """Thresholds that were put into a model. `bytes` are of all calibrated weights that one token reads, and
    `share_skipped` of them are not read, as `measured` on data or as calibration expects. `prefill` is
    `shared` or `copy`."""

    calibration: str
    method: str
    mode: str
    level: int
    level_input: str
    dense_first: int | None
    prefill: str
    bytes: int
    bytes_skipped: int
    share_skipped: float
    measured: bool
    quality: list[QualityRecord]
    sites: list[SiteRecord]


@dataclasses.dataclass(frozen=True)
class FitRecord:
    """The form that a target runs of one kind of block.

    `by`: the runtime that it was tried on, or ``profile``. `whole`: all of it lies on the provider; else `left` has the
    operators that do not. `rejected`: the forms before it, and why.
    """

    block: str
    blocks: int
    form: str | None
    by: str
    whole: bool
    left: list[str]
    rejected: list[str]
    names: list[str]


@dataclasses.dataclass(frozen=True)
class PlacementRecord:
    """One provider's part of a model.

    `by`: the runtime that tells, or ``profile``. `partitions` counts the pieces that it got, `operators`
    its nodes by operator, `guilty` names those that the target's own provider left to it. `values` and `bytes` are what
    it hands to the others and gets from them in one run, open sizes taken as 1, as far as names can be followed.
    """

    provider: str
    nodes: int
    partitions: int | None = None
    by: str | None = None
    operators: dict[str, int] | None = None
    guilty: list[str] | None = None
    values: int | None = None
    bytes: int | None = None


@dataclasses.dataclass(frozen=True)
class StaticRecord:
    """A graph of fixed sizes that was made beside or in place of the dynamic one."""

    path: str | None
    sizes: dict[str, int]
    verify: VerifyRecord
    placement: list[PlacementRecord]


@dataclasses.dataclass
class Report:
    command: str
    target: str | None = None
    model: ModelRecord | None = None
    output: ModelRecord | None = None
    blocks: list[BlockRecord] = dataclasses.field(default_factory=list)
    refusals: list[Refusal] = dataclasses.field(default_factory=list)
    passes: list[PassRecord] = dataclasses.field(default_factory=list)
    tuning: TuningRecord | None = None
    thresholds: ThresholdsRecord | None = None
    verify: VerifyRecord | None = None
    bench: BenchRecord | None = None
    placement: list[PlacementRecord] | None = None
    fitting: list[FitRecord] | None = None
    static: list[StaticRecord] | None = None
    diff: dict[str, Any] | None = None
    notes: list[str] = dataclasses.field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """The report as plain data, in the order of the fields, without sections that the command does not have."""
        data: dict[str, Any] = {
            "schema": SCHEMA,
            "command": self.command,
            "tool": tool_versions(),
            "target": self.target,
            "model": _plain(self.model),
            "output": _plain(self.output),
            "blocks": [_plain(block) for block in self.blocks],
            "refusals": [refusal.to_json() for refusal in self.refusals],
            "passes": [_plain(record) for record in self.passes],
            "tuning": _plain(self.tuning),
            "thresholds": _plain(self.thresholds),
            "verify": _plain(self.verify),
            "bench": _plain(self.bench),
            "placement": None if self.placement is None else [_told(record) for record in self.placement],
            "fitting": None if self.fitting is None else [_plain(record) for record in self.fitting],
            "static": None if self.static is None else [_plain(record) for record in self.static],
            "diff": self.diff,
            "notes": list(self.notes),
        }
        return _finite(data)

    def dumps(self) -> str:
        return json.dumps(self.to_json(), indent=1, allow_nan=False)


def tool_versions() -> dict[str, str]:
    versions = {}
    for key, distribution in (("sparse_onnx", "sparse-onnx"), ("onnxruntime", "onnxruntime")):
        try:
            versions[key] = importlib.metadata.version(distribution)
        except (
            importlib.metadata.PackageNotFoundError
        ):  # a renamed runtime (onnxruntime-gpu) or a bare checkout
            versions[key] = "unknown"
    return versions


def _plain(record: Any) -> Any:
    return None if record is None else dataclasses.asdict(record)


def _told(record: PlacementRecord) -> dict[str, Any]:
    """Without what the runtime does not tell."""
    return {key: value for key, value in dataclasses.asdict(record).items() if value is not None}


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
