"""What the report says of a model with thresholds: bytes that a token reads, and how many of them are skipped."""

from __future__ import annotations

from collections.abc import Mapping

import onnx_ir as ir

from sparse_onnx.core.report import QualityRecord, SiteRecord, ThresholdsRecord
from sparse_onnx.optimize.request import Request
from sparse_onnx.optimize.watched import Seen
from sparse_onnx.sparsify.calibrated import Costs
from sparse_onnx.sparsify.plan import Plan
from sparse_onnx.sparsify.record import acting, by_site


def thresholds_record(
    asked: Request,
    model: ir.Model,
    plan: Plan,
    level_input: str,
    seen: Mapping[str, Seen],
    quality: list[QualityRecord],
) -> ThresholdsRecord:
    """What the report says of a finished model.

    Args:
        asked: what was wanted.
        model: with thresholds.
        plan: they were made by.
        level_input: the name of the input that sets the level.
        seen: what its sites skipped, where it was measured.
        quality: what was measured of it.
    """
    costs = Costs.of(asked.calibration, asked.method)
    items_of = by_site(acting(model))
    held = {name: sum(item.nbytes for item in items) for name, items in items_of.items()}
    total: dict[str, float] = {site.name: site.bytes for site in costs.sites}
    reads = {site.name: read for site, read in zip(costs.sites, costs.reads, strict=True)}
    experts = {name for block in asked.calibration.blocks for name in block.layers}
    gated = {layer.name for layer in asked.calibration.gated if layer.block}
    whole = costs.total
    inside = (experts | gated) & set(held)
    if inside:  # which are smaller than they were calibrated where this run quantized them
        smaller = sum(held[name] for name in inside) / max(1, sum(total[name] for name in inside))
        for name in (experts | gated) & set(total):
            total[name], reads[name] = total[name] * smaller, reads[name] * smaller
        every = Costs.of(asked.calibration)
        own = zip(every.sites, every.reads, strict=True)
        whole -= (1 - smaller) * sum(read for site, read in own if site.name in experts)
    rows = []
    for name, items in items_of.items():
        site = plan.sites[name]
        measured = seen[name].share if name in seen else None
        expected = float(site.sparsity[plan.level])
        # Of a site with layers that were refused, those that were not; of experts, one token's.
        read = reads[name] * min(1.0, held[name] / max(1, total[name]))
        skipped = read * (expected if measured is None else measured)
        rows.append(
            SiteRecord(name, len(items), site.centring, expected, measured, round(read), round(skipped))
        )
    whole = round(whole)
    left_out = sum(row.bytes_skipped for row in rows)
    return ThresholdsRecord(
        calibration=asked.path,
        method=asked.method,
        mode=plan.mode,
        level=plan.level,
        level_input=level_input,
        dense_first=asked.dense_first,
        prefill=asked.prefill,
        bytes=whole,
        bytes_skipped=left_out,
        share_skipped=left_out / whole if whole else 0.0,
        measured=all(row.measured is not None for row in rows),
        quality=quality,
        sites=rows,
    )
