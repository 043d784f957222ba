"""How sparse each group of layers is to be, for every share of the weights that is to be skipped.

    level L of 0..100:  sum over groups of bytes · sparsity  =  L % of all bytes,  at the least sum of squared errors

Layers that read the same input form a group and share its sparsity. The error of a group is that of its layers'
outputs, relative to their size and squared, as measured on held-out rows; errors of different layers count alike. TEAL
(arXiv 2408.14690) takes one step at a time where it costs least; here a step costs error for each byte that it skips,
and steps of any width are compared, so that a flat piece behind a steep one is found. Up to where two steps meet that
is the least sum there is: the steps of each group are those of the lower convex hull of its errors.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

#: Levels that a running model may be set to: 0 skips nothing.
LEVELS = 101

Floats = npt.NDArray[np.float64]


@dataclasses.dataclass(frozen=True)
class Curve:
    """What skipping costs a group of layers.

    Attributes:
        bytes: of its weights that one token reads where nothing is skipped.
        sparsity: ``[S]``, ascending from 0: the shares of its inputs that were tried.
        error: ``[S]``, squared relative errors of the outputs, summed over its layers.
    """

    bytes: float
    sparsity: Floats
    error: Floats

    def __post_init__(self) -> None:
        steps, errors = self.sparsity, self.error
        sound = steps.ndim == 1 and steps.shape == errors.shape and len(steps) > 0 and steps[0] == 0
        if not (sound and (np.diff(steps) > 0).all() and steps[-1] <= 1 and np.isfinite(errors).all()):
            raise ValueError("a curve needs ascending sparsities from 0 to 1, and an error for each")
        if not (self.bytes >= 0 and np.isfinite(self.bytes)):
            raise ValueError(f"a group of {self.bytes} bytes")


@dataclasses.dataclass(frozen=True)
class _Step:
    group: int
    start: float
    end: float
    slope: float
    """Error for each byte that it skips."""


def greedy(curves: Sequence[Curve]) -> Floats:
    """The sparsity of each group at each level: ``[101, groups]``, 0 at level 0, never falling.

    Levels that no thresholds reach, because sparsities end before 1, are as the highest one that is reached.
    """
    path = np.zeros((LEVELS, len(curves)))
    total = sum(curve.bytes for curve in curves)
    steps = sorted(
        (step for group, curve in enumerate(curves) for step in _hull(group, curve)),
        key=lambda step: (step.slope, step.group, step.start),
    )
    state, skipped, level = np.zeros(len(curves)), 0.0, 1
    for step in steps:
        width = curves[step.group].bytes * (step.end - step.start)
        while level < LEVELS and total * level / (LEVELS - 1) <= skipped + width:
            share = (total * level / (LEVELS - 1) - skipped) / width
            path[level] = state
            path[level, step.group] = step.start + share * (step.end - step.start)
            level += 1
        state[step.group] = step.end
        skipped += width
    path[level:] = state
    return np.maximum.accumulate(path, axis=0)  # rounding alone would make it fall


def uniform(curves: Sequence[Curve]) -> Floats:
    """The same sparsity for each group, as far as its curve goes: ``[101, groups]``."""
    levels = np.linspace(0, 1, LEVELS)[:, None]
    return np.minimum(levels, np.array([curve.sparsity[-1] for curve in curves])[None])


def skipped_share(path: Floats, curves: Sequence[Curve]) -> Floats:
    """The share of all bytes that each level skips: ``[101]``."""
    sizes = np.array([curve.bytes for curve in curves])
    return path @ sizes / max(sizes.sum(), 1e-300) if len(curves) else np.zeros(LEVELS)


def _hull(group: int, curve: Curve) -> list[_Step]:
    """The lower convex hull of the errors, which never fall with sparsity: where a measured one does, that is noise."""
    if not curve.bytes:
        return []
    x, y = curve.sparsity, np.maximum.accumulate(np.maximum(curve.error, 0))
    corners: list[int] = []
    for at in range(len(x)):
        while len(corners) > 1 and _above(x, y, corners[-2], corners[-1], at):
            corners.pop()
        corners.append(at)
    return [
        _Step(group, float(x[a]), float(x[b]), float((y[b] - y[a]) / (x[b] - x[a]) / curve.bytes))
        for a, b in itertools.pairwise(corners)
    ]


def _above(x: Floats, y: Floats, first: int, middle: int, last: int) -> bool:
    """Whether the middle point lies on or above the line between the others."""
    return bool(
        (y[middle] - y[first]) * (x[last] - x[first]) >= (y[last] - y[first]) * (x[middle] - x[first])
    )
