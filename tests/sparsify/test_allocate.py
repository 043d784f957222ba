"""The path of sparsities: shares, order, and the least error there is."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparse_onnx.sparsify.allocate import LEVELS, Curve, greedy, skipped_share, uniform

STEPS = np.arange(20) * 0.05


def curve(scale: float, size: float = 1.0, power: float = 2.0) -> Curve:
    return Curve(size, STEPS, scale * STEPS**power)


def test_a_level_is_a_share_of_the_bytes() -> None:
    curves = [curve(1, 5), curve(0.1, 100), curve(3, 17, 4)]
    path = greedy(curves)
    assert path.shape == (LEVELS, 3) and (path[0] == 0).all()
    np.testing.assert_allclose(skipped_share(path, curves)[:95], np.arange(95) / 100, atol=1e-9)
    assert path[95:] == pytest.approx(0.95), "what no threshold reaches is as the last that one does"


def test_cheap_bytes_go_first() -> None:
    dear, cheap, large = curve(10), curve(0.01), curve(0.01, 100)
    path = greedy([dear, cheap, large])
    # The same error for a hundred times the bytes.
    assert path[50, 2] > 0.4 and path[50, 0] == 0 and path[50, 1] == 0


def test_what_costs_nothing_is_skipped_before_anything_else() -> None:
    natural = Curve(1, STEPS, np.maximum(0, STEPS - 0.6))
    path = greedy([natural, curve(1e-9, power=1)])
    assert path[30, 0] == pytest.approx(0.6) and path[30, 1] == 0


def test_a_cliff_is_crossed_where_what_is_behind_it_is_worth_it() -> None:
    cliff = Curve(1, np.array([0, 0.05, 0.9]), np.array([0, 1.0, 1.0]))
    path = greedy([cliff, curve(30, power=1)])
    assert path[40, 0] == pytest.approx(0.8) and path[40, 1] == 0


def test_noise_that_falls_is_no_gain() -> None:
    noisy = Curve(1, np.array([0, 0.3, 0.6]), np.array([0.1, 0.05, 0.2]))
    assert (np.diff(greedy([noisy, curve(1)]), axis=0) >= 0).all()


def test_the_same_for_all() -> None:
    path = uniform([curve(1), Curve(1, np.array([0, 0.5]), np.zeros(2))])
    assert (path[30] == 0.3).all() and tuple(path[90]) == pytest.approx((0.9, 0.5))


def test_nothing_to_allocate() -> None:
    assert greedy([]).shape == (LEVELS, 0) and skipped_share(greedy([]), []).shape == (LEVELS,)
    assert (greedy([curve(1, 0), curve(1)])[:, 0] == 0).all()


@pytest.mark.parametrize(
    ("steps", "errors"),
    [([0.1, 0.5], [0, 1]), ([0, 0.5], [0, np.nan]), ([0, 0.5, 0.5], [0, 1, 2]), ([0, 2.0], [0, 1]), ([], [])],
)
def test_no_curve(steps: list[float], errors: list[float]) -> None:
    with pytest.raises(ValueError, match="a curve needs"):
        Curve(1, np.array(steps), np.array(errors, np.float64))


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.lists(st.lists(st.floats(0, 1), min_size=4, max_size=4), min_size=1, max_size=3), st.data())
def test_no_choice_of_steps_is_better(increments: list[list[float]], data: st.DataObject) -> None:
    """On the hull greedy is optimal: no combination of tried sparsities skips as much with less error."""
    steps = np.array([0, 0.25, 0.5, 0.75, 1.0])
    sizes = [data.draw(st.sampled_from([1.0, 2.0, 5.0])) for _ in increments]
    curves = [Curve(size, steps, np.cumsum([0, *each])) for size, each in zip(sizes, increments, strict=True)]
    path = greedy(curves)
    assert (np.diff(path, axis=0) >= 0).all()
    level = data.draw(st.integers(0, 100))

    def lower(which: Curve, at: float) -> float:
        """The hull by brute force."""
        best = np.inf
        for a, b in itertools.combinations_with_replacement(range(5), 2):
            if steps[a] <= at <= steps[b]:
                share = (at - steps[a]) / (steps[b] - steps[a]) if b > a else 0.0
                best = min(best, which.error[a] + share * (which.error[b] - which.error[a]))
        return float(best)

    ours = sum(lower(each, path[level, at]) for at, each in enumerate(curves))
    target = sum(sizes) * level / 100
    for choice in itertools.product(range(5), repeat=len(curves)):
        skipped = sum(size * steps[at] for size, at in zip(sizes, choice, strict=True))
        if skipped >= target - 1e-9:
            assert sum(each.error[at] for each, at in zip(curves, choice, strict=True)) >= ours - 1e-9
