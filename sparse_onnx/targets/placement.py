"""Which provider runs which node of a session, as onnxruntime itself says."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import onnx_ir as ir

from sparse_onnx.targets.places import CPU
from sparse_onnx.targets.remote import RemoteSession

_COPIES = ("MemcpyToHost", "MemcpyFromHost")


@dataclasses.dataclass(frozen=True)
class Part:
    """Nodes ``(name, operator)`` that a provider got together."""

    provider: str
    nodes: tuple[tuple[str, str], ...]


@dataclasses.dataclass(frozen=True)
class Placement:
    """Where the nodes of a model run.

    Attributes:
        parts: of the graph as onnxruntime runs it, its own rewrites done; in the order of the record.
        copies: copies between a device and the host, where the record has them.
    """

    parts: tuple[Part, ...]
    copies: int | None = None

    def nodes(self, provider: str) -> list[tuple[str, str]]:
        return [node for part in self.parts if part.provider == provider for node in part.nodes]

    @property
    def providers(self) -> list[str]:
        return list(dict.fromkeys(part.provider for part in self.parts))

    def partitions(self, provider: str) -> int:
        return sum(part.provider == provider for part in self.parts)

    def fallen(self, provider: str) -> list[tuple[str, str]]:
        """Nodes that another provider runs."""
        return [node for part in self.parts if part.provider != provider for node in part.nodes]


def placed(session: Any, provider: str) -> Placement | None:
    """Of a session that was created with `record` and has run once; None where the runtime keeps no record, and for
    the CPU provider, which has no other to fall back on.

    The record of the graph's assignment is taken where it names the provider. Kernels of WebGPU are not in it (seen in
    onnxruntime 1.27): there the profile of the run says who ran what, which leaves out branches that were not taken.
    """
    if provider == CPU and not isinstance(session, RemoteSession):
        return None
    if isinstance(session, RemoteSession):
        told = session.placement()
        recorded, profiled = told["recorded"], told["profiled"]
    else:
        groups = session.get_provider_graph_assignment_info()
        recorded = [[g.ep_name, [[n.name, n.op_type] for n in g.get_nodes()]] for g in groups]
        profiled = None
    if recorded and any(name == provider for name, _ in recorded):
        return Placement(_joined(recorded))
    if profiled:
        copies = sum(op in _COPIES for _, nodes in profiled for _, op in nodes)
        ran = [[name, [node for node in nodes if node[1] not in _COPIES]] for name, nodes in profiled]
        return Placement(_joined([each for each in ran if each[1]], merge=True), copies)
    return Placement(_joined(recorded)) if recorded else None


def _joined(groups: Sequence[Any], merge: bool = False) -> tuple[Part, ...]:
    """Neighbours on the CPU as one part: its kernels are recorded one by one. With `merge`, those of any provider."""
    found = []
    for (provider, alone), some in itertools.groupby(
        enumerate(groups), key=lambda each: (each[1][0], -1 if merge or each[1][0] == CPU else each[0])
    ):
        del alone
        nodes = (tuple(node) for _, (_, nodes) in some for node in nodes)
        found.append(Part(provider, tuple(nodes)))  # type: ignore[arg-type]
    return tuple(found)


def crossing(model: ir.Model, where: Placement) -> tuple[int, int]:
    """Values that one provider computes and another reads, and their bytes with open sizes taken as 1.

    Only nodes that onnxruntime runs under the names they have in the model can be followed: at least so many.
    """
    owner = {name: part.provider for part in where.parts for name, _ in part.nodes if name}
    count = size = 0
    for node in model.graph.all_nodes():
        mine = owner.get(node.name or "")
        for value in node.outputs if mine is not None else ():
            readers = {owner.get(use.node.name or "") for use in value.uses()} - {None, mine}
            if readers:
                count += 1
                size += _bytes(value)
    return count, size


def _bytes(value: ir.Value) -> int:
    if value.shape is None or value.dtype is None:
        return 0
    return math.prod(axis if isinstance(axis, int) else 1 for axis in value.shape) * value.dtype.bitwidth // 8


def by_provider(where: Placement) -> Mapping[str, int]:
    return {name: len(where.nodes(name)) for name in where.providers}
