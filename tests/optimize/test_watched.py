"""How layers are judged against numpy while the model runs."""

from __future__ import annotations

import numpy as np
import pytest

from sparse_onnx.core.errors import VerificationError
from sparse_onnx.optimize.watched_gated import judged
from sparse_onnx.sparsify.record import Acting

LAYER = Acting("site", "x", "bound", "centre", 0, layer="y")


def results(dtype: str = "float32", rows: int = 9) -> tuple[np.ndarray, np.ndarray]:
    """Of numpy and of the model, which rounds."""
    expected = np.random.default_rng(0).standard_normal((rows, 32))
    return expected, expected.astype(dtype)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("shape", [(9, 32), (3, 3, 32)])
def test_a_large_row_does_not_hide_the_others(shape: tuple[int, ...], dtype: str) -> None:
    expected, _ = results()
    expected[0] *= 3e4 if dtype == "float32" else 1e4
    y = expected.astype(dtype)
    assert (
        judged(LAYER, y.reshape(shape), expected.reshape(shape), np.abs(y - expected).reshape(shape)) < 1e-3
    )
    y[5] = y[4]
    with pytest.raises(VerificationError, match="differs from numpy: relative error"):
        judged(LAYER, y.reshape(shape), expected.reshape(shape), np.abs(y - expected).reshape(shape))


def test_a_row_of_nearly_nothing_counts_by_the_others() -> None:
    expected, _ = results()
    expected[3] = 1e-12
    y = (expected + 3e-8).astype(np.float32)
    assert judged(LAYER, y, expected, np.abs(y - expected)) < 1e-4


def test_nothing_at_all() -> None:
    expected, y = results(rows=0)
    assert judged(LAYER, y, expected, np.abs(y - expected)) == 0
    nothing = np.zeros((3, 32), np.float32)
    assert judged(LAYER, nothing, nothing.astype(np.float64), np.zeros((3, 32))) == 0


@pytest.mark.parametrize(
    ("there", "here"), [(np.inf, np.nan), (np.nan, np.inf), (np.inf, -np.inf), (np.nan, 1), (1, np.inf)]
)
def test_nan_and_the_infinities_are_told_apart(there: float, here: float) -> None:
    expected, y = results()
    expected[2, 3], y[2, 3] = there, here
    with np.errstate(invalid="ignore"):
        gap = np.abs(y - expected)
    with pytest.raises(VerificationError, match="where NaN and infinities are"):
        judged(LAYER, y, expected, gap)
    y[2, 3] = there
    with np.errstate(invalid="ignore"):
        assert judged(LAYER, y, expected, np.abs(y - expected)) < 1e-6
