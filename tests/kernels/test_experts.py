"""Layers of all experts: the native kernel and the functions' bodies against the numpy reference."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from again import concurrently, on_level
from expert_layers import Experts, fed, make, rows
from hypothesis import given, settings
from hypothesis import strategies as st
from layers import error, session

TOLERANCE = {"float32": 3e-6, "float16": 2e-3, "bfloat16": 1.5e-2}
STORED = [None, "int8", "uint8", "int4", "uint4"]


@pytest.mark.parametrize("stored", STORED)
@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_every_type(dtype: str, stored: str | None, library: Path) -> None:
    blocks = [(2, 32)] if stored is None else [(1, 1), (1, 16), (1, 10_000), (2, 1), (2, 32), (2, 10_000)]
    for experts, k, n in ((5, 64, 96), (3, 66, 33), (2, 300, 1111), (7, 2, 5), (1, 1, 1)):
        for axis, block in blocks:
            layer = Experts(experts, k, n, dtype, stored, axis, block, each=block == 32)
            made = make(layer)
            run = session(made.model, native=True)
            for count in (1, 2, 9, 40):
                x, index = rows(layer, count)
                actual = run.run(None, fed(layer, x, index))[0]
                assert error(made.expected(x, index), actual) < TOLERANCE[dtype], (layer, count)


@pytest.mark.parametrize("level", [0, 99])
@pytest.mark.parametrize("stored", STORED)
@pytest.mark.parametrize("axis", [1, 2])
def test_without_the_library_the_body_runs(stored: str | None, axis: int, level: int) -> None:
    layer = Experts(5, 96, 64, stored=stored, axis=axis, each=True)
    made = make(layer)
    onnx.checker.check_model(made.model, full_check=True)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel(level)
    run = onnxruntime.InferenceSession(made.model.SerializeToString(), options)
    for count in (0, 1, 5, 30):
        x, index = rows(layer, count)
        actual = run.run(None, fed(layer, x, index))[0]
        assert error(made.expected(x, index), actual) < 3e-6


@pytest.mark.parametrize("stored", STORED)
def test_the_body_in_float16(stored: str | None) -> None:
    layer = Experts(3, 64, 32, "float16", stored)
    made = make(layer)
    x, index = rows(layer, 9)
    actual = session(made.model, native=False).run(None, fed(layer, x, index))[0]
    assert error(made.expected(x, index), actual) < 5e-3


@pytest.mark.parametrize("stored", [None, "int4"])
def test_nothing_is_skipped_below_zero_and_everything_above_all(stored: str | None, library: Path) -> None:
    layer = Experts(4, 96, 64, stored=stored)
    for tau in (-1.0, 1e9):
        made = make(layer).with_constants(tau=np.array([tau], np.float32))
        for count in (0, 1, 8):
            x, index = rows(layer, count)
            actual = session(made.model, native=True).run(None, fed(layer, x, index))[0]
            assert actual.shape == (count, 64) and error(made.expected(x, index), actual) < 3e-6
            if tau > 0:
                assert (actual == made.bias[index]).all()


@pytest.mark.parametrize("native", [False, True])
@pytest.mark.parametrize("count", [1, 7, 40])
def test_ties_are_skipped_and_minus_zero_is_nothing(count: int, native: bool, library: Path) -> None:
    layer = Experts(3, 48, 32)
    made = make(layer).with_constants(tau=np.array([0.5], np.float32), centre=np.zeros(1, np.float32))
    above = np.nextafter(np.float32(0.5), np.float32(1))
    x = np.resize(np.array([0.5, -0.5, above, -above, -0.0, 0.0], np.float32), (count, 48))
    index = np.arange(count) % 3
    actual = session(made.model, native=native).run(None, fed(layer, x, index))[0]
    kept = np.where(np.abs(x) > 0.5, x, 0).astype(np.float64)
    expected = np.einsum("sk,skn->sn", kept, made.weight[index].astype(np.float64)) + made.bias[index]
    assert error(expected, actual) < 3e-6


def test_neither_skipped_weights_nor_other_experts_are_read(library: Path) -> None:
    """A NaN there does not show where the kernel runs, and would in a dense product."""
    layer = Experts(6, 64, 48, tau=0.5)
    made = make(layer)
    x, _ = rows(layer, 2)
    index = np.array([4, 1])
    poisoned = np.full_like(made.weight, np.nan)
    for row, expert in zip(x, index, strict=True):
        kept = np.abs(row - made.centre) > made.tau
        assert 0 < kept.sum() < 64
        poisoned[expert][kept] = made.weight[expert][kept]
    bias = np.full_like(made.bias, np.nan)
    bias[index] = made.bias[index]
    changed = made.with_constants(W=poisoned, folded_bias=bias)
    actual = session(changed.model, native=True).run(None, fed(layer, x, index))[0]
    assert error(made.expected(x, index), actual) < 3e-6
    assert np.isnan(session(changed.model, native=False).run(None, fed(layer, x, index))[0]).any()


@pytest.mark.parametrize("native", [False, True])
def test_what_is_no_number_stays_in_its_row(native: bool, library: Path) -> None:
    layer = Experts(3, 32, 16)
    made = make(layer)
    x, _ = rows(layer, 6)
    index = np.array([0, 0, 1, 1, 1, 2])
    x[2, 3], x[5, 7] = np.nan, np.inf
    actual = session(made.model, native=native).run(None, fed(layer, x, index))[0]
    finite = np.isfinite(actual)
    assert not finite[[2, 5]].any() and finite[[0, 1, 3, 4]].all()


@pytest.mark.parametrize("stored", [None, "int8"])
@pytest.mark.parametrize("expert", [-1, -4, 4, 2**40, -(2**63)])
@pytest.mark.parametrize("native", [False, True])
def test_an_index_out_of_range_is_refused(
    native: bool, stored: str | None, expert: int, library: Path
) -> None:
    layer = Experts(4, 32, 16, stored=stored)
    run = session(make(layer).model, native=native)
    x, index = rows(layer, 5)
    index[3] = expert
    message = f"index {expert} of row 3 is not from 0 to 3" if native else "out of data bounds"
    with pytest.raises(Exception, match=message):
        run.run(None, fed(layer, x, index))
    index[3] = 3
    run.run(None, fed(layer, x, index))


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("tau", (3,), "tau has neither"),
        ("centre", (0,), "centre has neither"),
        ("folded_bias", (16,), "folded_bias is not"),
        ("folded_bias", (5, 16), "folded_bias is not"),
        ("W", (4, 31, 16), "disagree"),
        ("W", (32, 16), "disagree"),
        ("index", (2,), "disagree"),
    ],
)
def test_shapes_that_do_not_fit(name: str, shape: tuple[int, ...], message: str, library: Path) -> None:
    layer = Experts(4, 32, 16)
    model = make(layer).model
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.ClearField("shape")
    feeds = fed(layer, *rows(layer, 3))
    if name == "index":
        feeds["index"] = np.zeros(shape, np.int64)
    else:
        kept = [item for item in model.graph.initializer if item.name != name]
        del model.graph.initializer[:]
        wrong = onnx.numpy_helper.from_array(np.zeros(shape, np.float32), name)
        model.graph.initializer.extend([*kept, wrong])
    with pytest.raises(Exception, match=message):
        session(model, native=True).run(None, feeds)


@pytest.mark.parametrize("stored", [None, "int4", "int8"])
@pytest.mark.parametrize("kind", ["one row", "a token", "several", "many", "one expert", "skewed"])
def test_routings_on_several_threads_again_and_again(stored: str | None, kind: str, library: Path) -> None:
    """Whichever threads there are and whoever runs beside it, the answers are the same to the bit."""
    layer = Experts(12, 256, 512, stored=stored)
    made = make(layer)
    rng = np.random.default_rng(0)
    index = {
        "one row": np.array([7]),
        "a token": np.array([3, 11, 0, 5, 8, 1, 9, 2]),
        "several": rng.integers(0, 12, 24),
        "many": rng.integers(0, 12, 300),
        "one expert": np.full(40, 4),
        "skewed": np.where(np.arange(150) % 4, 6, rng.integers(0, 12, 150)),
    }[kind]
    xs = [rows(layer, len(index), seed)[0] for seed in range(2)]
    alone, run = (session(made.model, native=True, threads=threads) for threads in (1, 4))
    first = [run.run(None, fed(layer, x, index))[0] for x in xs]
    for x, got in zip(xs, first, strict=True):
        assert error(made.expected(x, index), got) < 3e-6
        assert np.array_equal(alone.run(None, fed(layer, x, index))[0], got)
    concurrently(run, [fed(layer, x, index) for x in xs], first)


@st.composite
def layers(draw: st.DrawFn) -> Experts:
    return Experts(
        draw(st.integers(1, 20)),
        2 * draw(st.integers(1, 100)),
        draw(st.integers(1, 200)),
        "float32",
        draw(st.sampled_from(STORED)),
        draw(st.integers(1, 2)),
        draw(st.integers(1, 200)),
        draw(st.booleans()),
        draw(st.floats(-1, 3)),
        draw(st.integers(0, 1000)),
    )


@settings(max_examples=40, deadline=None)
@given(layer=layers(), count=st.integers(1, 80))
def test_any_layer(library: Path, layer: Experts, count: int) -> None:
    made, (x, index) = make(layer), rows(layer, count, layer.seed)
    actual = session(made.model, native=True).run(None, fed(layer, x, index))[0]
    added = np.abs(x) + np.abs(made.centre)
    most = np.einsum("sk,skn->sn", added, np.abs(made.weight[index])) + np.abs(made.bias[index])
    assert np.abs(actual - made.expected(x, index)).max() < 2e-6 * most.max()


def test_an_odd_number_of_nibbles_an_expert_is_refused(library: Path) -> None:
    layer = Experts(2, 5, 7, stored="int4", block=1)
    with pytest.raises(Exception, match="do not begin on whole bytes"):
        session(make(layer).model, native=True).run(None, fed(layer, *rows(layer, 1)))


@pytest.mark.slow
@pytest.mark.parametrize("level", ["base", "v3", "v4"])
def test_each_level_of_the_processor(level: str, library: Path) -> None:
    """All of this file again, on what older processors run."""
    on_level(level, __file__)
