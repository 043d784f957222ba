"""The human view of CALIB.json."""

from __future__ import annotations

import re
import statistics
from collections.abc import Sequence

from rich.console import Console

from sparse_onnx.cli.grouped import folded_name, refusal_lines
from sparse_onnx.cli.render import line, table
from sparse_onnx.cli.text import size
from sparse_onnx.core.calibration import (
    CENTRES,
    SPARSITIES,
    BlockRecord,
    Calibration,
    GatedRecord,
    SiteRecord,
)

#: Sparsities whose errors are shown.
_SHOWN = (0.25, 0.5, 0.7)
#: Share of zeros from which a layer is sparse by itself.
_NATURAL = 0.01


def render(found: Calibration, out: Console, *, verbose: bool = False) -> None:
    """Layers of equal names but for their numbers are one row of means, unless `verbose`."""
    data = found.data
    line(
        out,
        f"{found.path}: {len(found.layers)} sites, {len(found.blocks)} blocks; {data.tokens} tokens in {data.runs} "
        f"runs, {data.held_out_tokens} of them held out for errors",
    )
    if found.layers:
        _layers(out, found.layers, verbose)
    if found.gated:
        _gated(out, found.gated, verbose)
    if found.blocks:
        _blocks(out, found.blocks)
    _natural_zeros(out, found)
    for text in found.notes:
        line(out, f"note: {text}")
    if found.refusals:
        line(out, f"{len(found.refusals)} left alone:")
        for lines in refusal_lines(found.refusals, every_node=verbose):
            for text in lines:
                line(out, f"  {text}")


def _layers(out: Console, layers: Sequence[SiteRecord], verbose: bool) -> None:
    groups: dict[str, list[SiteRecord]] = {}
    for layer in layers:
        key = layer.name if verbose else re.sub(r"\d+", "#", layer.name)
        groups.setdefault(f"{key} {layer.rows} {layer.columns}", []).append(layer)
    rows = [_row(group) for group in groups.values()]
    shown = [f"error at {share:.0%}" for share in _SHOWN]
    columns = ["read by", "inputs", "weights", "zeros", "median", "mode", "best centre", *shown]
    table(out, columns, rows, right=["weights", "zeros", "median", "mode", *shown])


def _row(group: Sequence[SiteRecord]) -> list[str]:
    """Means over layers that are alike; the centre that is best of most of them when half of the values are dropped."""
    first, count = group[0], f" x {len(group)}" if len(group) > 1 else ""
    centres = [best_error(layer, 0.5)[0] for layer in group]
    return [
        folded_name([layer.name for layer in group]) + count,
        f"{first.rows} -> {'+'.join(map(str, first.columns))}",
        size(sum(layer.bytes for layer in group)),
        f"{statistics.fmean(layer.zeros for layer in group):.1%}",
        f"{statistics.fmean(layer.median for layer in group):.3g}",
        f"{statistics.fmean(layer.mode for layer in group):.3g}",
        max(CENTRES, key=centres.count),
        *(f"{statistics.fmean(best_error(layer, share)[1] for layer in group):.3f}" for share in _SHOWN),
    ]


def _gated(out: Console, layers: Sequence[GatedRecord], verbose: bool) -> None:
    groups: dict[str, list[GatedRecord]] = {}
    for layer in layers:
        key = layer.name if verbose else re.sub(r"\d+", "#", layer.name)
        groups.setdefault(f"{key} {layer.rows}", []).append(layer)
    rows = []
    for group in groups.values():
        errors = [
            statistics.fmean(layer.errors["zero"][SPARSITIES.index(share)] for layer in group)
            for share in _SHOWN
        ]
        rows.append(
            [
                folded_name([layer.name for layer in group]) + (f" x {len(group)}" if len(group) > 1 else ""),
                str(group[0].rows),
                size(sum(layer.bytes for layer in group)),
                f"{statistics.fmean(layer.zeros for layer in group):.1%}",
                *(f"{error:.3f}" for error in errors),
            ]
        )
    shown = [f"error at {share:.0%}" for share in _SHOWN]
    columns = ["gated layer", "units", "up and down", "zeros", *shown]
    table(out, columns, rows, right=columns[1:])


def best_error(layer: SiteRecord, share: float) -> tuple[str, float]:
    """The centre with the least error at a sparsity, and that error."""
    at = SPARSITIES.index(share)
    return min(((name, layer.errors[name][at]) for name in CENTRES), key=lambda item: item[1])


def _blocks(out: Console, blocks: Sequence[BlockRecord]) -> None:
    rows = []
    for block in blocks:
        slots = max(1, sum(block.loads))
        even = slots / block.experts
        weights = [f"{block.weight_quantiles[at]:.3f}" for at in (5, 50, 95)]
        rows.append(
            (
                *(block.name, block.experts, block.top_k, block.tokens),
                *(f"{min(block.loads) / even:.2f}", f"{max(block.loads) / even:.2f}", len(block.unused)),
                *(f"{block.dropped / (slots + block.dropped):.1%}", *weights),
            )
        )
    columns = ["block", "experts", "top-k", "tokens", "least load", "largest load", "unused", "dropped"]
    columns += ["weight 5 %", "50 %", "95 %"]
    table(out, columns, rows, right=columns[1:])
    for block in blocks:
        if block.unused:
            named = ", ".join(map(str, block.unused[:8])) + (", ..." if len(block.unused) > 8 else "")
            line(
                out, f"{block.name}: no token reached {len(block.unused)} of {block.experts} experts: {named}"
            )


def _natural_zeros(out: Console, found: Calibration) -> None:
    sparse = [layer for layer in found.layers if layer.zeros >= _NATURAL]
    if sparse:
        mean = statistics.fmean(layer.zeros for layer in sparse)
        most = max(sparse, key=lambda layer: layer.zeros)
        largest = f"at most {most.zeros:.1%} ({most.name})"
        line(out, f"natural zeros: {len(sparse)} sites read {mean:.1%} zeros on average, {largest}")
    if found.activations:
        counted = sum(record.values for record in found.activations)
        zeros = sum(record.zeros * record.values for record in found.activations)
        line(
            out,
            f"{len(found.activations)} other ReLU results: {zeros / max(1, counted):.1%} zeros; what reads them is no "
            "linear layer",
        )
