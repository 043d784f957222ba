"""How far a layer's results move when the small values of its input are dropped.

    error(c, s) = ||X W - X~ W|| / ||X W||      X~ = c where |X - c| <= tau, else X

over held-out rows X and all matrices W that read them. tau is the quantile s of |X - c| of other rows; at s = 0 nothing
is dropped. Rows of a block's experts go through their own expert's matrix.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from sparse_onnx.calibrate.describe import Description
from sparse_onnx.core.calibration import CENTRES, SPARSITIES

#: Largest finite answer: rows whose results are all zero have no relative error.
MOST = 1e6
#: Inputs of the largest layer of which the matrix W Wᵀ is taken.
_GRAM = 4096


def error_curves(
    parts: Iterable[tuple[np.ndarray, np.ndarray]], described: Description
) -> dict[str, np.ndarray]:
    """Errors at `SPARSITIES` by centre.

    Args:
        parts: rows ``[h, K]`` and a matrix ``[K, N]`` that they go through, float32; the same rows may come with
            several matrices.
        described: centres and quantiles, of other rows.
    """
    distinct = _distinct(described)
    lost = {name: np.zeros(len(SPARSITIES)) for name in distinct}
    whole = 0.0
    for rows, matrix in parts:
        if not len(rows):
            continue
        rows = np.ascontiguousarray(rows, np.float32)
        whole += _square(rows @ matrix)
        weigh = _Weigher(matrix, len(rows), len(distinct) * (len(SPARSITIES) - 1))
        for name in distinct:
            distance = rows - described.centre(name)
            size = np.abs(distance)
            for at, share in enumerate(SPARSITIES[1:], start=1):
                tau = described.quantiles[name][round(share * 100)]
                lost[name][at] += weigh(np.where(size <= np.float32(tau), distance, np.float32(0)))
    with np.errstate(divide="ignore", invalid="ignore"):
        curves = {
            name: np.where(values > 0, np.minimum(np.sqrt(values / whole), MOST), 0.0) if whole else
            np.where(values > 0, MOST, 0.0)
            for name, values in lost.items()
        }  # fmt: skip
    return {name: curves[_same(name, distinct, described)] for name in CENTRES}


def _distinct(described: Description) -> list[str]:
    """Centres without those that are the same as an earlier one."""
    kept: list[str] = []
    for name in CENTRES:
        if not any(np.array_equal(described.centre(name), described.centre(other)) for other in kept):
            kept.append(name)
    return kept


def _same(name: str, distinct: list[str], described: Description) -> str:
    return next(
        other for other in distinct if np.array_equal(described.centre(name), described.centre(other))
    )


class _Weigher:
    """||R W||² of rows R: by the product, or by R (W Wᵀ) Rᵀ where that is less work for so many R."""

    def __init__(self, matrix: np.ndarray, rows: int, times: int) -> None:
        inputs, outputs = matrix.shape
        direct = times * rows * inputs * outputs
        gram = inputs * inputs * outputs + times * rows * inputs * inputs
        self._matrix = matrix
        self._gram = matrix @ matrix.T if inputs <= _GRAM and gram < direct else None

    def __call__(self, rows: np.ndarray) -> float:
        if self._gram is None:
            return _square(rows @ self._matrix)
        return max(0.0, float(np.einsum("hk,hk->", rows @ self._gram, rows, dtype=np.float64)))


def _square(rows: np.ndarray) -> float:
    return float(np.einsum("hk,hk->", rows, rows, dtype=np.float64))
