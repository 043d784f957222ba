from __future__ import annotations

import numpy as np
import pytest

from sparse_onnx.verify.compare import difference


def test_error_is_relative_to_the_largest_output() -> None:
    expected = np.asarray([100.0, 0.001], np.float32)
    found = difference(expected, expected + np.float32(0.005))
    assert found.within and found.max_rel == pytest.approx(5e-5, rel=1e-2)
    assert not difference(expected, expected + np.float32(0.02)).within


@pytest.mark.parametrize(
    ("expected", "actual", "reason"),
    [
        ([1.0, np.nan], [1.0, 2.0], "NaN"),
        ([1.0, np.inf], [1.0, -np.inf], "infinities"),
        ([[1.0, 2.0]], [1.0, 2.0], "shape"),
        ([0.0], [1e-30], "relative error"),
    ],
)
def test_what_is_never_within(expected: list, actual: list, reason: str) -> None:
    found = difference(np.asarray(expected, np.float32), np.asarray(actual, np.float32))
    assert not found.within and reason in found.reason


def test_same_infinities_and_nans_are_the_same() -> None:
    values = np.asarray([np.nan, np.inf, -np.inf, 1.0], np.float32)
    assert difference(values, values.copy()).within


def test_integers_are_exact() -> None:
    assert difference(np.arange(4), np.arange(4)).within
    assert difference(np.arange(4), np.asarray([0, 1, 2, 4])).reason == "1 values differ"


def test_empty_and_masked() -> None:
    assert difference(np.zeros((0, 3), np.float32), np.zeros((0, 3), np.float32)).within
    a, b = np.zeros((3, 2), np.float32), np.zeros((3, 2), np.float32)
    a[:], b[:] = 1, 1
    b[1] = 7
    assert not difference(a, b).within
    assert difference(a, b, keep=np.asarray([True, False, True])).within


def test_the_coarser_type_decides() -> None:
    expected = np.ones(3, np.float32)
    assert difference(expected, (expected * 1.004).astype(np.float16)).within
    assert not difference(expected, expected * np.float32(1.004)).within


def rows(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((32, 24)).astype(np.float32)


@pytest.mark.parametrize("marker", [np.finfo(np.float32).min, -1e9, -65504.0])
def test_a_masked_column_hides_nothing(marker: float) -> None:
    expected = rows()
    expected[:, 3] = marker
    actual = expected.copy()
    actual[5, 7] += 0.01
    assert not difference(expected, actual).within
    assert difference(expected, np.where(expected == marker, expected, expected + np.float32(1e-6))).within


def test_a_large_row_does_not_hide_a_wrong_one() -> None:
    expected = rows()
    expected[0] *= 1e5
    actual = expected.copy()
    actual[9] = -actual[9]
    assert not difference(expected, actual).within


@pytest.mark.parametrize(("dtype", "size"), [(np.float32, 1.0), (np.float32, 1e-6), (np.float16, 1.0)])
def test_rounding_passes_in_small_rows_too(dtype: type, size: float) -> None:
    """A row whose terms cancel keeps the rounding errors of the terms."""
    expected = rows() * size
    expected[4] *= 1e-4
    noise = np.random.default_rng(1).standard_normal(expected.shape) * 2 * np.finfo(dtype).eps * size
    assert difference(expected.astype(dtype), (expected + noise).astype(dtype)).within


def test_nothing_finite_is_not_compared() -> None:
    nothing = np.full((4, 20), np.nan, np.float32)
    assert difference(nothing, nothing.copy()).compared == 0
    assert difference(rows(), rows()).compared == 32 * 24


def test_memory_stays_near_that_of_the_arrays() -> None:
    import tracemalloc

    expected = np.ones((64, 1 << 17), np.float32)
    actual = expected.copy()
    tracemalloc.start()
    try:
        assert difference(expected, actual).within
        assert tracemalloc.get_traced_memory()[1] < 2.5 * expected.nbytes
    finally:
        tracemalloc.stop()


def test_rounding_where_all_is_zero_is_no_error() -> None:
    """A centre that is subtracted and added again leaves rounding in rows of zeros (thresholds at level 0)."""
    zero = np.zeros((6, 32), np.float32)
    assert not difference(zero, zero + np.float32(1e-8)).within, (
        "nothing says how large the output usually is"
    )
    usual = difference(rows(), rows()).scale
    assert 1 < usual < 4
    assert difference(zero, zero + np.float32(1e-8), usual=usual).within
    assert not difference(zero, zero + np.float32(1e-3), usual=usual).within
    mixed = rows()
    assert not difference(mixed, mixed + np.float32(1e-2), usual=1e9).within, (
        "rows that have a scale keep theirs"
    )
