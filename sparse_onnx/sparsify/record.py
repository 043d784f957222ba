"""Where thresholds act in a model, from its metadata: for those who measure, check or turn them."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from typing import Any

import onnx_ir as ir

#: Metadata of the node that computes a layer's output: JSON, an `Acting` without `layer` and `inner`.
ACTING_KEY = "sparse_onnx.threshold"
#: Model metadata: JSON, a `Thresholds`.
THRESHOLDS_KEY = "sparse_onnx.thresholds"


@dataclasses.dataclass(frozen=True)
class Acting:
    """One thresholded layer, or one of an expert's.

    Attributes:
        site: whose threshold it is.
        input: the value that is compared, ``[..., K]``.
        bound: value ``[1]``: what is no farther from the centre is skipped; empty for 0.
        centre: value ``[1]`` or ``[K]``; empty for 0.
        nbytes: of the layer's weights, as they are stored.
        weight, folded: values of the mode `gather`, ``[K, N]`` and ``[N]``; else empty.
        rows: of a gated layer, whose `input` is the activation of its gate: the value ``[..., K]`` that up reads, in
            the mode `simulate` the product ``[..., I]`` that is masked; else empty.
        up, up_bias: of a gated layer in the mode `gather`, ``[I, K]`` and ``[I]``; else empty.
        layer: the value that the layer computes.
        inner: whether it lies in the body of an If, Loop or Scan, where nothing can be watched.
    """

    site: str
    input: str
    bound: str
    centre: str
    nbytes: int
    weight: str = ""
    folded: str = ""
    rows: str = ""
    up: str = ""
    up_bias: str = ""
    layer: str = ""
    inner: bool = False


@dataclasses.dataclass(frozen=True)
class Thresholds:
    """`level_input` is the optional input that sets the level; `left_dense` are sites that were calibrated in vain."""

    level_input: str
    mode: str
    left_dense: tuple[str, ...] = ()


def tag(node: ir.Node, acting: Acting) -> None:
    """Says of the node that computes a layer's output what is skipped there."""
    entry = dataclasses.asdict(acting)
    del entry["layer"], entry["inner"]
    node.metadata_props[ACTING_KEY] = json.dumps(entry)


def forget(model: ir.Model) -> None:
    """Removes what a file says of thresholds that its graph does not have."""
    for node in model.graph.all_nodes():
        node.metadata_props.pop(ACTING_KEY, None)


def acting(model: ir.Model) -> list[Acting]:
    """All thresholded layers, in graph order. Entries that are not ours are passed over."""
    found = []
    for node in model.graph.all_nodes():
        entry = _read(node.metadata_props.get(ACTING_KEY))
        texts = ("site", "input", "bound", "centre", "weight", "folded", "rows", "up", "up_bias")
        if entry is None or set(entry) != {*texts, "nbytes"} or type(entry["nbytes"]) is not int:
            continue
        if all(isinstance(entry[name], str) for name in texts):
            inner = node.graph is not model.graph
            found.append(Acting(**entry, layer=node.outputs[0].name or "", inner=inner))
    return found


def record_thresholds(model: ir.Model, found: Thresholds) -> None:
    model.metadata_props[THRESHOLDS_KEY] = json.dumps(dataclasses.asdict(found))


def thresholds_of(model: ir.Model) -> Thresholds | None:
    """What the model's metadata says; None where it says nothing that can be read."""
    entry = _read(model.metadata_props.get(THRESHOLDS_KEY))
    if entry is None or set(entry) != {"level_input", "mode", "left_dense"}:
        return None
    left = entry["left_dense"]
    if not isinstance(left, list) or not all(map(_is_text, (entry["level_input"], entry["mode"], *left))):
        return None
    return Thresholds(entry["level_input"], entry["mode"], tuple(left))


def by_site(found: Sequence[Acting]) -> dict[str, list[Acting]]:
    groups: dict[str, list[Acting]] = {}
    for item in found:
        groups.setdefault(item.site, []).append(item)
    return groups


def _read(text: str | None) -> dict[str, Any] | None:
    try:
        entry = json.loads(text or "null")
    except ValueError:
        return None
    return entry if isinstance(entry, dict) else None


def _is_text(value: Any) -> bool:
    return isinstance(value, str)
