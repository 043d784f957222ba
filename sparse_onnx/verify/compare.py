"""Numeric comparison of two sets of outputs."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator

import numpy as np

#: Largest accepted error, relative to the scale of its row, by element type. Summation order and fused kernels differ
#: between the two sides; a wrong expert is larger by orders of magnitude.
TOLERANCES = {"float64": 1e-4, "float32": 1e-4, "float16": 1e-2, "bfloat16": 6e-2}

#: Largest accepted error of blocks whose kernels round activations to 8 bits, by how they do it (`blocks.rounding`).
#: Their weights, and everything else about them, are compared without rounding, within `TOLERANCES`; this is for what
#: the kernel itself does on this processor. Measured (ORT 1.32; gated and plain experts of 64 to 2816 features, 4 and 8
#: bits): 1.0e-2 to 3.5e-2 for int8, 1.5e-2 to 8.1e-2 for int8_batch. A wrong expert is off by 5e-1 and more.
ROUNDED = {"int8": 1e-1, "int8_batch": 3e-1}

_EPSILON = {"float64": 2.3e-16, "float32": 1.2e-7, "float16": 9.8e-4, "bfloat16": 7.9e-3}
#: Masked entries (finfo.min, -1e9, -65504): such a value says nothing of the size of the others in its row.
_HUGE, _MARKER, _OUTLIER = 1e30, 1e4, 1e3
#: Rows of fewer elements do not show a scale of their own.
_NARROW = 16
#: Elements that are converted to float64 at once.
_CHUNK = 1 << 19


@dataclasses.dataclass(frozen=True)
class Difference:
    """`max_rel` is the largest absolute error over the scale of its row; `compared` counts elements; `scale` is the
    median of the scales of the reference's rows that have one, 0 where none has."""

    max_abs: float
    max_rel: float
    within: bool
    reason: str = ""
    compared: int = 0
    scale: float = 0.0

    @staticmethod
    def none() -> Difference:
        return Difference(0.0, 0.0, True)

    def worse(self, other: Difference) -> Difference:
        """The larger of the two in each measure; the reason of the first that is out of tolerance."""
        return Difference(
            max(self.max_abs, other.max_abs),
            max(self.max_rel, other.max_rel),
            self.within and other.within,
            self.reason or other.reason,
            self.compared + other.compared,
            max(self.scale, other.scale),
        )


def difference(
    expected: np.ndarray,
    actual: np.ndarray,
    tolerance: float | None = None,
    keep: np.ndarray | None = None,
    usual: float = 0.0,
) -> Difference:
    """Compares two arrays of the same model output.

    Each row (last axis) has a scale of its own, so that neither a large row nor a masked entry hides a wrong token:
    its largest magnitude without masked entries, or a small part of the tensor's median scale where that is more.

    Args:
        expected: the reference.
        actual: what is judged.
        tolerance: accepted `max_rel`; None takes `TOLERANCES` of the coarser of the two types.
        keep: boolean mask over the leading axes: which tokens are compared; None compares all.
        usual: `scale` of the same output in other runs, for one in which the reference is zero throughout: a sum that
            rounds is not exactly zero then.
    """
    if expected.shape != actual.shape:
        return Difference(math.inf, math.inf, False, f"shape {actual.shape} instead of {expected.shape}")
    if keep is not None:
        expected, actual = expected[keep], actual[keep]
    if expected.size == 0:
        return Difference.none()
    name = expected.dtype.name
    if name not in TOLERANCES:
        wrong = int(np.count_nonzero(expected != actual))
        reason = f"{wrong} values differ" if wrong else ""
        return Difference(float(wrong), float(wrong), wrong == 0, reason, expected.size)
    coarser = max((name, actual.dtype.name), key=lambda each: TOLERANCES.get(each, 0.0))
    tolerance = TOLERANCES[coarser] if tolerance is None else tolerance
    width = expected.shape[-1] if expected.ndim else 1
    left, right = expected.reshape(-1, width), actual.reshape(-1, width)
    if not all(same_places(a, b) for _, a, b in _chunks(left, right)):
        return Difference(math.inf, math.inf, False, "infinities or NaNs in other places")
    scales = np.empty(len(left))
    for rows, a, b in _chunks(left, right):
        scales[rows] = _scales(a, b)
    scale, part = _usual(scales), _part(width, coarser, tolerance)
    floor = part * (scale or usual)
    error, relative, compared = 0.0, 0.0, 0
    for rows, a, b in _chunks(left, right):
        finite = np.isfinite(a)
        compared += int(finite.sum())
        gap = np.where(finite, np.abs(np.where(finite, a - b, 0)), 0)
        error = max(error, float(gap.max()))
        own = _against(a, scales[rows], floor)
        with np.errstate(divide="ignore", invalid="ignore"):
            relative = max(relative, float(np.where(gap > 0, gap / own, 0).max()))
    within = relative <= tolerance
    reason = "" if within else f"relative error {relative:.2g} > {tolerance:.2g}"
    return Difference(error, relative, within, reason, compared, scale)


def _chunks(left: np.ndarray, right: np.ndarray) -> Iterator[tuple[slice, np.ndarray, np.ndarray]]:
    """Both as float64, some rows at a time: whole outputs in float64 would take several times their memory."""
    step = max(1, _CHUNK // left.shape[1])
    with np.errstate(invalid="ignore"):
        for start in range(0, len(left), step):
            rows = slice(start, start + step)
            yield rows, left[rows].astype(np.float64), right[rows].astype(np.float64)


def sizes(expected: np.ndarray, actual: np.ndarray) -> np.ndarray:
    """What an error of each element of `actual` counts against, by its row, as in `difference`; above 0. Not empty."""
    name, width = actual.dtype.name, expected.shape[-1]
    left, right = (array.reshape(-1, width).astype(np.float64) for array in (expected, actual))
    scales = _scales(left, right)
    floor = _part(width, name, TOLERANCES[name]) * _usual(scales)
    own = _against(left, scales, floor).reshape(expected.shape)
    return np.where(own > 0, own, 1.0)


def _usual(scales: np.ndarray) -> float:
    """The median of those that there are."""
    known = scales[scales > 0]
    return float(np.median(known)) if known.size else 0.0


def _part(width: int, name: str, tolerance: float) -> float:
    """Of the usual scale: a row's own counts from there on."""
    return 1.0 if width < _NARROW else min(1.0, max(1e-2, 4 * _EPSILON[name] / max(tolerance, 1e-300)))


def _against(expected: np.ndarray, scales: np.ndarray, floor: float) -> np.ndarray:
    own = np.broadcast_to(np.maximum(scales, floor)[:, None], expected.shape)
    return np.where(np.abs(expected) >= _HUGE, np.abs(expected), own)


def same_places(left: np.ndarray, right: np.ndarray) -> bool:
    """Whether NaN and the infinities lie in the same places."""
    finite = np.isfinite(left)
    return np.array_equal(finite, np.isfinite(right)) and np.array_equal(
        left[~finite], right[~finite], equal_nan=True
    )


def _scales(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """The largest ordinary magnitude of each row; 0 for a row without one."""
    size = np.where(np.isfinite(left), np.abs(left), 0)
    masked = size >= _HUGE
    marker = (size >= _MARKER) & (left == right)
    if marker.any():  # the median is worth its time only here
        masked |= marker & (size > _OUTLIER * np.median(size, axis=1, keepdims=True))
    return np.where(masked, 0, size).max(axis=1)
