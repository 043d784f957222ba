"""The rounds: everybody once, on the same input, in turning order."""

from __future__ import annotations

import collections
import itertools

import numpy as np
import pytest

from sparse_onnx.bench import measure
from sparse_onnx.bench.measure import Contestant, interleave, rows


def logged(names: str) -> tuple[list[Contestant], list[tuple[str, int]]]:
    log: list[tuple[str, int]] = []
    return [Contestant(name, lambda index, name=name: log.append((name, index))) for name in names], log


@pytest.mark.parametrize("names", ["a", "ab", "abc", "abcde"])
def test_each_round_runs_everybody_once_on_one_input(names: str) -> None:
    contestants, log = logged(names)
    times = interleave(contestants, 4, rounds=12)
    assert times.shape == (12, len(names)) and (times >= 0).all()
    pairs = log[len(names) * 5 :]  # behind the warm-up, which runs each input once and one twice
    timed = pairs[1::2]
    assert all(
        name == before and index != other
        for (before, other), (name, index) in zip(pairs[::2], timed, strict=True)
    )
    for number, (start, stop) in enumerate(itertools.pairwise(range(0, len(timed) + 1, len(names)))):
        assert sorted(timed[start:stop]) == [(name, number % 4) for name in names]


def test_everybody_is_in_every_place_and_follows_everybody_else() -> None:
    contestants, log = logged("abcd")
    interleave(contestants, 1, rounds=16)
    timed = [name for name, _ in log[8:]]
    firsts = collections.Counter(timed[::4])
    assert set(firsts) == set("abcd")
    followers = {name: {b for a, b in itertools.pairwise(timed) if a == name} - {name} for name in "abcd"}
    assert all(len(found) >= 2 for found in followers.values())


@pytest.mark.parametrize(("names", "inputs"), [("ab", 6), ("abc", 3), ("abcdef", 6), ("abcdefg", 6)])
def test_everybody_sees_every_input_in_every_place_and_both_directions(names: str, inputs: int) -> None:
    contestants, log = logged(names)
    count = len(names)
    interleave(contestants, inputs, rounds=2 * count * inputs)
    timed = log[count * (inputs + 1) :][1::2]
    seen = set()
    for start in range(0, len(timed), count):
        order = "".join(name for name, _ in timed[start : start + count])
        seen |= {(name, place, order, timed[start][1]) for place, name in enumerate(order)}
    both = [names, names[::-1]] if count > 2 else [names]
    orders = {each[turn:] + each[:turn] for each in both for turn in range(count)}
    assert seen == {
        (name, order.index(name), order, index)
        for name in names
        for order in orders
        for index in range(inputs)
    }


def test_long_runs_need_no_other_before_them(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = itertools.count(step=0.05)
    monkeypatch.setattr(measure.time, "perf_counter", lambda: next(clock))
    contestants, log = logged("ab")
    interleave(contestants, 4, rounds=3)
    assert len(log) == 2 * 5 + 2 * 3


def test_every_input_is_warmed_up() -> None:
    contestants, log = logged("ab")
    interleave(contestants, 3, rounds=1)
    assert collections.Counter(log[:8]) == {(n, i): 1 + (i == 0) for n in "ab" for i in range(3)}


def test_rounds_follow_from_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = itertools.count(step=0.05)  # every reading 50 ms after the last: every run takes 50 ms
    monkeypatch.setattr(measure.time, "perf_counter", lambda: next(clock))
    contestants, _ = logged("ab")
    assert len(interleave(contestants, 1, min_time=1.0)) == 20
    assert len(interleave(contestants, 1, min_time=0.01)) == 7
    assert len(interleave(contestants, 1, min_time=1e6)) == 200


def test_the_ratio_is_the_median_of_the_rounds_ratios() -> None:
    drift = np.array([1.0, 2.0, 4.0, 8.0, 16.0])  # the machine slows down; the ratio stays
    times = np.stack([drift, drift * 3], axis=1)
    first, second = rows(["a", "b"], 7, times)
    assert (first.ratio_to_first, second.ratio_to_first) == (1, 3)
    assert (second.model, second.tokens, second.median_ms) == ("b", 7, 12_000)
    assert first.p10_ms < first.median_ms < first.p90_ms


def test_another_clock() -> None:
    ticks = itertools.count()
    times = interleave(logged("ab")[0], 2, rounds=3, clock=lambda: float(next(ticks)))
    assert (times == 1).all() and next(ticks) == 12, "twice for each timed run, and for no other"
