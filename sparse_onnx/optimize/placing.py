"""Where the nodes of a model run on a target, and what it costs that some do not run on its provider."""

from __future__ import annotations

import collections
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import onnx_ir as ir

from sparse_onnx.core.errors import ImpossibleError
from sparse_onnx.core.report import PlacementRecord
from sparse_onnx.graph import stats
from sparse_onnx.graph.infer import infer
from sparse_onnx.targets import TargetProfile, places
from sparse_onnx.targets import session as sessions
from sparse_onnx.targets.operators import unsupported
from sparse_onnx.targets.placement import Part, Placement, crossing, placed

#: Nodes named in an error.
_NAMED = 5


def place_model(
    model: ir.Model,
    target: TargetProfile,
    feeds: Callable[[], Mapping[str, np.ndarray]],
    static: bool = False,
) -> list[PlacementRecord]:
    """Who runs what: told by the runtime behind one run, where there is one here, else by the profile.

    Args:
        model: as it is deployed.
        target: the target.
        feeds: makes those of the run.
        static: whether all shapes are known, so that none is computed by nodes.
    """
    where = places.place(target)
    if target.provider == places.CPU or where == places.CPU:
        return [PlacementRecord(places.CPU, stats.node_count(model))]
    if where is None:
        return _records(model, target, _by_profile(model, target, static), "profile")
    session = sessions.create_session(model, threads=2, provider=where, record=True)
    sessions.run(session, dict(feeds()))
    at = placed(session, target.provider)
    by = places.described(where)
    if at is None:  # a runtime with one provider and no record of it
        return [PlacementRecord(target.provider, stats.node_count(model), 1, by)]
    return _records(model, target, at, by)


def _by_profile(model: ir.Model, target: TargetProfile, static: bool) -> Placement:
    copy = model.clone()
    infer(copy)
    folded = ("Shape", "Size") if static else ()
    nodes = [node for node in copy.graph.all_nodes() if node.op_type not in folded]
    left = {id(node) for node, _ in unsupported(nodes, target)}
    parts: list[tuple[str, list[tuple[str, str]]]] = []
    for node in nodes:
        provider = places.CPU if id(node) in left else target.provider
        if not parts or parts[-1][0] != provider:
            parts.append((provider, []))
        parts[-1][1].append((node.name or "", node.op_type))
    return Placement(tuple(Part(provider, tuple(each)) for provider, each in parts))


def _records(model: ir.Model, target: TargetProfile, at: Placement, by: str) -> list[PlacementRecord]:
    values, size = crossing(model, at)
    found = []
    for provider in sorted(at.providers, key=lambda name: name != target.provider):
        nodes = at.nodes(provider)
        guilty = None if provider == target.provider else [f"{name} ({op})" for name, op in nodes]
        found.append(
            PlacementRecord(
                provider=provider,
                nodes=len(nodes),
                partitions=at.partitions(provider),
                by=by,
                operators=dict(collections.Counter(op for _, op in nodes).most_common()),
                guilty=guilty,
                values=values,
                bytes=size,
            )
        )
    return found


def require_no_fallback(records: Sequence[PlacementRecord], target: TargetProfile) -> None:
    """
    Raises:
        ImpossibleError: another provider runs some of the nodes.
    """
    guilty = [name for record in records for name in record.guilty or ()]
    if guilty:
        more = f" and {len(guilty) - _NAMED} more" if len(guilty) > _NAMED else ""
        raise ImpossibleError(
            f"{target.provider} does not run {len(guilty)} nodes: {', '.join(guilty[:_NAMED])}{more}",
            "without --no-fallback the CPU provider runs them",
        )
