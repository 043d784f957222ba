"""Gated feed-forward layers: how large their gates' activations are, and what it costs to skip small ones."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from sparse_onnx.blocks import MoEBlock
from sparse_onnx.blocks.quantized import Quantized
from sparse_onnx.calibrate.collect import BlockCollector, Sizes, Stream, flat_rows, tail
from sparse_onnx.calibrate.describe import quantiles, rounded
from sparse_onnx.calibrate.errors import gated_errors
from sparse_onnx.calibrate.experts import Experts, by_expert
from sparse_onnx.calibrate.interface import Run
from sparse_onnx.calibrate.reservoir import Store
from sparse_onnx.core.calibration import GatedRecord
from sparse_onnx.matching.gated import GatedLayer, expert_bytes, experts_name, experts_obstacle


class GatedCollector:
    """Rows of a gate's activations and of what down reads, side by side.

    Attributes:
        names: of the values that it needs of a run.
        width: numbers that it keeps of a row.
        stream: what it saw.
    """

    def __init__(self, layer: GatedLayer) -> None:
        self.name, self.width = layer.name, 2 * layer.units
        self.names = (layer.activated.name or "", layer.product.name or "")

    def open(self, sizes: Sizes, store: Store, seed: tuple[int, ...]) -> None:
        self.stream = Stream(self.width, self.width // 2, sizes, store, seed)

    def add(self, run: Run, values: Mapping[str, np.ndarray], held_out: float) -> None:
        parts = [flat_rows(values[name], run, self.name) for name in self.names]
        rows = np.concatenate(parts, axis=1)
        self.stream.add(rows, tail(len(rows), held_out))


def gated_records(
    layers: Sequence[tuple[GatedLayer, GatedCollector]],
    blocks: Iterable[BlockCollector],
    sizes: Sizes,
    seed: int,
) -> tuple[GatedRecord, ...]:
    """Of layers that some token reached, then of blocks with gated experts.

    Args:
        layers: whose collectors have seen all runs.
        blocks: as well.
        sizes: of experts, so many pairs of a token and its expert are taken.
        seed: chooses the pairs.
    """
    found = [_of_layer(layer, collector) for layer, collector in layers if collector.stream.tokens]
    for at, block in enumerate(blocks):
        stream, own = block.stream, block.block
        if stream is None or not stream.tokens or own is None or experts_obstacle(own) is not None:
            continue
        found.append(_of_experts(own, block, stream.tokens, sizes, (seed, at)))
    return tuple(found)


def _of_layer(layer: GatedLayer, collector: GatedCollector) -> GatedRecord:
    stream, units = collector.stream, layer.units
    samples = [np.asarray(sample) for sample in (stream.rows, stream.held_out)]
    rows, held = (sample if len(sample) else other for sample, other in (samples, samples[::-1]))
    points = quantiles(np.abs(rows[:, :units]))
    parts = [(np.abs(held[:, :units]), held[:, units:], layer.down.weight.numbers())]
    return _record(
        layer.name,
        "",
        tuple(each.weight.names[0] for each in (layer.gate, layer.up, layer.down)),
        layer.activated.name,
        units,
        layer.nbytes,
        stream.tokens,
        stream.zeros / max(1, stream.tokens * units),
        points,
        gated_errors(parts, points),
    )


def _of_experts(
    block: MoEBlock, collector: BlockCollector, tokens: int, sizes: Sizes, seed: tuple[int, ...]
) -> GatedRecord:
    experts = Experts(block)
    pairs = [
        collector.pairs(False, sizes.rows, (*seed, 2)),
        collector.pairs(True, sizes.held_out, (*seed, 3)),
    ]
    first, second = (own if len(own[0]) else other for own, other in (pairs, pairs[::-1]))
    activated, _ = experts.gated(*first)
    points = quantiles(np.abs(activated))
    sizes_held, hidden = experts.gated(*second)
    parts = (
        (np.abs(sizes_held[at]), hidden[at], experts.matrix(block.spec.roles[-1], expert))
        for expert, at in by_expert(second[1])
    )
    assert block.inner is not None
    return _record(
        experts_name(block),
        block.name,
        tuple(_stored_name(block, role) for role in block.spec.roles),
        None,
        block.inner,
        expert_bytes(block),
        tokens,
        float((activated == 0).mean()),
        points,
        gated_errors(parts, points),
    )


def _stored_name(block: MoEBlock, role: str) -> str:
    value = block.weights[role]
    quantized = Quantized.of(value)
    return (value if quantized is None else quantized.values[0]).name or ""


def _record(
    name: str,
    block: str,
    weights: tuple[str, ...],
    activation: str | None,
    units: int,
    nbytes: int,
    tokens: int,
    zeros: float,
    points: np.ndarray,
    errors: np.ndarray,
) -> GatedRecord:
    return GatedRecord(
        name=name,
        block=block,
        weights=weights,
        activation=activation,
        rows=units,
        bytes=nbytes,
        tokens=tokens,
        zeros=rounded(min(1.0, zeros)),
        quantiles={"zero": tuple(rounded(float(value)) for value in points)},
        errors={"zero": tuple(rounded(float(value)) for value in errors)},
    )
