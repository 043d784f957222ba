"""What of a model can be measured, and how a run is split so that its values fit into memory."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import onnx_ir as ir

from sparse_onnx import targets
from sparse_onnx.blocks import MoEBlock, neutral_blocks
from sparse_onnx.calibrate.collect import BlockCollector, SiteCollector
from sparse_onnx.calibrate.gated import GatedCollector
from sparse_onnx.calibrate.observe import rectified_values
from sparse_onnx.core.report import Refusal
from sparse_onnx.matching.gated import GatedLayer, gated_layers
from sparse_onnx.matching.layout import rows_of
from sparse_onnx.matching.sites import Site, sites
from sparse_onnx.optimize import runner
from sparse_onnx.verify.metadata import sound_blocks

#: Bytes of values that are fetched of one run at once.
_FETCHED = 256 << 20

Collector = SiteCollector | BlockCollector | GatedCollector


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is measured. `sites` and `collectors` of layers are in the same order.

    Attributes:
        layers: sites of linear layers, with what collects their rows.
        experts: sites inside blocks, up and down by the block's name.
        blocks: what collects each block's routing.
        rectified: other values whose zeros are counted, and their operators.
        refusals: what is left alone, and why.
        gated: gated feed-forward layers, with what collects their gates' activations.
    """

    layers: tuple[tuple[Site, SiteCollector], ...]
    experts: dict[str, tuple[Site, ...]]
    blocks: tuple[BlockCollector, ...]
    rectified: tuple[tuple[ir.Value, str], ...]
    refusals: tuple[Refusal, ...]
    gated: tuple[tuple[GatedLayer, GatedCollector], ...] = ()

    @property
    def collectors(self) -> tuple[Collector, ...]:
        layers, gated = ([collector for _, collector in own] for own in (self.layers, self.gated))
        return (*layers, *self.blocks, *gated)


def prepare(model: ir.Model) -> None:
    """Brings a loaded model into the form in which `optimize` looks for layers, too: prepared, blocks recognised.

    Raises:
        ModelError: a pass broke, or found the model broken.
    """
    steps = runner.plan(targets.get("cpu").forms)
    runner.run(model, [item for item in steps if item.step.phase in ("prepare", "recognise")])


def plan(model: ir.Model) -> Plan:
    """What can be measured of a prepared model."""
    found = sites(model)
    refusals = list(found.refusals)
    layers: list[tuple[Site, SiteCollector]] = []
    experts: dict[str, tuple[Site, ...]] = {}
    for site in found:
        if site.block is not None:
            experts[site.block.name] = (*experts.get(site.block.name, ()), site)
        elif (problem := _unreachable(model, site.input)) is not None:
            refusals.append(Refusal(problem, site.name, "", "calibrate"))
        else:
            assert site.input is not None
            layers.append((site, SiteCollector(site.name, site.input.name or "", site.rows)))
    blocks = list(_blocks(model, set(experts), refusals))
    read = {id(site.input) for site, _ in layers}
    rectified = [
        item for item in rectified_values(model) if id(rows_of(item[0])) not in read and item[0].uses()
    ]
    kept = {collector.name for collector in blocks}
    experts = {name: group for name, group in experts.items() if name in kept}
    gated, problems = gated_layers(found)
    refusals += problems
    watched = tuple(
        (layer, GatedCollector(layer))
        for layer in gated
        if all(_unreachable(model, value) is None for value in (layer.activated, layer.product))
    )
    return Plan(tuple(layers), experts, tuple(blocks), tuple(rectified), tuple(refusals), watched)


def _unreachable(model: ir.Model, value: ir.Value | None) -> str | None:
    """Why a value cannot be looked at from outside."""
    if value is None or not value.name:
        return "its input has no name"
    if value.is_initializer() and not value.is_graph_input():
        return "it reads a constant"
    producer = value.producer()
    if producer is None:
        inside = value not in model.graph.inputs
    else:
        inside = producer.graph is not model.graph
    return "it lies in the body of an If, Loop or Scan, of which no statistics are taken" if inside else None


def _blocks(model: ir.Model, known: set[str], refusals: list[Refusal]) -> Iterator[BlockCollector]:
    for block in neutral_blocks(model):
        values = [block.expert_index, block.expert_weight, block.tokens]
        problem = next((text for value in values[:2] if (text := _unreachable(model, value))), None)
        if problem is None and not block.experts:
            problem = "the number of its experts is not known"
        if problem is not None:
            refusals.append(
                Refusal(f"block '{block.name}': {problem}", block.node.name or "", "", "calibrate")
            )
            continue
        inner = block if isinstance(block, MoEBlock) and block.name in known else None
        names = [value.name or "" for value in values if value is not None][: 3 if inner is not None else 2]
        assert block.experts is not None
        yield BlockCollector(block.name, names, block.experts, inner)
    values_by_name = ir.convenience.create_value_mapping(model.graph, include_subgraphs=False)
    for lowered in sound_blocks(model):
        names = [lowered.expert_index, lowered.expert_weight]
        if lowered.experts and all(name in values_by_name for name in names):
            yield BlockCollector(lowered.name, names, lowered.experts, None)


def groups(collectors: Sequence[Collector], positions: int) -> Iterator[list[Collector]]:
    """Collectors whose values of one run of so many positions fit into memory together."""
    group: list[Collector] = []
    held = 0
    for collector in collectors:
        size = 4 * positions * max(1, collector.width)
        if group and held + size > _FETCHED:
            yield group
            group, held = [], 0
        group.append(collector)
        held += size
    if group:
        yield group
