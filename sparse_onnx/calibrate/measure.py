"""Records of sites out of what was collected of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import numpy as np

from sparse_onnx.calibrate.collect import BlockCollector, SiteCollector, Sizes
from sparse_onnx.calibrate.describe import Description, describe, rounded
from sparse_onnx.calibrate.errors import error_curves
from sparse_onnx.calibrate.experts import Experts
from sparse_onnx.calibrate.plan import Plan
from sparse_onnx.core.calibration import SiteRecord
from sparse_onnx.core.report import Refusal
from sparse_onnx.matching.sites import Site

#: Called with what is done, how much of it, and of how much.
Progress = Callable[[str, int, int], None]


def records(
    planned: Plan, sizes: Sizes, seed: int, progress: Progress | None
) -> tuple[list[SiteRecord], list[Refusal]]:
    """Of layers in graph order, then of blocks; a refusal for each that no token reached.

    Args:
        planned: whose collectors have seen all runs.
        sizes: of the samples; of experts, so many pairs of a token and its expert are taken.
        seed: chooses the pairs.
        progress: told what is done.
    """
    found: list[SiteRecord] = []
    refusals: list[Refusal] = []
    total = len(planned.layers) + len(planned.blocks)
    for at, (site, layer) in enumerate(planned.layers):
        if progress is not None:
            progress("measuring", at, total)
        if layer.stream.tokens:
            found.append(_of_layer(site, layer))
        else:
            refusals.append(Refusal("no token reached it", site.name, "", "calibrate"))
    for at, block in enumerate(planned.blocks, start=len(planned.layers)):
        if progress is not None:
            progress("measuring", at, total)
        group = planned.experts.get(block.name, ()) if block.stream is not None else ()
        if group and block.stream is not None and not block.stream.tokens:
            refusals += [Refusal("no token reached it", site.name, "", "calibrate") for site in group]
        elif group:
            found += _of_experts(group, block, sizes, (seed, at))
    if progress is not None:
        progress("measuring", total, total)
    return found, refusals


def _of_layer(site: Site, collector: SiteCollector) -> SiteRecord:
    stream = collector.stream
    rows, held_out = _either(np.asarray(stream.rows), np.asarray(stream.held_out))
    described = describe(rows)
    errors = error_curves(((held_out, layer.weight.numbers()) for layer in site.layers), described)
    return _record(site, described, errors, stream.tokens, stream.zeros, stream.sum)


def _of_experts(
    group: tuple[Site, ...], collector: BlockCollector, sizes: Sizes, seed: tuple[int, ...]
) -> Iterator[SiteRecord]:
    stream, block = collector.stream, collector.block
    assert stream is not None and block is not None
    experts = Experts(block)
    tokens, held_out = _either(
        collector.pairs(False, sizes.rows, (*seed, 0)), collector.pairs(True, sizes.held_out, (*seed, 1))
    )
    for site in group:
        zeros, total = float(stream.zeros), stream.sum
        rows, held = tokens[0], held_out[0]
        if site.input is None:
            rows, held = experts.inner(*tokens), experts.inner(*held_out)
            scale = stream.tokens / len(
                rows
            )  # the graph holds no such value: what is not sampled is not seen
            zeros, total = float((rows == 0).sum()) * scale, float(rows.sum(dtype=np.float64)) * scale
        described = describe(rows)
        errors = error_curves(experts.parts(site.roles, held, held_out[1]), described)
        yield _record(site, described, errors, stream.tokens, zeros, total)


def _either(rows: np.ndarray | tuple, held_out: np.ndarray | tuple) -> tuple:
    """Both samples; where one of them is empty, the other in its place."""

    def empty(sample: np.ndarray | tuple) -> bool:
        return not len(sample[0] if isinstance(sample, tuple) else sample)

    return (held_out if empty(rows) else rows), (rows if empty(held_out) else held_out)


def _record(
    site: Site,
    described: Description,
    errors: Mapping[str, np.ndarray],
    tokens: int,
    zeros: float,
    total: float,
) -> SiteRecord:
    def numbers(values: np.ndarray) -> tuple[float, ...]:
        return tuple(rounded(float(value)) for value in values)

    values = tokens * site.rows
    return SiteRecord(
        name=site.name,
        weights=site.weights,
        input=None if site.input is None else site.input.name,
        rows=site.rows,
        columns=site.columns,
        bytes=site.nbytes,
        tokens=tokens,
        zeros=rounded(min(1.0, zeros / values)),
        mean=rounded(total / values),
        median=rounded(described.median),
        mode=rounded(described.mode),
        channel_median=numbers(described.channel_median),
        quantiles={name: numbers(sketch) for name, sketch in described.quantiles.items()},
        errors={name: numbers(curve) for name, curve in errors.items()},
    )
