"""What was done to a model, in its metadata: where each threshold acts, for those who measure, check or turn it."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from typing import Any

import onnx_ir as ir

#: Node metadata: the site whose threshold the node applies.
SITE_KEY = "sparse_onnx.site"
#: Model metadata: JSON, a `Thresholds`.
THRESHOLDS_KEY = "sparse_onnx.thresholds"


@dataclasses.dataclass(frozen=True)
class Acting:
    """One threshold at one place: several layers of a site, or one expert's.

    Attributes:
        site: its site.
        input: the value that is compared, ``[..., K]``.
        bound, centre: values; what is within the bound of the centre is skipped.
        layers: names of the layers' outputs.
        nbytes: of the layers' weights, as they are stored.
        inner: whether it lies in the body of an If, Loop or Scan, where nothing can be watched.
    """

    site: str
    input: str
    bound: str
    centre: str
    layers: tuple[str, ...]
    nbytes: int
    inner: bool = False


@dataclasses.dataclass(frozen=True)
class Thresholds:
    """`level_input` is the optional input that sets the level."""

    level_input: str
    mode: str
    acting: tuple[Acting, ...]
    left_dense: tuple[str, ...] = ()


def record_thresholds(model: ir.Model, found: Thresholds) -> None:
    model.metadata_props[THRESHOLDS_KEY] = json.dumps(dataclasses.asdict(found))


def thresholds_of(model: ir.Model) -> Thresholds | None:
    """What the model's metadata says; None where it says nothing that can be read."""
    try:
        entry: Any = json.loads(model.metadata_props.get(THRESHOLDS_KEY, "null"))
        acting = tuple(Acting(**{**item, "layers": tuple(item["layers"])}) for item in entry["acting"])
        found = Thresholds(str(entry["level_input"]), str(entry["mode"]), acting, tuple(entry["left_dense"]))
    except (ValueError, TypeError, KeyError):
        return None
    return found if all(_well_typed(item) for item in acting) else None


def extend_record(model: ir.Model, more: Sequence[Acting]) -> None:
    """Adds what a lowering did with the experts of a block."""
    found = thresholds_of(model)
    if found is not None and more:
        record_thresholds(model, dataclasses.replace(found, acting=(*found.acting, *more)))


def _well_typed(item: Acting) -> bool:
    texts = (item.site, item.input, item.bound, item.centre, *item.layers)
    return all(isinstance(text, str) for text in texts) and type(item.nbytes) is int
