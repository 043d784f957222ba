"""Copies of constant weights in large pages: made, right, never of what may change, and gone with their sessions."""

from __future__ import annotations

import gc
import sys
import threading
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from layers import Layer, Made, error, inputs, make

from sparse_onnx import register_kernels
from sparse_onnx.kernels.build import WEIGHTS_ENTRY

_SETTING = Path("/sys/kernel/mm/transparent_hugepage/enabled")

_large_pages = pytest.mark.skipif(
    not (_SETTING.is_file() and "[never]" not in _SETTING.read_text()),
    reason="the system has no large pages that are given on request",
)


def _open(model: onnx.ModelProto, hold: bool) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 2
    register_kernels(options, hold_weights=hold)
    return onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )


def _large_bytes() -> int:
    """Of this process, as far as they were asked for: ranges with the flag `hg`."""
    total, size = 0, 0
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if line.startswith("Rss:"):
            size = int(line.split()[1]) * 1024
        elif line.startswith("VmFlags:") and " hg" in line:
            total += size
    return total


def _large(stored: str | None) -> Made:
    return make(Layer(1024, 1024, stored=stored))


@pytest.mark.parametrize("stored", [None, "int8", "uint4"])
@pytest.mark.parametrize("tokens", [1, 7, 100])
def test_copies_change_nothing(stored: str | None, tokens: int, library: Path) -> None:
    layer = Layer(700, 901 if stored is None else 900, stored=stored)
    made, x = make(layer), inputs(layer, tokens)
    held, shared = (_open(made.model, hold).run(None, {"X": x})[0] for hold in (True, False))
    assert error(made.expected(x), held) < 3e-6
    assert error(held, shared) < 1e-6


@_large_pages
def test_sessions_hold_copies_and_let_them_go(library: Path) -> None:
    made, x = _large(None), inputs(Layer(1024, 1024), 3)
    expected, size = made.expected(x), 1024 * 1024 * 4
    before = _large_bytes()  # numpy asks for large pages, too
    first = _open(made.model, True)
    assert _large_bytes() - before >= size
    second = _open(made.model, True)
    assert _large_bytes() - before >= 2 * size
    del first
    gc.collect()
    result = second.run(None, {"X": x})[0]
    del second
    gc.collect()
    assert _large_bytes() - before < size
    assert error(expected, result) < 3e-6


@_large_pages
def test_nothing_is_copied_where_it_was_not_wanted(library: Path) -> None:
    made = _large(None)
    before = _large_bytes()
    session = _open(made.model, False)
    assert _large_bytes() - before < 1024 * 1024 * 4
    del session


def test_weights_that_a_caller_may_override_are_not_copied(library: Path) -> None:
    """An initializer that is an input, too, is no constant."""
    layer = Layer(512, 256)
    made = make(layer)
    made.model.graph.input.append(onnx.helper.make_tensor_value_info("W", onnx.TensorProto.FLOAT, [512, 256]))
    session = _open(made.model, True)
    x = inputs(layer, 2)
    assert error(made.expected(x), session.run(None, {"X": x})[0]) < 3e-6
    zero = session.run(None, {"X": x, "W": np.zeros((512, 256), np.float32)})[0]
    assert (zero == made.bias).all()


def test_sessions_made_at_the_same_time(library: Path) -> None:
    """Small copies share a range: sixteen sessions of weights of their own, on four threads, run and go again."""
    layers = [Layer(300, 200, seed=seed) for seed in range(16)]
    failures: list[int] = []

    def work(first: int) -> None:
        for at in range(first, 16, 4):
            made = make(layers[at])
            x = inputs(layers[at], 3)
            if error(made.expected(x), _open(made.model, True).run(None, {"X": x})[0]) > 3e-6:
                failures.append(at)

    threads = [threading.Thread(target=work, args=(first,)) for first in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


def test_a_setting_that_there_is_not_is_refused(library: Path) -> None:
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry(WEIGHTS_ENTRY, "held-in-large-pages")
    with pytest.raises(Exception, match="neither held nor shared"):
        options.register_custom_ops_library(str(library))


def test_without_the_setting_weights_are_held(library: Path) -> None:
    """Runtimes that know the library alone (genai, C++) give no setting."""
    made = _large(None)
    options = onnxruntime.SessionOptions()
    options.register_custom_ops_library(str(library))
    before = _large_bytes() if sys.platform == "linux" else 0
    session = onnxruntime.InferenceSession(made.model.SerializeToString(), options)
    if sys.platform == "linux" and "[never]" not in _SETTING.read_text():
        assert _large_bytes() > before
    x = inputs(Layer(1024, 1024), 1)
    assert error(made.expected(x), session.run(None, {"X": x})[0]) < 3e-6
