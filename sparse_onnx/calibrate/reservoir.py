"""Uniform samples of rows of a stream, of a fixed size, in memory or in a temporary file."""

from __future__ import annotations

import os
import tempfile
from typing import IO

import numpy as np

from sparse_onnx.core.errors import OutsideError
from sparse_onnx.graph.scratch import scratch_folder

#: Bytes of all samples together that are kept in memory.
_IN_MEMORY = 256 << 20


class Store:
    """Room for samples: memory, or beyond `_IN_MEMORY` bytes a temporary file without a name.

    Args:
        nbytes: of all arrays that will be asked for.

    Raises:
        OutsideError: no space left.
    """

    def __init__(self, nbytes: int) -> None:
        self._file: IO[bytes] | None = None
        self._used = 0
        if nbytes <= _IN_MEMORY:
            return
        folder = scratch_folder()
        self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 - it lives as long as the arrays in it
        try:  # Linux gives pages to a mapping without asking whether there are any left.
            os.posix_fallocate(self._file.fileno(), 0, nbytes)
        except OSError as error:
            raise OutsideError(
                f"samples need {nbytes} bytes in {folder}: {error.strerror}",
                "set TMPDIR, or take --rows down",
            ) from None

    def array(self, rows: int, width: int) -> np.ndarray:
        """``[rows, width]`` float32."""
        if self._file is None:
            return np.empty((rows, width), np.float32)
        start, self._used = self._used, self._used + rows * width * 4
        return np.memmap(self._file, np.float32, "r+", start, (rows, width))


class Reservoir:
    """Vitter's algorithm R: each row of the stream is in the sample with the same probability.

    Args:
        sample: ``[size, width]``, where the sample goes.
        seed: two samples of one seed take the same places of their streams.
    """

    def __init__(self, sample: np.ndarray, seed: tuple[int, ...]) -> None:
        self._sample = sample
        self._rng = np.random.default_rng(seed)
        self.seen = 0

    def add(self, rows: np.ndarray) -> None:
        """Rows ``[n, width]`` that come next in the stream."""
        size = len(self._sample)
        number = np.arange(self.seen, self.seen + len(rows))
        place = np.where(number < size, number, self._rng.integers(0, number + 1))
        taken = np.nonzero(place < size)[0]
        # Of rows that go to one place the last stays.
        last = dict(zip(place[taken].tolist(), taken.tolist(), strict=True))
        if last:
            self._sample[list(last)] = rows[list(last.values())]
        self.seen += len(rows)

    @property
    def rows(self) -> np.ndarray:
        """``[min(size, seen), width]``."""
        return self._sample[: min(self.seen, len(self._sample))]
