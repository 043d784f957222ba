"""Interleaved timing. Absolute times drift with the machine; ratios of runs next to each other do not."""

from __future__ import annotations

import dataclasses
import gc
import math
import time
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from sparse_onnx.core.report import BenchRow

#: Session entries: one session's threads must not spin while another contestant is timed.
NO_SPINNING = {"session.force_spinning_stop": "1"}
#: Bounds of the rounds a token count, where they follow from the time.
_FEWEST, _MOST = 7, 200
#: Seconds of a run below which waking a thread pool shows: the scheduler may take several milliseconds.
_SHORT = 0.02


@dataclasses.dataclass(frozen=True)
class Contestant:
    """Something to time. `run(i)` computes input number i; `settle_s` is waited, untimed, behind each run.

    A thread pool that spins while it waits for work takes time from whoever runs next: `settle_s` lets it
    sleep. `prepare` is called, untimed, before each run.
    """

    name: str
    run: Callable[[int], object]
    settle_s: float = 0.0
    prepare: Callable[[], object] | None = None


def interleave(
    contestants: Sequence[Contestant],
    inputs: int,
    *,
    rounds: int | None = None,
    min_time: float = 1.0,
    fewest: int = _FEWEST,
    clock: Callable[[], float] | None = None,
) -> npt.NDArray[np.float64]:
    """Times every contestant once a round, all on the same input, in an order that changes between rounds.

    The order rotates, and turns round every other round, so that nobody always follows the same predecessor;
    both move on by one when the inputs begin anew, so that no input is tied to one order. Where all runs are short,
    each directly follows an untimed one on another input: threads are awake, as they are within a model.

    Args:
        contestants: at least one.
        inputs: how many inputs there are; round r runs input r modulo this.
        rounds: how many; None takes as many as `min_time` seconds a contestant allow, `fewest` to 200.
        min_time: see `rounds`.
        fewest: see `rounds`.
        clock: in seconds; None: `time.perf_counter`. `time.thread_time` leaves out what the machine does besides, where
            a run is the work of the calling thread alone.

    Returns:
        Seconds ``[rounds, contestants]``.
    """
    warm = np.array([_warm_up(contestant, inputs) for contestant in contestants])
    if rounds is None:
        rounds = min(_MOST, max(fewest, math.ceil(min_time * len(contestants) / max(warm.sum(), 1e-9))))
    times = np.empty((rounds, len(contestants)))
    lead_in = inputs // 2 if warm.max() < _SHORT else 0
    collecting = gc.isenabled()
    gc.disable()
    try:
        for number in range(rounds):
            for index in _order(len(contestants), number % inputs + number // inputs):
                before = (number + lead_in) % inputs
                times[number, index] = _time(contestants[index], number % inputs, before, clock)
    finally:
        if collecting:
            gc.enable()
    return times


def _order(count: int, step: int) -> list[int]:
    """One of the `2 count` orders: each rotation forwards, then backwards."""
    rotated = [(index + step // 2) % count for index in range(count)]
    return rotated if step % 2 == 0 else rotated[::-1]


def _warm_up(contestant: Contestant, inputs: int) -> float:
    """Runs every input once, and one twice; the fastest time in seconds."""
    return min(_time(contestant, index % inputs) for index in range(inputs + 1))


def _time(
    contestant: Contestant,
    index: int,
    before: int | None = None,
    clock: Callable[[], float] | None = None,
) -> float:
    """Seconds of input `index`; `before`, if another one, runs untimed directly before it."""
    if contestant.prepare is not None:
        contestant.prepare()
    if before is not None and before != index:
        contestant.run(before)
    clock = clock or time.perf_counter
    start = clock()
    contestant.run(index)
    elapsed = clock() - start
    if contestant.settle_s:
        time.sleep(contestant.settle_s)
    return elapsed


def rows(names: Sequence[str], tokens: int, times: npt.NDArray[np.float64]) -> list[BenchRow]:
    """Figures of one token count; the ratio is the median of the rounds' ratios to the first contestant."""
    low, median, high = np.percentile(times * 1e3, [10, 50, 90], axis=0)
    ratios = np.median(times / times[:, :1], axis=0)
    return [
        BenchRow(
            name, tokens, float(median[index]), float(low[index]), float(high[index]), float(ratios[index])
        )
        for index, name in enumerate(names)
    ]
