"""The speed of memory: how fast this machine reads a given set of weights once.

No graph can run a token faster than it reads the weights that the token needs. This reader is the best of
what numpy offers; put into the same rounds as the models, it says how far they are from that limit.
"""

from __future__ import annotations

import concurrent.futures
import time
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float32]
Read = Callable[[Sequence[Array]], None]

#: Rows of this many floats for matrix-vector products; what does not fill one is left out, which is next to
#: nothing.
_ROW = 1024
_TRIALS = 5


def read_limit(sample: Sequence[Array], threads: int) -> tuple[str, Read]:
    """The fastest way to read arrays once on `threads` threads, and its name.

    Every way is tried on `sample` (C-contiguous float32, at best larger than the caches); the returned
    function reads whatever arrays it is given. BLAS runs on threads of its own: set OPENBLAS_NUM_THREADS
    before numpy is imported.
    """
    ways = _ways(threads)
    return min(ways.items(), key=lambda way: _best_time(way[1], sample))


def _best_time(read: Read, sample: Sequence[Array]) -> float:
    best = float("inf")
    for _ in range(_TRIALS):
        start = time.perf_counter()
        read(sample)
        best = min(best, time.perf_counter() - start)
    return best


def _ways(threads: int) -> dict[str, Read]:
    pool = concurrent.futures.ThreadPoolExecutor(threads)
    reductions: dict[str, Callable[[Array], object]] = {
        "numpy max": np.max,
        "numpy integer max": lambda flat: np.max(flat.view(np.int32)),
        "numpy or": lambda flat: np.bitwise_or.reduce(flat.view(np.int32)),
        "numpy dot": lambda flat: np.dot(flat, flat),
    }
    ways = {name: _split(reduce, pool, threads) for name, reduce in reductions.items()}
    return {**ways, "BLAS gemv": _blas}


def _split(reduce: Callable[[Array], object], pool: concurrent.futures.Executor, threads: int) -> Read:
    """Each thread reduces its part of every array: numpy lets go of the interpreter lock meanwhile."""

    def part(arrays: Sequence[Array], index: int) -> None:
        for array in arrays:
            flat = array.reshape(-1)
            start, stop = (flat.size * number // threads for number in (index, index + 1))
            reduce(flat[start:stop])

    def read(arrays: Sequence[Array]) -> None:
        waiting = [pool.submit(part, arrays, index) for index in range(1, threads)]
        part(arrays, 0)
        for future in waiting:
            future.result()

    return read


def _blas(arrays: Sequence[Array]) -> None:
    vector = np.ones(_ROW, np.float32)
    for array in arrays:
        flat = array.reshape(-1)
        flat[: flat.size - flat.size % _ROW].reshape(-1, _ROW) @ vector
