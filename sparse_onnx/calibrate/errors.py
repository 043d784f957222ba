"""How far a layer's results move when the small values of its input are dropped.

    error(c, s) = ||D (X W - X~ W)|| / ||D X W||      X~ = c where |X - c| <= tau, else X
    D = diag(1 / max(||x W||, median of ||x W||))      over rows x of X

over held-out rows X and all matrices W that read them. tau is the quantile s of |X - c| of other rows; at s = 0 nothing
is dropped. Rows of a block's experts go through their own expert's matrix. Without D one row decides: some layers of
language models give the first token results hundreds of times as large as all others', next to which the loss of
everything else is nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np

from sparse_onnx.calibrate.describe import Description
from sparse_onnx.core.calibration import CENTRES, SPARSITIES

#: Largest finite answer: rows whose results are all zero have no relative error.
MOST = 1e6
#: Inputs of the largest layer of which the matrix W Wᵀ is taken.
_GRAM = 4096
#: Bytes of rows, with different values dropped, that are multiplied at once.
_AT_ONCE = 32 << 20


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
        factors, square = _levelled(rows, matrix)
        whole += square
        weigh = _Weigher(matrix, len(rows), len(distinct) * (len(SPARSITIES) - 1))
        for name in distinct:
            distance = rows - described.centre(name)
            size = np.abs(distance)
            distance *= factors
            for some in _chunks(rows.nbytes):
                tau = described.quantiles[name][[round(SPARSITIES[at] * 100) for at in some]]
                dropped = size <= tau.astype(np.float32)[:, None, None]
                lost[name][some] += weigh(np.where(dropped, distance, np.float32(0)))
    curves = {name: _relative(values, whole) for name, values in lost.items()}
    return {name: curves[_same(name, distinct, described)] for name in CENTRES}


def row_factors(results: np.ndarray) -> np.ndarray:
    """What the rows of a layer's results ``[h, N]`` are multiplied by so that a large one counts no more than another:
    ``[h, 1]``. Rows of less than the median's size count less; where all are zero the factors are 1."""
    sizes = np.linalg.norm(results, axis=1, keepdims=True)
    bounds = np.maximum(sizes, np.median(sizes))
    if not bounds.any():
        return np.ones_like(bounds)
    return np.where(bounds > 0, 1 / np.where(bounds > 0, bounds, 1), 0).astype(results.dtype)


def gated_errors(
    parts: Iterable[tuple[np.ndarray, np.ndarray, np.ndarray]], quantiles: np.ndarray
) -> np.ndarray:
    """||D (h W - h~ W)|| / ||D h W|| at `SPARSITIES`, where h~ is h without the units whose gate's activation is small.

    Args:
        parts: sizes of activations and h, ``[n, I]`` each, and down ``[I, N]`` that h goes through.
        quantiles: ``[101]`` of the sizes, of other rows.
    """
    lost, whole = np.zeros(len(SPARSITIES)), 0.0
    tau = quantiles[[round(share * 100) for share in SPARSITIES]].astype(np.float32)
    for sizes, hidden, matrix in parts:
        if not len(hidden):
            continue
        hidden = np.ascontiguousarray(hidden, np.float32)
        factors, square = _levelled(hidden, matrix)
        whole += square
        levelled = factors * hidden
        weigh = _Weigher(matrix, len(hidden), len(SPARSITIES) - 1)
        for some in _chunks(hidden.nbytes):
            lost[some] += weigh(np.where(sizes <= tau[some][:, None, None], levelled, np.float32(0)))
    return _relative(lost, whole)


def _levelled(rows: np.ndarray, matrix: np.ndarray) -> tuple[np.ndarray, float]:
    """D of the rows, and ||D X W||²."""
    results = rows @ matrix
    factors = row_factors(results)
    return factors, _square(factors * results)


def _relative(lost: np.ndarray, whole: float) -> np.ndarray:
    """Of squares."""
    with np.errstate(divide="ignore"):
        errors = np.sqrt(lost / whole) if whole else np.full(len(lost), MOST)
    return np.where(lost > 0, np.minimum(errors, MOST), 0.0)


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


def _chunks(nbytes: int) -> Iterator[list[int]]:
    """Sparsities but the first, so many at once as have room for their rows: few large products, not many small."""
    step = max(1, _AT_ONCE // max(1, nbytes))
    every = list(range(1, len(SPARSITIES)))
    return (every[at : at + step] for at in range(0, len(every), step))


class _Weigher:
    """||R W||² of each of several R ``[s, h, K]``: by the product, or by R (W Wᵀ) Rᵀ where that is less work for so
    many R."""

    def __init__(self, matrix: np.ndarray, rows: int, times: int) -> None:
        inputs, outputs = matrix.shape
        direct = times * rows * inputs * outputs
        gram = inputs * inputs * outputs + times * rows * inputs * inputs
        self._matrix = matrix
        self._gram = matrix @ matrix.T if inputs <= _GRAM and gram < direct else None

    def __call__(self, rows: np.ndarray) -> np.ndarray:
        flat = rows.reshape(-1, rows.shape[-1])
        if self._gram is None:
            results = (flat @ self._matrix).reshape(len(rows), -1)
            return np.einsum("sn,sn->s", results, results, dtype=np.float64)
        results = (flat @ self._gram).reshape(len(rows), -1)
        return np.maximum(0.0, np.einsum("sn,sn->s", results, rows.reshape(len(rows), -1), dtype=np.float64))


def _square(rows: np.ndarray) -> float:
    return float(np.einsum("hk,hk->", rows, rows, dtype=np.float64))
