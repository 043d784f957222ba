"""Inputs that are no numbers, infinite or enormous give what the functions' bodies give, at the same places.

Zero points that are taken off after the sums would make infinity less infinity of them, which is no number.
"""

from __future__ import annotations

from pathlib import Path

import gated_layers
import numpy as np
import pytest
from again import on_level
from gated_layers import Gated
from layers import Layer, inputs, make, session

STORED = [None, "int8", "uint8", "int4", "uint4"]
BLOCKS = [(0, 1), (0, 16), (0, 10_000), (1, 1), (1, 8), (1, 32), (1, 10_000)]
BAD = [np.inf, -np.inf, np.nan, 1e36, -3e36]


def same(body: np.ndarray, kernel: np.ndarray) -> bool:
    """NaN and each infinity at the same places, and the same numbers but for rounding."""
    finite = np.isfinite(body)
    if not (
        np.array_equal(np.isfinite(kernel), finite) and np.array_equal(kernel[~finite], body[~finite], True)
    ):
        return False
    size = np.where(finite, np.abs(body), 0).max(axis=-1, keepdims=True)
    with np.errstate(invalid="ignore"):
        return bool((np.abs(kernel / size - body / size)[finite] < 1e-5).all())


@pytest.mark.parametrize("stored", STORED)
@pytest.mark.parametrize("tokens", [1, 3, 40])
def test_layers(stored: str | None, tokens: int, library: Path) -> None:
    for axis, block in BLOCKS if stored else BLOCKS[:1]:
        layer = Layer(64, 160, stored=stored, axis=axis, block=block)
        model = make(layer).model
        body, kernel = (session(model, native=native) for native in (False, True))
        for bad in BAD:
            x = inputs(layer, tokens)
            x[0, 5] = bad
            expected, actual = (run.run(None, {"X": x})[0] for run in (body, kernel))
            assert same(expected, actual), (layer, bad)


@pytest.mark.parametrize("stored", STORED)
@pytest.mark.parametrize("tokens", [1, 3, 100])
def test_gated_layers(stored: str | None, tokens: int, library: Path) -> None:
    for axis, block in BLOCKS if stored else BLOCKS[:1]:
        layer = Gated(200, 64, 48, stored=stored, up=(axis, block), down=(axis, block))
        model = gated_layers.make(layer).model
        body, kernel = (session(model, native=native) for native in (False, True))
        for bad in BAD:
            for where in ("A", "X"):
                feeds = dict(zip("AX", gated_layers.rows(layer, tokens), strict=True))
                feeds[where][0, 5] = bad
                expected, actual = (run.run(None, feeds)[0] for run in (body, kernel))
                assert same(expected, actual), (layer, bad, where)


@pytest.mark.slow
@pytest.mark.parametrize("level", ["base", "v3", "v4"])
def test_each_level_of_the_processor(level: str, library: Path) -> None:
    on_level(level, __file__)
