"""A plan out of calibration: which centre, which sparsity, which threshold.

| method | is | centre |
| --- | --- | --- |
| scap | what is within tau of the centre counts as the centre (SCAP, arXiv 2412.07174) | of the least output error |
| teal | small inputs count as 0 (TEAL, arXiv 2408.14690) | 0 |
| topk | of each token the inputs of the largest size are kept | 0 |
| relu | exact zeros alone are skipped: nothing is lost, and networks with ReLU have many | 0 |
| cats | units whose gate is small are skipped in up and down (CATS, arXiv 2404.08763); other layers stay dense | 0 |

Thresholds above 0 behind a Relu are FATReLU, and behind a ThresholdedRelu the same with a larger alpha: `scap` and
`teal` raise them from the zeros that are there. Centres are compared by the error of the layers' outputs on held-out
rows, each at the sparsity that its site gets; 0 is always among them: a centre that helps one layer ruins another.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np

from sparse_onnx.core.calibration import (
    CENTRES,
    POINTS,
    SPARSITIES,
    Calibration,
    GatedRecord,
    SiteRecord,
)
from sparse_onnx.core.errors import ImpossibleError, UsageError
from sparse_onnx.sparsify.allocate import LEVELS, Curve, Floats, greedy, uniform
from sparse_onnx.sparsify.by_block import by_block, with_experts
from sparse_onnx.sparsify.plan import Mode, Plan, SitePlan

Method = Literal["scap", "teal", "topk", "relu", "cats"]
METHODS: tuple[Method, ...] = ("scap", "teal", "topk", "relu", "cats")
Allocation = Literal["blocks", "greedy", "uniform"]
ALLOCATIONS: tuple[Allocation, ...] = ("blocks", "greedy", "uniform")
Share = Callable[[Sequence[Curve]], Floats]

#: Shares below which skipping does not pay, by mode. The native kernel at 0 % is up to 10 % slower than a dense
#: product in float32 and int4, and up to 20 % in int8, where 10 to 20 % skipped may not pay yet. Gathering rows copies
#: them, and overtakes a dense product at 70 %.
LEAST: dict[Mode, float] = {"native": 0.1, "gather": 0.7, "simulate": 0.0}
#: Where centres are compared when the level is not known yet.
_USUAL = 40
_STEPS = np.array(SPARSITIES)


@dataclasses.dataclass(frozen=True)
class Costs:
    """What the sites of a model read and lose. `reads` are bytes of weights for one token, experts that it is not sent
    to left out; `total` those of all linear layers, of which shares are given."""

    sites: tuple[SiteRecord | GatedRecord, ...]
    reads: tuple[float, ...]
    total: float

    @staticmethod
    def of(calibration: Calibration, method: Method = "scap") -> Costs:
        shares = {block.name: min(block.top_k, block.experts) / block.experts for block in calibration.blocks}
        own = {name: shares[block.name] for block in calibration.blocks for name in block.layers}
        reads = tuple(site.bytes * own.get(site.name, 1.0) for site in calibration.layers)
        if method != "cats":
            return Costs(calibration.layers, reads, sum(reads))
        gated = tuple(layer.bytes * shares.get(layer.block, 1.0) for layer in calibration.gated)
        return Costs(calibration.gated, gated, sum(reads))


def make_plan(
    calibration: Calibration,
    *,
    sparsity: float | None = None,
    level: int | None = None,
    method: Method = "scap",
    allocation: Allocation = "blocks",
    mode: Mode = "native",
    least: float | None = None,
) -> Plan:
    """Thresholds of all sites at all levels.

    Args:
        calibration: of the model.
        sparsity: share of the bytes of linear weights that are to be skipped, 0 to 1; chooses the level.
        level: instead of it; None without a sparsity is level 0.
        method: see above; `relu` needs no sparsity.
        allocation: `greedy` by error for bytes, `blocks` so within blocks that skip alike, `uniform` the same sparsity
            everywhere.
        mode: see `Plan`.
        least: sites that skip less stay dense; None takes what pays in that mode.

    Raises:
        UsageError: an unknown method or allocation, or a sparsity out of range.
        ImpossibleError: the calibration has no sites, or so much cannot be skipped.
    """
    if method not in METHODS:
        raise UsageError(f"unknown method '{method}'", f"one of: {', '.join(METHODS)}")
    if allocation not in ALLOCATIONS:
        raise UsageError(f"unknown allocation '{allocation}'", f"one of: {', '.join(ALLOCATIONS)}")
    if sparsity is not None and not 0 < sparsity < 1:
        raise UsageError(f"a sparsity of {sparsity:g} is no share between 0 and 1")
    if not calibration.layers:
        raise ImpossibleError("no layer of this model can be thresholded", "the calibration says why")
    if method == "cats" and not calibration.gated:
        raise ImpossibleError(
            "no gated layer was measured, whose gate could say what is skipped",
            "another method takes layers of any kind; the calibration says why gated ones were left alone",
        )
    costs = Costs.of(calibration, method)
    least = LEAST[mode] if least is None else least
    if method == "relu":
        return _natural(costs, mode, least)
    about = round(100 * sparsity) if sparsity is not None else (_USUAL if level is None else level)
    share = _sharing(calibration, costs, allocation)
    centres, path = _allocated(costs, method, share, min(about, LEVELS - 1))
    plans = {
        site.name: _site(site, centre, path[:, at], method)
        for at, (site, centre) in enumerate(zip(costs.sites, centres, strict=True))
    }
    if sparsity is not None:
        level = _level(costs, plans, sparsity, least)
    return Plan(plans, level or 0, mode, method == "topk", least, method == "cats")


def skipped(costs: Costs, plans: dict[str, SitePlan], least: float) -> Floats:
    """The share of all bytes that calibration expects to be skipped at each level: ``[101]``."""
    reads = np.array(costs.reads)
    table = np.stack([plans[site.name].sparsity for site in costs.sites], axis=1)
    return np.where(table >= least, table, 0) @ reads / max(costs.total, 1e-300)


def _level(costs: Costs, plans: dict[str, SitePlan], sparsity: float, least: float) -> int:
    shares = skipped(costs, plans, least)
    reached = np.flatnonzero(shares >= sparsity - 1e-9)
    if not len(reached):
        raise ImpossibleError(
            f"{sparsity:.0%} of the weights cannot be skipped, {shares.max():.0%} at most", "ask for less"
        )
    return int(reached[0])


def _allocated(costs: Costs, method: Method, share: Share, about: int) -> tuple[list[str], Floats]:
    """The centre of each site, and the path."""
    names = CENTRES if method == "scap" else ("zero",)
    errors = [np.stack([_squares(site, name) for name in names]) for site in costs.sites]
    # First as if each sparsity had the centre that suits it best, then with the one that suits the sparsity it got.
    first = share(_curves(costs, [each.min(axis=0) for each in errors]))[about]
    best = [_best(each, at) for each, at in zip(errors, first, strict=True)]
    chosen = [each[at] for each, at in zip(errors, best, strict=True)]
    return [names[at] for at in best], share(_curves(costs, chosen))


def _sharing(calibration: Calibration, costs: Costs, allocation: Allocation) -> Share:
    if allocation != "blocks":
        return greedy if allocation == "greedy" else uniform
    kinds = [(site.rows, getattr(site, "columns", ()), site.bytes) for site in costs.sites]
    experts = [
        (*block.layers, *(layer.name for layer in calibration.gated if layer.block == block.name))
        for block in calibration.blocks
    ]
    members = with_experts([site.name for site in costs.sites], kinds, experts)
    return lambda curves: by_block(curves, members)


def _best(errors: Floats, sparsity: float) -> int:
    """The first of the centres of least error around that sparsity: the sum of the steps on both sides."""
    at = int(np.searchsorted(_STEPS, sparsity, side="right")) - 1
    around = errors[:, max(1, at) : at + 2]
    return int(np.argmin(around.sum(axis=1)))


def _curves(costs: Costs, errors: Sequence[Floats]) -> list[Curve]:
    return [Curve(read, _STEPS, error) for read, error in zip(costs.reads, errors, strict=True)]


def _squares(site: SiteRecord | GatedRecord, centre: str) -> Floats:
    return np.square(np.array(site.errors[centre], np.float64))


def _site(site: SiteRecord | GatedRecord, centre: str, path: Floats, method: Method) -> SitePlan:
    value = np.atleast_1d(np.array(site.centre(centre), np.float32))
    if method == "topk":
        table = np.maximum(1, np.rint((1 - path) * site.rows))
        return SitePlan(site.name, value, table, 1 - table / site.rows, centre)
    quantiles = np.interp(path * (POINTS - 1), np.arange(POINTS), site.quantiles[centre])
    table = np.where(path > 0, quantiles, -1.0)
    natural = site.zeros if centre == "zero" else 0.0
    return SitePlan(site.name, value, table, np.where(path > 0, np.maximum(path, natural), 0), centre)


def _natural(costs: Costs, mode: Mode, least: float) -> Plan:
    """Exact zeros at every level but 0."""
    on = np.arange(LEVELS) > 0
    plans = {
        site.name: SitePlan(site.name, np.zeros(1, np.float32), np.where(on, 0.0, -1.0), on * site.zeros)
        for site in costs.sites
    }
    most = max(site.zeros for site in costs.sites)
    if most < max(least, 1e-3):
        raise ImpossibleError(
            f"no layer has {max(least, 1e-3):.1%} of exact zeros among its inputs, {most:.1%} at most",
            "another method skips what is small",
        )
    return Plan(plans, 1, mode, False, least)
