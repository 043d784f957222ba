"""The native kernels and the functions' bodies against the numpy reference."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path

import numpy as np
import onnx
import pytest
from again import concurrently, on_level
from hypothesis import given, settings
from hypothesis import strategies as st
from layers import Layer, error, inputs, make, session

TOLERANCE = {"float32": 3e-6, "float16": 2e-3, "bfloat16": 1.5e-2}
SHAPES = [(64, 96), (65, 33), (300, 1111), (31, 2), (7, 5), (1, 1), (512, 256)]
STORED = [None, "int8", "uint8", "int4", "uint4"]


@pytest.mark.parametrize("stored", STORED)
@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_every_type(dtype: str, stored: str | None, library: Path) -> None:
    blocks = [(1, 32)] if stored is None else [(0, 1), (0, 16), (0, 10_000), (1, 1), (1, 32), (1, 10_000)]
    for (k, n), each, (axis, block) in itertools.product(SHAPES, (False, True), blocks):
        layer = Layer(k, n, dtype, stored, axis, block, each)
        made = make(layer)
        run = session(made.model, native=True)
        for tokens in (1, 3, 4, 9):
            x = inputs(layer, tokens)
            fed = x.astype(np.float32) if dtype == "bfloat16" else x
            assert error(made.expected(x), run.run(None, {"X": fed})[0]) < TOLERANCE[dtype], (layer, tokens)


@pytest.mark.parametrize("stored", STORED)
@pytest.mark.parametrize("axis", [0, 1])
def test_without_the_library_the_body_runs(stored: str | None, axis: int) -> None:
    layer = Layer(96, 64, stored=stored, axis=axis, each=True)
    made = make(layer)
    onnx.checker.check_model(made.model, full_check=True)
    for tokens in (0, 1, 5):
        x = inputs(layer, tokens)
        actual = session(made.model, native=False).run(None, {"X": x})[0]
        assert error(made.expected(x), actual) < 3e-6


@pytest.mark.parametrize("stored", [None, "int4"])
def test_nothing_is_skipped_below_zero_and_everything_above_all(stored: str | None, library: Path) -> None:
    for tau, count in ((-1.0, 96), (1e9, 0)):
        layer = Layer(96, 64, stored=stored)
        made = make(layer)
        constant = next(item for item in made.model.graph.initializer if item.name == "tau")
        constant.CopyFrom(onnx.numpy_helper.from_array(np.array([tau], np.float32), "tau"))
        made = dataclasses.replace(made, tau=np.array([tau], np.float32))
        for tokens in (0, 1, 8):
            x = inputs(layer, tokens)
            actual = session(made.model, native=True).run(None, {"X": x})[0]
            assert error(made.expected(x), actual) < 3e-6
            if not count:
                assert (actual == made.bias).all()


def test_skipped_weights_are_not_read(library: Path) -> None:
    """A NaN in the row of a skipped input does not show where the kernel runs, and would in a dense product."""
    layer = Layer(64, 48, tau=0.5)
    made = make(layer)
    weight = next(item for item in made.model.graph.initializer if item.name == "W")
    poisoned = onnx.numpy_helper.to_array(weight).copy()
    x = inputs(layer, 1)
    skipped = np.abs(x[0] - made.centre) <= made.tau
    assert 0 < skipped.sum() < 64
    poisoned[skipped] = np.nan
    weight.CopyFrom(onnx.numpy_helper.from_array(poisoned, "W"))
    assert np.isfinite(session(made.model, native=True).run(None, {"X": x})[0]).all()
    assert np.isnan(session(made.model, native=False).run(None, {"X": x})[0]).any()


@pytest.mark.parametrize("tokens", [1, 5])
def test_what_is_no_number_is_kept(tokens: int, library: Path) -> None:
    layer = Layer(32, 16)
    made = make(layer)
    x = inputs(layer, tokens)
    x[0, 3] = np.nan
    for native in (False, True):
        actual = session(made.model, native=native).run(None, {"X": x})[0]
        assert np.isnan(actual[0]).all() and np.isfinite(actual[1:]).all()


def test_inputs_of_any_rank(library: Path) -> None:
    layer = Layer(40, 24)
    made = make(layer)
    x = inputs(layer, 6)
    for shape in ((2, 3, 40), (1, 2, 3, 40), (40,)):
        model = onnx.ModelProto.FromString(made.model.SerializeToString())
        for value in (*model.graph.input, *model.graph.output):
            value.type.tensor_type.ClearField("shape")
        some = x[0] if shape == (40,) else x
        actual = session(model, native=True).run(None, {"X": some.reshape(shape)})[0]
        assert error(made.expected(some).reshape(*shape[:-1], 24), actual) < 3e-6


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("tau", (3,), "tau has neither"),
        ("centre", (0,), "centre has neither"),
        ("folded_bias", (5,), "folded_bias has not"),
    ],
)
def test_shapes_that_do_not_fit(name: str, shape: tuple[int, ...], message: str, library: Path) -> None:
    layer = Layer(32, 16)
    model = make(layer).model
    kept = [item for item in model.graph.initializer if item.name != name]
    del model.graph.initializer[:]
    model.graph.initializer.extend([*kept, onnx.numpy_helper.from_array(np.zeros(shape, np.float32), name)])
    with pytest.raises(Exception, match=message):
        session(model, native=True).run(None, {"X": inputs(layer, 1)})


@pytest.mark.parametrize("stored", [None, "int8", "int4"])
@pytest.mark.parametrize("tokens", [1, 2, 70])
def test_realistic_sizes_on_several_threads_again_and_again(
    stored: str | None, tokens: int, library: Path
) -> None:
    layer = Layer(2048, 5504, stored=stored, block=32)
    made = make(layer)
    runs = session(made.model, native=True, threads=4)
    xs = [inputs(layer, tokens, seed) for seed in range(2)]
    expected = [made.expected(x) for x in xs]
    first = [runs.run(None, {"X": x})[0] for x in xs]
    for want, got in zip(expected, first, strict=True):
        assert error(want, got) < 3e-6
    concurrently(runs, [{"X": x} for x in xs], first)


@st.composite
def layers(draw: st.DrawFn) -> Layer:
    return Layer(
        draw(st.integers(1, 400)),
        draw(st.integers(1, 400)),
        "float32",
        draw(st.sampled_from(STORED)),
        draw(st.integers(0, 1)),
        draw(st.integers(1, 400)),
        draw(st.booleans()),
        draw(st.floats(-1, 3)),
        draw(st.integers(0, 1000)),
    )


@settings(max_examples=60, deadline=None)
@given(layer=layers(), tokens=st.integers(1, 20))
def test_any_layer(library: Path, layer: Layer, tokens: int) -> None:
    made, x = make(layer), inputs(layer, tokens, layer.seed)
    actual = session(made.model, native=True).run(None, {"X": x})[0]
    # Of what was added up: the sum itself may be next to nothing, where there are few outputs.
    added = (np.abs(x) + np.abs(made.centre)) @ np.abs(made.weight) + np.abs(made.bias)
    assert np.abs(actual - made.expected(x)).max() < 2e-6 * added.max()


@pytest.mark.slow
@pytest.mark.parametrize("level", ["base", "v3", "v4"])
def test_each_level_of_the_processor(level: str, library: Path) -> None:
    """All of this file again, on what older processors run."""
    on_level(level, __file__)
