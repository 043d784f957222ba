"""Samples, descriptions and error curves against their definitions."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from sparse_onnx.blocks.thresholded import thresholded_reference
from sparse_onnx.calibrate import errors
from sparse_onnx.calibrate.describe import describe, mode, quantiles
from sparse_onnx.calibrate.errors import error_curves
from sparse_onnx.calibrate.reservoir import Reservoir, Store
from sparse_onnx.calibrate.routing import Routing
from sparse_onnx.core.calibration import CENTRES, SPARSITIES

FLOATS = hnp.arrays(
    np.float32,
    hnp.array_shapes(min_dims=2, max_dims=2, max_side=9),
    elements=st.floats(-1e3, 1e3, width=32),
)


@settings(max_examples=60, deadline=None)
@given(cuts=st.lists(st.integers(0, 13), max_size=12), size=st.integers(1, 8))
def test_a_sample_does_not_depend_on_how_the_stream_is_cut(cuts: list[int], size: int) -> None:
    stream = np.arange(sum(cuts) * 2, dtype=np.float32).reshape(-1, 2)
    pieces = np.split(stream, np.cumsum(cuts)[:-1]) if cuts else []
    samples = []
    for parts in (pieces, [stream]):
        reservoir = Reservoir(np.zeros((size, 2), np.float32), (7,))
        for part in parts:
            reservoir.add(part)
        samples.append(reservoir.rows.copy())
    np.testing.assert_array_equal(*samples)
    assert len(samples[0]) == min(size, len(stream))
    assert len({tuple(row) for row in samples[0].tolist()}) == len(samples[0])


def test_every_row_of_a_stream_is_as_likely_in_the_sample() -> None:
    hits = np.zeros(40)
    for seed in range(2000):
        reservoir = Reservoir(np.zeros((10, 1), np.float32), (seed,))
        reservoir.add(np.arange(40, dtype=np.float32)[:, None])
        hits[reservoir.rows[:, 0].astype(int)] += 1
    # 2000 draws of one in four: 500 +- 19 each; six sigmas.
    assert np.abs(hits - 500).max() < 6 * np.sqrt(2000 * 0.25 * 0.75)


def test_samples_that_are_too_large_lie_in_a_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sparse_onnx.calibrate.reservoir._IN_MEMORY", 0)
    store = Store(4 * 6 * 5)
    first, second = store.array(2, 5), store.array(4, 5)
    first[:], second[:] = 1, 2
    assert isinstance(first, np.memmap) and first.sum() == 10 and second.sum() == 40


@settings(max_examples=100, deadline=None)
@given(rows=FLOATS)
def test_a_description_is_what_numpy_says(rows: np.ndarray) -> None:
    found = describe(rows)
    np.testing.assert_allclose(found.median, np.median(rows), rtol=1e-6, atol=1e-6)
    np.testing.assert_array_equal(found.channel_median, np.median(rows, axis=0))
    for name in CENTRES:
        distance = np.abs(rows - found.centre(name))
        expected = np.quantile(distance.astype(np.float64), np.linspace(0, 1, 101))
        np.testing.assert_allclose(found.quantiles[name], expected, rtol=1e-5, atol=1e-5)
    assert rows.min() - 1e-3 <= found.mode <= rows.max() + 1e-3


def test_the_mode_of_gelu_is_its_minimum() -> None:
    from math import erf

    x = np.random.default_rng(0).normal(-0.3, 1.0, 40_000)
    gelu = x * 0.5 * (1 + np.asarray([erf(value / 2**0.5) for value in x]))
    assert mode(np.sort(gelu.astype(np.float32))) == pytest.approx(-0.17, abs=0.01)


def test_the_mode_of_relu_is_zero_and_of_a_heavy_tail_near_it() -> None:
    rng = np.random.default_rng(0)
    assert mode(np.sort(np.maximum(rng.normal(0.5, 1, 9999), 0).astype(np.float32))) == 0
    assert abs(mode(np.sort(rng.standard_t(1.5, 99_999).astype(np.float32)))) < 0.1
    assert mode(np.full(5, 3.0, np.float32)) == 3.0


@settings(max_examples=60, deadline=None)
@given(
    inputs=st.integers(1, 12),
    outputs=st.lists(st.integers(1, 30), min_size=1, max_size=3),
    held_out=st.integers(1, 9),
    seed=st.integers(0, 99),
    gram=st.booleans(),
)
def test_errors_are_those_of_the_thresholded_layer(
    inputs: int, outputs: list[int], held_out: int, seed: int, gram: bool
) -> None:
    rng = np.random.default_rng(seed)
    described = describe(rng.standard_t(3, (20, inputs)).astype(np.float32))
    rows = rng.standard_t(3, (held_out, inputs)).astype(np.float32)
    matrices = [rng.standard_normal((inputs, n)).astype(np.float32) for n in outputs]
    before, errors._GRAM = errors._GRAM, 4096 if gram else 0
    try:
        found = error_curves(((rows, matrix) for matrix in matrices), described)
    finally:
        errors._GRAM = before
    parts = [rows.astype(np.float64) @ matrix for matrix in matrices]
    sizes = [np.linalg.norm(part, axis=1, keepdims=True) for part in parts]
    levelled = np.concatenate(
        [
            np.broadcast_to(np.maximum(size, np.median(size)), part.shape)
            for size, part in zip(sizes, parts, strict=True)
        ],
        axis=1,
    )
    whole = np.concatenate(parts, axis=1)
    for name in CENTRES:
        centre = np.broadcast_to(described.centre(name), inputs)
        for share, error in zip(SPARSITIES, found[name], strict=True):
            tau = np.asarray([-1.0 if share == 0 else described.quantiles[name][round(share * 100)]])
            sparse = np.concatenate(
                [thresholded_reference(rows, matrix, tau, centre, centre @ matrix) for matrix in matrices],
                axis=1,
            )
            expected = np.linalg.norm((sparse - whole) / levelled) / np.linalg.norm(whole / levelled)
            np.testing.assert_allclose(error, expected, rtol=2e-3, atol=1e-5)


def test_one_huge_row_does_not_decide() -> None:
    """The first token of many language models: what is lost of all other tokens must still be seen."""
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((64, 32)).astype(np.float32)
    matrix = rng.standard_normal((32, 16)).astype(np.float32)
    described = describe(rng.standard_normal((200, 32)).astype(np.float32))
    plain = error_curves([(rows, matrix)], described)["zero"]
    rows[0] *= 1000
    found = error_curves([(rows, matrix)], described)["zero"]
    np.testing.assert_allclose(found, plain, rtol=0.05)
    factors = errors.row_factors(np.array([[0.0, 0.0], [3.0, 4.0], [0.0, 5.0], [300.0, 400.0]]))
    np.testing.assert_allclose(factors[:, 0], [0.2, 0.2, 0.2, 0.002])
    np.testing.assert_array_equal(errors.row_factors(np.array([[0.0], [0.0], [2.0]])), [[0], [0], [0.5]])


def test_results_that_are_all_zero_have_finite_errors() -> None:
    described = describe(np.ones((4, 3), np.float32))
    found = error_curves([(np.zeros((2, 3), np.float32), np.ones((3, 2), np.float32))], described)
    assert all(np.isfinite(curve).all() for curve in found.values())
    assert not found["zero"].any()


@settings(max_examples=80, deadline=None)
@given(data=st.data(), experts=st.integers(1, 6), slots=st.integers(1, 3))
def test_routing_counts_are_those_of_a_loop(data: st.DataObject, experts: int, slots: int) -> None:
    """Indices of E are dropped slots; a token may name an expert twice."""
    rows = data.draw(st.lists(st.lists(st.integers(0, experts), min_size=slots, max_size=slots), max_size=12))
    index = np.asarray(rows, np.int64).reshape(-1, slots)
    weight = np.random.default_rng(0).uniform(size=index.shape).astype(np.float32)
    routing = Routing("block", experts, (0,))
    for start in range(0, len(index), 5):
        routing.add(index[start : start + 5], weight[start : start + 5])
    record = routing.record(())
    assert record.tokens == len(index)
    assert record.dropped == sum(expert == experts for row in rows for expert in row)
    for one in range(experts):
        assert record.loads[one] == sum(row.count(one) for row in rows)
        for other in range(experts):
            assert record.coactivation is not None
            assert record.coactivation[one][other] == sum(one in row and other in row for row in rows)
    assert record.unused == tuple(one for one in range(experts) if record.loads[one] == 0)
    kept = weight[index < experts]
    np.testing.assert_allclose(
        record.weight_quantiles, quantiles(kept) if kept.size else np.zeros(101), rtol=1e-5
    )


def test_coactivation_of_very_many_experts_is_not_stored() -> None:
    routing = Routing("block", 129, (0,))
    routing.add(np.asarray([[3, 128]]), np.asarray([[0.5, 0.5]]))
    record = routing.record(())
    assert record.coactivation is None and sum(record.loads) == 2 and len(record.unused) == 127
