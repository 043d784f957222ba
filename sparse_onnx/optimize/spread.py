"""Inputs of a block as its thresholds know them: drawn so that the plan's share is skipped, whatever their units are.

A plan has thresholds tau and the shares of the inputs within them, level by level: points of the quantile function Q of
|x - centre|. With u uniform in [0, 1) and a sign that is + or -,

    x = centre + sign * Q(u)
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from sparse_onnx.blocks import CombineBlock, MoEBlock
from sparse_onnx.blocks.expert_thresholds import marked
from sparse_onnx.optimize.runner import Planned
from sparse_onnx.passes.insert_thresholds import InsertThresholds
from sparse_onnx.sparsify.plan import SitePlan


@dataclasses.dataclass(frozen=True, eq=False)
class Spread:
    """`centre` is ``[1]`` or ``[K]``; of the inputs `shares` lie within `bounds` of it, both rising."""

    centre: np.ndarray
    shares: np.ndarray
    bounds: np.ndarray

    @staticmethod
    def of(site: SitePlan) -> Spread:
        on = site.table >= 0
        shares, bounds = site.sparsity[on], site.table[on]
        # What lies beyond the last is not known: up to twice as far; any size where only zeros are skipped.
        last = 2 * bounds.max(initial=0.0) or 1.0
        return Spread(site.centre, np.array([0, *shares, 1]), np.array([0, *bounds, last]))

    def draw(self, rng: np.random.Generator, shape: Sequence[int]) -> np.ndarray:
        """``[..., K]``."""
        distance = np.interp(rng.random(shape), self.shares, self.bounds)
        return self.centre + np.where(rng.random(shape) < 0.5, -distance, distance)


def spread(block: MoEBlock | CombineBlock, planned: Sequence[Planned]) -> Spread | None:
    """Of a block's tokens; None where the plan has no thresholds of them: without any, or with those of its gate's
    activation alone."""
    plan = next((item.run.plan for item in planned if isinstance(item.run, InsertThresholds)), None)
    if plan is None or plan.top_k or not isinstance(block, MoEBlock):  # top_k: whatever the size
        return None
    marks = marked(block.node)
    # Where `down` alone skips inputs, the plan still knows those of `up`.
    names = [marks[role].site for role in block.spec.roles[:-1] if role in marks] + [f"{block.name}.up"]
    site = next((plan.sites[name] for name in names if name in plan.sites), None)
    return Spread.of(site) if marks and site is not None else None
