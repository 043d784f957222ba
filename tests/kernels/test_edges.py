"""What lies exactly on the threshold, is no number, or is nothing."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import onnx
import pytest
from layers import Layer, Made, error, inputs, make, session


def _with(made: Made, **arrays: np.ndarray) -> Made:
    """Other constants in place of the model's, as their names in it say."""
    model = onnx.ModelProto.FromString(made.model.SerializeToString())
    for item in model.graph.initializer:
        if item.name in arrays:
            item.CopyFrom(onnx.numpy_helper.from_array(arrays[item.name], item.name))
    return dataclasses.replace(
        made, model=model, **{k: v for k, v in arrays.items() if k in ("tau", "centre")}
    )


@pytest.mark.parametrize("native", [False, True])
@pytest.mark.parametrize("tokens", [1, 2, 40])
def test_ties_are_skipped_and_minus_zero_is_nothing(tokens: int, native: bool, library: Path) -> None:
    layer = Layer(48, 32)
    tau, centre = np.array([0.5], np.float32), np.zeros(1, np.float32)
    made = _with(make(layer), tau=tau, centre=centre)
    above = np.nextafter(np.float32(0.5), np.float32(1))
    some = np.array([0.5, -0.5, above, -above, -0.0, 0.0], np.float32)
    x = np.resize(some, (tokens, 48))
    actual = session(made.model, native=native).run(None, {"X": x})[0]
    kept = np.where(np.abs(x) > 0.5, x, 0)
    assert (kept != 0).sum() == tokens * 16
    assert error(kept.astype(np.float64) @ made.weight + made.bias, actual) < 3e-6


@pytest.mark.parametrize("stored", [None, "int8", "int4"])
@pytest.mark.parametrize("tokens", [1, 3, 40])
def test_infinite_inputs_and_thresholds(stored: str | None, tokens: int, library: Path) -> None:
    layer = Layer(64, 160, stored=stored)
    made = make(layer)
    x = inputs(layer, tokens)
    x[0, 5] = np.inf
    actual = session(made.model, native=True).run(None, {"X": x})[0]
    assert not np.isfinite(actual[0]).any() and np.isfinite(actual[1:]).all()
    everything = _with(made, tau=np.array([np.inf], np.float32))
    actual = session(everything.model, native=True).run(None, {"X": x})[0]
    assert (actual == made.bias).all()


@pytest.mark.parametrize("stored", [None, "uint8", "uint4"])
@pytest.mark.parametrize("tokens", [1, 2, 33, 260])
def test_columns_beyond_whole_chunks(stored: str | None, tokens: int, library: Path) -> None:
    """Sizes one off those that the kernels work in: chunks of 128, strips of 512, parts of 64, batches of 258."""
    for k, n in ((64, 128), (65, 129), (127, 514), (130, 1026), (63, 126)):
        for axis, block in ((0, 1), (1, 1), (1, 16), (0, 10_000)):
            layer = Layer(k, n, stored=stored, axis=axis, block=block, each=True)
            made, x = make(layer), inputs(layer, tokens)
            actual = session(made.model, native=True).run(None, {"X": x})[0]
            assert error(made.expected(x), actual) < 5e-6, layer
            if stored is None:
                break


@pytest.mark.parametrize("stored", ["int8", "uint4", None])
@pytest.mark.parametrize("tokens", [1, 3])
def test_one_output(stored: str | None, tokens: int, library: Path) -> None:
    for axis, block in ((0, 1), (0, 16), (0, 10_000), (1, 1)):
        layer = Layer(64, 1, stored=stored, axis=axis, block=block)
        made, x = make(layer), inputs(layer, tokens)
        actual = session(made.model, native=True).run(None, {"X": x})[0]
        assert error(made.expected(x), actual) < 1e-5


@pytest.mark.parametrize("stored", ["int8", "uint8"])
@pytest.mark.parametrize("block", [16, 64, 10_000])
def test_inputs_of_very_different_sizes(stored: str, block: int, library: Path) -> None:
    """Products of bytes have one factor for many inputs, which the largest of them decides."""
    layer = Layer(256, 200, stored=stored, axis=0, block=block)
    made = _with(make(layer), tau=np.array([-1], np.float32), centre=np.zeros(1, np.float32))
    run = session(made.model, native=True)
    x = inputs(layer, 1)
    for factor in (1e-38, 1e-30, 1e-20, 1e-3, 1e3, 1e20, 1e29):
        sizes = x * np.float32(factor)
        expected = (made.expected(sizes) - made.bias).astype(np.float64)
        actual = run.run(None, {"X": sizes})[0]
        added = np.abs(sizes).astype(np.float64) @ np.abs(made.weight) + np.abs(made.bias)
        assert np.isfinite(actual).all()
        assert np.abs(actual - made.bias - expected).max() < 1e-6 * added.max(), factor
    mixed = x.copy()
    mixed[0, ::50] *= np.float32(1e4)
    mixed[0, 3] = np.float32(1e-42)
    mixed[0, 64:128] = 0
    added = np.abs(mixed).astype(np.float64) @ np.abs(made.weight)
    assert np.abs(run.run(None, {"X": mixed})[0] - made.expected(mixed)).max() < 1e-6 * added.max()
    only = np.zeros_like(x)
    only[0, 17] = 3
    assert error(made.expected(only), run.run(None, {"X": only})[0]) < 1e-6
