"""What `contrib_weights` makes of one expert's arrays while they are written. Equal recipes give equal results."""

from __future__ import annotations

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True)
class Flip:
    """Bytes with the bits of `mask` flipped."""

    mask: int

    def __call__(self, *arrays: np.ndarray) -> np.ndarray:
        return arrays[0] ^ np.uint8(self.mask)


@dataclasses.dataclass(frozen=True)
class Repeat:
    """Columns `times` each, as many as `shape` has."""

    times: int
    shape: tuple[int, ...]

    def __call__(self, *arrays: np.ndarray) -> np.ndarray:
        [array] = arrays
        columns = self.shape[1] if len(self.shape) > 1 else 1
        return np.repeat(array, self.times, axis=1)[:, :columns].reshape(self.shape)


@dataclasses.dataclass(frozen=True)
class Points:
    """Zero points as bytes, `middle` more than they were, repeated as `Repeat` does."""

    middle: int
    times: int
    shape: tuple[int, ...]

    def __call__(self, *arrays: np.ndarray) -> np.ndarray:
        points = (arrays[0].astype(np.int16) + self.middle).astype(np.uint8)
        return Repeat(self.times, self.shape)(points)


@dataclasses.dataclass(frozen=True)
class Pack:
    """Numbers below 2 ** bits along the last axis, several a byte, the first in the lowest bits; padded with zeros."""

    bits: int

    def __call__(self, *arrays: np.ndarray) -> np.ndarray:
        [numbers] = arrays
        each = 8 // self.bits
        padding = [(0, 0)] * (numbers.ndim - 1) + [(0, -numbers.shape[-1] % each)]
        apart = np.pad(numbers, padding).reshape(*numbers.shape[:-1], -1, each)
        shifted = apart << (np.arange(each, dtype=np.uint8) * self.bits)
        return np.bitwise_or.reduce(shifted.astype(np.uint8), axis=-1)
