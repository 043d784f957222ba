"""The gated layer's native kernel and its function's body against the numpy reference."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import onnx
import pytest
from again import concurrently, on_level
from gated_layers import Gated, fed, make, rows
from hypothesis import given, settings
from hypothesis import strategies as st
from layers import error, session

TOLERANCE = {"float32": 3e-6, "float16": 3e-3, "bfloat16": 2e-2}
SHAPES = [(64, 96, 48), (65, 33, 130), (300, 211, 77), (31, 2, 5), (1, 1, 1), (512, 256, 640)]
STORED = [None, "int8", "uint8", "int4", "uint4"]
BLOCKS = [
    ((1, 32), (0, 32)),
    ((1, 16), (1, 16)),
    ((1, 10_000), (0, 10_000)),
    ((0, 1), (0, 1)),
    ((1, 1), (1, 1)),
]


@pytest.mark.parametrize("stored", STORED)
@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_every_type(dtype: str, stored: str | None, library: Path) -> None:
    for shape, (up, down) in itertools.product(SHAPES, BLOCKS if stored else BLOCKS[:1]):
        layer = Gated(*shape, dtype, stored, up, down)
        made = make(layer)
        run = session(made.model, native=True)
        for tokens in (1, 2, 5, 40, 100, 300):
            gate, x = rows(layer, tokens)
            actual = run.run(None, fed(layer, gate, x))[0]
            assert error(made.expected(gate, x), actual) < TOLERANCE[dtype], (layer, tokens)


@pytest.mark.parametrize("stored", STORED)
def test_without_the_library_the_body_runs(stored: str | None) -> None:
    for up, down in BLOCKS:
        layer = Gated(96, 64, 80, stored=stored, up=up, down=down)
        made = make(layer)
        onnx.checker.check_model(made.model, full_check=True)
        for tokens in (0, 1, 5):
            gate, x = rows(layer, tokens)
            actual = session(made.model, native=False).run(None, fed(layer, gate, x))[0]
            assert error(made.expected(gate, x), actual) < 3e-6


@pytest.mark.parametrize("stored", [None, "int8", "uint4"])
@pytest.mark.parametrize("tokens", [0, 1, 8, 40, 100])
def test_nothing_is_skipped_below_zero_and_everything_above_all(
    stored: str | None, tokens: int, library: Path
) -> None:
    layer = Gated(96, 64, 80, stored=stored)
    gate, x = rows(layer, tokens)
    gate[: len(gate) // 2 + 1, 7] = 0
    dense = make(layer).with_constants(tau=np.array([-1], np.float32))
    units = x.astype(np.float64) @ dense.up.astype(np.float64).T + dense.up_bias
    expected = (gate * units) @ dense.down.astype(np.float64) + dense.bias
    actual = session(dense.model, native=True).run(None, fed(layer, gate, x))[0]
    assert error(expected, actual) < 3e-6
    for bound in (1e9, np.inf):
        nothing = dense.with_constants(tau=np.array([bound], np.float32))
        actual = session(nothing.model, native=True).run(None, fed(layer, gate, x))[0]
        assert (actual == dense.bias).all() and actual.shape == (tokens, 80)


@pytest.mark.parametrize("native", [False, True])
@pytest.mark.parametrize("tokens", [1, 2, 40, 100])
def test_ties_are_skipped(tokens: int, native: bool, library: Path) -> None:
    layer = Gated(32, 48, 24)
    made = make(layer).with_constants(tau=np.array([0.5], np.float32))
    above = np.nextafter(np.float32(0.5), np.float32(1))
    gate = np.resize(np.array([0.5, -0.5, above, -above, -0.0, 0.0], np.float32), (tokens, 48))
    _, x = rows(layer, tokens)
    hidden = np.where(np.abs(gate) > 0.5, gate * (x @ made.up.T + made.up_bias), 0)
    assert (hidden != 0).sum() == tokens * 16
    actual = session(made.model, native=native).run(None, fed(layer, gate, x))[0]
    assert error(hidden.astype(np.float64) @ made.down + made.bias, actual) < 3e-6


@pytest.mark.parametrize("tokens", [1, 2])
def test_skipped_weights_are_not_read(tokens: int, library: Path) -> None:
    """NaN in the rows of units that all tokens skip, of both matrices, does not show."""
    layer = Gated(64, 48, 32)
    made = make(layer)
    gate, x = rows(layer, tokens)
    skipped = (np.abs(gate) <= made.tau).all(axis=0)
    assert 0 < skipped.sum() < 48
    up, down = made.up.copy(), made.down.copy()
    up[skipped], down[skipped] = np.nan, np.nan
    poisoned = made.with_constants(up=up, down=down)
    actual = session(poisoned.model, native=True).run(None, fed(layer, gate, x))[0]
    assert error(made.expected(gate, x), actual) < 3e-6
    assert np.isnan(session(poisoned.model, native=False).run(None, fed(layer, gate, x))[0]).any()


@pytest.mark.parametrize("native", [False, True])
@pytest.mark.parametrize("tokens", [1, 5, 40, 100])
def test_what_is_no_number(tokens: int, native: bool, library: Path) -> None:
    """NaN and infinity of a gate are kept; of a unit whose gate is small they are not seen."""
    layer = Gated(32, 16, 24)
    made = make(layer)
    gate, x = rows(layer, tokens)
    run = session(made.model, native=native)
    for bad in (np.nan, np.inf):
        spoiled = gate.copy()
        spoiled[0, 3] = bad
        actual = run.run(None, fed(layer, spoiled, x))[0]
        assert not np.isfinite(actual[0]).any() and np.isfinite(actual[1:]).all()
    gate[0], x[0, 0] = 0, np.inf
    actual = run.run(None, fed(layer, gate, x))[0]
    assert (actual[0] == made.bias).all() and np.isfinite(actual).all()


def test_inputs_of_any_rank(library: Path) -> None:
    layer = Gated(40, 32, 24)
    made = make(layer)
    gate, x = rows(layer, 6)
    expected = made.expected(gate, x)
    for shape in ((2, 3), (1, 2, 3), ()):
        model = onnx.ModelProto.FromString(made.model.SerializeToString())
        for value in (*model.graph.input, *model.graph.output):
            value.type.tensor_type.ClearField("shape")
        some = slice(0, 6) if shape else 0
        feeds = {"A": gate[some].reshape(*shape, 32), "X": x[some].reshape(*shape, 40)}
        actual = session(model, native=True).run(None, feeds)[0]
        assert error(expected[some].reshape(*shape, 24), actual) < 3e-6


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("tau", (3,), "tau has not"),
        ("up_bias", (5,), "up_bias has not"),
        ("bias", (5,), "bias not N"),
        ("up", (15, 32), "disagree"),
        ("down", (15, 24), "disagree"),
        ("down", (16,), "disagree"),
    ],
)
def test_shapes_that_do_not_fit(name: str, shape: tuple[int, ...], message: str, library: Path) -> None:
    layer = Gated(32, 16, 24)
    made = make(layer)
    model = made.with_constants(**{name: np.zeros(shape, np.float32)}).model
    with pytest.raises(Exception, match=message):
        session(model, native=True).run(None, fed(layer, *rows(layer, 1)))


@pytest.mark.parametrize("stored", [None, "int4"])
@pytest.mark.parametrize("tokens", [1, 2, 70, 130])
def test_several_threads_again_and_again(stored: str | None, tokens: int, library: Path) -> None:
    layer = Gated(1024, 2752, 1024, stored=stored)
    made = make(layer)
    run = session(made.model, native=True, threads=4)
    fedden = [fed(layer, *rows(layer, tokens, seed)) for seed in range(2)]
    first = [run.run(None, feeds)[0] for feeds in fedden]
    for feeds, actual in zip(fedden, first, strict=True):
        assert error(made.expected(feeds["A"], feeds["X"]), actual) < 3e-6
    concurrently(run, fedden, first)


@st.composite
def layers(draw: st.DrawFn) -> Gated:
    up, down = ((draw(st.integers(0, 1)), draw(st.integers(1, 300))) for _ in range(2))
    sizes = (draw(st.integers(1, 300)) for _ in range(3))
    stored, tau = draw(st.sampled_from(STORED)), draw(st.floats(-1, 3))
    return Gated(*sizes, "float32", stored, up, down, tau, draw(st.integers(0, 1000)))


@settings(max_examples=60, deadline=None)
@given(layer=layers(), tokens=st.integers(1, 40) | st.integers(90, 140))
def test_any_layer(library: Path, layer: Gated, tokens: int) -> None:
    made, (gate, x) = make(layer), rows(layer, tokens, layer.seed)
    actual = session(made.model, native=True).run(None, fed(layer, gate, x))[0]
    assert error(made.expected(gate, x), actual) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("level", ["base", "v3", "v4"])
def test_each_level_of_the_processor(level: str, library: Path) -> None:
    """All of this file again, on what older processors run."""
    on_level(level, __file__)
