"""What a sample of rows says: median, mode, medians of channels, quantiles of the distance from a centre."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np

from sparse_onnx.core.calibration import CENTRES, POINTS

#: Values that quantiles and the mode are taken of, at most: evenly many rows of the sample.
_VALUES = 1 << 21
_BINS = 2000
#: Share of values at each end that the histogram leaves out: a few outliers would take all of its bins.
_TAILS = 0.005
#: Share of equal zeros that make zero the mode: a density has no peak as high as a point mass.
_POINT_MASS = 0.05
#: Of the bandwidth that Scott's rule gives; as SCAP's calibration (bw_adjust of seaborn's kdeplot).
_BANDWIDTH = 0.5


@dataclasses.dataclass(frozen=True, eq=False)
class Description:
    """`channel_median` ``[K]``; `quantiles` ``[101]`` by centre."""

    median: float
    mode: float
    channel_median: np.ndarray
    quantiles: Mapping[str, np.ndarray]

    def centre(self, name: str) -> np.ndarray:
        """As a float32 array, 0-D or ``[K]``."""
        values = {
            "zero": 0.0,
            "median": self.median,
            "mode": self.mode,
            "channel_median": self.channel_median,
        }
        return np.asarray(values[name], np.float32)


def rounded(value: float) -> float:
    """Six digits: what a sample can say, and shorter to write."""
    return float(f"{value:.6g}")


def describe(rows: np.ndarray) -> Description:
    """Of rows ``[n, K]``, n at least 1, all finite."""
    rows = np.asarray(rows, np.float32)
    few = rows[:: max(1, -(-rows.size // _VALUES))]
    channels = np.median(rows, axis=0)
    values = np.sort(few, axis=None)
    found = Description(float(_sorted_quantiles(values, np.asarray([0.5]))[0]), mode(values), channels, {})
    sketches = {name: quantiles(np.abs(few - found.centre(name))) for name in CENTRES}
    return dataclasses.replace(found, quantiles=sketches)


def quantiles(values: np.ndarray) -> np.ndarray:
    """``[101]`` of all values, 0 to 100 %."""
    return _sorted_quantiles(np.sort(values, axis=None), np.linspace(0, 1, POINTS))


def mode(values: np.ndarray) -> float:
    """The most frequent value: where a smoothed histogram is highest. Zero where many values are exactly that.

    Args:
        values: sorted, at least one.
    """
    zeros = np.searchsorted(values, 0, "right") - np.searchsorted(values, 0, "left")
    if zeros >= _POINT_MASS * len(values):
        return 0.0
    low, high = _sorted_quantiles(values, np.asarray([_TAILS, 1 - _TAILS]))
    if not low < high:
        return float(low)
    inside = values[np.searchsorted(values, low) : np.searchsorted(values, high, "right")].astype(np.float64)
    if not len(inside):  # a few values, none of them between the tails
        return float(values[len(values) // 2])
    counts, edges = np.histogram(inside, bins=_BINS, range=(float(low), float(high)))
    width = edges[1] - edges[0]
    bandwidth = _BANDWIDTH * inside.std() * len(inside) ** -0.2
    reach = min(_BINS // 2 - 1, max(1, int(np.ceil(4 * bandwidth / width))))
    kernel = np.exp(-0.5 * (np.arange(-reach, reach + 1) * width / max(bandwidth, width / 4)) ** 2)
    density = np.convolve(counts, kernel, "same")
    # At the ends half of the kernel sees nothing: a one-sided peak (GELU's minimum) lies there.
    density /= np.convolve(np.ones(_BINS), kernel, "same")
    at = int(density.argmax())
    return float((edges[at] + edges[at + 1]) / 2)


def _sorted_quantiles(values: np.ndarray, shares: np.ndarray) -> np.ndarray:
    """Linear between the values, as `numpy.quantile`, float64."""
    place = shares * (len(values) - 1)
    below = np.floor(place).astype(np.int64)
    above = np.minimum(below + 1, len(values) - 1)
    first, second = values[below].astype(np.float64), values[above].astype(np.float64)
    return first + (second - first) * (place - below)
