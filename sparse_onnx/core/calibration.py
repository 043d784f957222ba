"""CALIB.json: what `sparse-onnx calibrate` measured of one model, and what `optimize --thresholds` reads.

Field names are the JSON contract (schema 1). Every number is finite; ``None`` stands for what does not apply.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

from sparse_onnx.core.errors import UsageError
from sparse_onnx.core.report import Refusal, tool_versions

SCHEMA = 1
COMMAND = "calibrate"
#: What a site's rows are measured from: 0, the median of all values, their most frequent value, a median a channel.
CENTRES = ("zero", "median", "mode", "channel_median")
#: Shares of a site's values that are dropped where its output error was measured: 0, 5, ... 95 %.
SPARSITIES = tuple(share / 100 for share in range(0, 100, 5))
#: Points of a quantile sketch: 0, 1, ... 100 %.
POINTS = 101
#: Experts of the largest block whose co-activation is stored; of a larger one it is null.
MOST_COACTIVATION = 128


@dataclasses.dataclass(frozen=True)
class DataRecord:
    """What was run: files, runs, tokens (rows of the first site) for statistics, and those held out for errors.
    `digests` are SHA-256 of the files' contents: `optimize` takes none of them to measure quality on."""

    files: tuple[str, ...]
    runs: int
    tokens: int
    held_out_tokens: int
    digests: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class SiteRecord:
    """Rows ``[..., K]`` that one or several linear layers read, as in `matching.sites`.

    Attributes:
        name: of the site; `optimize` finds it again by this.
        weights: names of the matrices' initializers.
        input: name of the value; None for what lies inside experts.
        rows: K.
        columns: N of each matrix.
        bytes: of the matrices as they are stored; of a block's, all experts' together.
        tokens: rows that were seen; of experts, (token, expert) pairs.
        zeros: share of exact zeros among the values.
        mean, median, mode: of all values.
        channel_median: ``[K]``.
        quantiles: of ``|x - centre|`` by centre, ``[101]``, 0 to 100 %.
        errors: ``||X W - X~ W|| / ||X W||`` on held-out rows by centre, ``[20]``, at `SPARSITIES`; large rows count no
            more than the median's (`calibrate.errors`).
    """

    name: str
    weights: tuple[str, ...]
    input: str | None
    rows: int
    columns: tuple[int, ...]
    bytes: int
    tokens: int
    zeros: float
    mean: float
    median: float
    mode: float
    channel_median: tuple[float, ...]
    quantiles: Mapping[str, tuple[float, ...]]
    errors: Mapping[str, tuple[float, ...]]

    def centre(self, name: str) -> float | tuple[float, ...]:
        """The value, or one a channel, that a centre of `CENTRES` stands for."""
        return 0.0 if name == "zero" else getattr(self, name)


@dataclasses.dataclass(frozen=True)
class GatedRecord:
    """A gated feed-forward layer, down(act(x gate) * (x up)), whose gate may say which units are skipped.

    Attributes:
        name: of the layer; `optimize` finds it again by this.
        block: whose experts are such layers; empty for a layer of the graph.
        weights: names of the matrices' initializers: gate, up and down.
        activation: name of the value act(x gate); None for what lies inside experts.
        rows: I, its hidden units.
        bytes: of up and down as they are stored; of a block's, all experts' together.
        tokens: rows that were seen; of experts, (token, expert) pairs.
        zeros: share of exact zeros among the activations.
        quantiles: of ``|act(x gate)|``, ``[101]``, 0 to 100 %, by the one centre that there is, zero.
        errors: ``||h W - h~ W|| / ||h W||`` on held-out rows, ``[20]``, at `SPARSITIES`, where h~ is h without the
            units whose activation is small and W is down; by the same centre; large rows count no more than the
            median's (`calibrate.errors`).
    """

    name: str
    block: str
    weights: tuple[str, ...]
    activation: str | None
    rows: int
    bytes: int
    tokens: int
    zeros: float
    quantiles: Mapping[str, tuple[float, ...]]
    errors: Mapping[str, tuple[float, ...]]

    def centre(self, name: str) -> float:
        """As `SiteRecord.centre`."""
        if name != "zero":
            raise ValueError(f"activations of a gate have no centre '{name}'")
        return 0.0


@dataclasses.dataclass(frozen=True)
class BlockRecord:
    """Routing of one block.

    Attributes:
        tokens: that its router decided on.
        loads: ``[E]`` slots that each expert got.
        dropped: slots that no expert got.
        unused: experts that got none.
        coactivation: ``[E][E]`` tokens that went to both; None above `MOST_COACTIVATION` experts.
        weight_quantiles: of the weights of slots that were not dropped, ``[101]``.
        layers: names of the block's sites.
    """

    name: str
    experts: int
    top_k: int
    tokens: int
    loads: tuple[int, ...]
    dropped: int
    unused: tuple[int, ...]
    coactivation: tuple[tuple[int, ...], ...] | None
    weight_quantiles: tuple[float, ...]
    layers: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class ZerosRecord:
    """Exact zeros among the results of an operator that makes them (ReLU), whoever reads them."""

    name: str
    operator: str
    values: int
    zeros: float


@dataclasses.dataclass(frozen=True)
class Calibration:
    """The whole document. `layers` are sites, `gated` gated feed-forward layers, in graph order."""

    path: str
    fingerprint: str
    data: DataRecord
    layers: tuple[SiteRecord, ...]
    blocks: tuple[BlockRecord, ...] = ()
    activations: tuple[ZerosRecord, ...] = ()
    refusals: tuple[Refusal, ...] = ()
    notes: tuple[str, ...] = ()
    gated: tuple[GatedRecord, ...] = ()

    def to_json(self) -> dict[str, Any]:
        return {
            "schema": SCHEMA,
            "command": COMMAND,
            "tool": tool_versions(),
            "model": {"path": self.path, "fingerprint": self.fingerprint},
            "data": dataclasses.asdict(self.data),
            "layers": [dataclasses.asdict(layer) for layer in self.layers],
            "gated": [dataclasses.asdict(layer) for layer in self.gated],
            "blocks": [dataclasses.asdict(block) for block in self.blocks],
            "activations": [dataclasses.asdict(record) for record in self.activations],
            "refusals": [refusal.to_json() for refusal in self.refusals],
            "notes": list(self.notes),
        }

    def dumps(self) -> str:
        """A record on each line, keys sorted.

        Raises:
            ValueError: a number that is not finite.
        """
        lines = []
        for key, value in sorted(self.to_json().items()):
            if isinstance(value, list) and value and isinstance(value[0], dict):
                records = ",\n  ".join(map(_dumped, value))
                lines.append(f'"{key}": [\n  {records}\n ]')
            else:
                lines.append(f'"{key}": {_dumped(value)}')
        return "{\n " + ",\n ".join(lines) + "\n}\n"

    def require_model(self, fingerprint: str, where: str = "") -> None:
        """Refuses another model than the one that was measured.

        Raises:
            UsageError: names both.
        """
        if fingerprint != self.fingerprint:
            raise UsageError(
                f"these statistics are of another model: {self.path} ({self.fingerprint}), not {fingerprint}",
                "run `sparse-onnx calibrate` on this model",
                where,
            )


def _dumped(value: Any) -> str:
    return json.dumps(value, allow_nan=False, sort_keys=True)
