"""Collectors: what is kept of each run, for each site and each block, in bounded memory."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from sparse_onnx.blocks import MoEBlock
from sparse_onnx.calibrate.interface import Run
from sparse_onnx.calibrate.reservoir import Reservoir, Store
from sparse_onnx.calibrate.routing import Routing
from sparse_onnx.core.errors import ModelError
from sparse_onnx.graph.text import quoted


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Rows that are sampled of each site: for statistics, and of the held-out runs for errors."""

    rows: int
    held_out: int

    @property
    def both(self) -> int:
        return self.rows + self.held_out


class Stream:
    """Rows ``[n, width]`` of a value: two samples, and sums over all of them.

    Args:
        width: K and what is carried along behind it.
        counted: K: only so many columns are counted.
        sizes: of the samples.
        store: where they lie.
        seed: of the samples.
    """

    def __init__(self, width: int, counted: int, sizes: Sizes, store: Store, seed: tuple[int, ...]) -> None:
        self._counted = counted
        self._samples = [
            Reservoir(store.array(size, width), (*seed, at))
            for at, size in enumerate((sizes.rows, sizes.held_out))
        ]
        self.tokens = self.zeros = 0
        self.sum = 0.0

    def add(self, rows: np.ndarray, held_out: np.ndarray, times: np.ndarray | None = None) -> None:
        """More rows, which of them are held out, and how often each is read (None: once)."""
        numbers = rows[:, : self._counted]
        once = np.ones(len(rows)) if times is None else times.astype(np.float64)
        self.tokens += int(once.sum())
        self.zeros += int(((numbers == 0).sum(axis=1) * once).sum())
        self.sum += float((numbers.sum(axis=1, dtype=np.float64) * once).sum())
        self._samples[0].add(rows[~held_out])
        self._samples[1].add(rows[held_out])

    @property
    def rows(self) -> np.ndarray:
        return self._samples[0].rows

    @property
    def held_out(self) -> np.ndarray:
        return self._samples[1].rows


class SiteCollector:
    """What linear layers read.

    Attributes:
        names: of the values that it needs of a run.
        width: numbers that it keeps of a row.
        stream: what it saw.
    """

    def __init__(self, name: str, value: str, rows: int) -> None:
        self.name, self.names, self.width = name, (value,), rows

    def open(self, sizes: Sizes, store: Store, seed: tuple[int, ...]) -> None:
        self.stream = Stream(self.width, self.width, sizes, store, seed)

    def add(self, run: Run, values: Mapping[str, np.ndarray], held_out: float) -> None:
        rows = flat_rows(values[self.names[0]], run, self.name)
        self.stream.add(rows, tail(len(rows), held_out))


class BlockCollector:
    """Where a block's tokens go; and, of a block whose experts are known, what they read.

    The sample holds tokens ``[D]`` with their experts ``[K]``; `dropped` slots have the index E.
    """

    def __init__(self, name: str, names: Sequence[str], experts: int, block: MoEBlock | None) -> None:
        self.name, self.names, self.block, self.experts = name, tuple(names), block, experts
        slots = 0 if block is None else block.top_k or 0
        self.width = (block.hidden or 0) + slots if block is not None and slots else 0
        self.stream: Stream | None = None

    def open(self, sizes: Sizes, store: Store, seed: tuple[int, ...]) -> None:
        self.routing = Routing(self.name, self.experts, seed)
        if self.width and self.block is not None and self.block.hidden is not None:
            self.stream = Stream(self.width, self.block.hidden, sizes, store, seed)

    def add(self, run: Run, values: Mapping[str, np.ndarray], held_out: float) -> None:
        index = flat_rows(values[self.names[0]], run, self.name, integers=True)
        weight = flat_rows(values[self.names[1]], run, self.name)
        if index.size and not (index.min() >= 0 and index.max() <= self.experts):
            raise ModelError(
                f"its router chose an expert outside [0, {self.experts}]", where=f"block '{self.name}'"
            )
        self.routing.add(index, weight)
        if self.stream is not None:
            tokens = flat_rows(values[self.names[2]], run, self.name)
            kept = (index < self.experts).sum(axis=1)
            rows = np.concatenate([tokens, index.astype(np.float32)], axis=1)
            self.stream.add(rows, tail(len(rows), held_out), kept)

    def pairs(self, held_out: bool, most: int, seed: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
        """Sampled tokens ``[n, D]`` and the expert of each ``[n]``: a token comes once for each of its slots, at most
        `most` of these."""
        assert self.stream is not None and self.block is not None and self.block.hidden is not None
        rows = self.stream.held_out if held_out else self.stream.rows
        index = np.asarray(rows[:, self.block.hidden :]).astype(np.int64)
        token, slot = np.nonzero(index < self.experts)
        if len(token) > most:
            chosen = np.sort(np.random.default_rng(seed).choice(len(token), most, replace=False))
            token, slot = token[chosen], slot[chosen]
        return np.asarray(rows[token, : self.block.hidden]), index[token, slot]


def flat_rows(array: np.ndarray, run: Run, name: str, integers: bool = False) -> np.ndarray:
    """``[..., K]`` as rows ``[n, K]`` of the positions that count.

    Raises:
        ModelError: NaN or infinity.
    """
    rows = array.reshape(-1, array.shape[-1]) if array.ndim else array.reshape(1, 1)
    mask = run.mask
    if mask is not None and (array.shape[:-1] == mask.shape or len(rows) == mask.size):
        rows = rows[mask.ravel()]
    if integers:
        return rows
    rows = rows.astype(np.float32, copy=False)
    if not np.isfinite(rows).all():
        raise ModelError(
            "the model computes NaN or infinity on these data",
            "statistics of such values mean nothing; does the model run in float32?",
            where=quoted(name),
        )
    return rows


def tail(count: int, share: float) -> np.ndarray:
    """A mask of the last rows: 0 for none, 1 for all, at least one of several otherwise."""
    held = np.zeros(count, np.bool_)
    last = count if share == 1 else 0 if share == 0 else max(1, round(count * share)) if count > 1 else 0
    held[count - last :] = True
    return held
