from __future__ import annotations

import concurrent.futures
import threading

import numpy as np
import pytest

from sparse_onnx.bench import limits


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_the_threads_together_read_everything_once(threads: int) -> None:
    """A reader that left elements out would be the fastest, and wrong."""
    seen: list[np.ndarray] = []
    workers = set()

    def reduce(flat: np.ndarray) -> None:
        seen.append(flat.copy())
        workers.add(threading.get_ident())

    arrays = [np.arange(12, dtype=np.float32).reshape(3, 4), np.arange(12, 19, dtype=np.float32)]
    with concurrent.futures.ThreadPoolExecutor(threads) as pool:
        limits._split(reduce, pool, threads)(arrays)
    assert sorted(np.concatenate(seen)) == list(range(19))
    assert len(seen) == 2 * threads


@pytest.mark.parametrize("threads", [1, 2])
def test_every_way_takes_any_array(threads: int) -> None:
    arrays = [np.ones((3, 1024), np.float32), np.ones(100, np.float32), np.ones((2, 5, 7), np.float32)]
    for read in limits._ways(threads).values():
        read(arrays)


def test_the_fastest_way_is_named_and_reads() -> None:
    sample = [np.ones((8, 1024), np.float32)]
    name, read = limits.read_limit(sample, 2)
    assert name in limits._ways(2)
    read(sample)
