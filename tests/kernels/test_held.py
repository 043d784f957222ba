"""Copies of constant weights in large pages: made, right, never of what may change, and gone with their sessions."""

from __future__ import annotations

import gc
import subprocess
import sys
import textwrap
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


#: Prints, when asked, the bytes of large pages that the process has as far as they were asked for (ranges with the
#: flag `hg`), less what it had at first. In a process of its own: numpy asks for large pages, too, and frees them.
_ALONE = """
import gc, sys
import numpy as np
import onnxruntime

def large():
    gc.collect()
    total, size = 0, 0
    for line in open("/proc/self/smaps"):
        if line.startswith("Rss:"):
            size = int(line.split()[1]) * 1024
        elif line.startswith("VmFlags:") and " hg" in line:
            total += size
    return total

def open_session(weights):
    options = onnxruntime.SessionOptions()
    if weights:
        options.add_session_config_entry(sys.argv[3], weights)
    options.register_custom_ops_library(sys.argv[2])
    return onnxruntime.InferenceSession(sys.argv[1], options, providers=["CPUExecutionProvider"])

def say():
    print(large() - before)

x = np.ones((1, 1024), np.float32)
before = large()
"""


def _alone(model: onnx.ModelProto, library: Path, folder: Path, script: str) -> list[int]:
    """What `say()` printed in a process that does nothing else."""
    onnx.save(model, folder / "m.onnx")
    code = _ALONE + textwrap.dedent(script)
    command = [sys.executable, "-c", code, str(folder / "m.onnx"), str(library), WEIGHTS_ENTRY]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    return [int(line) for line in run.stdout.split()]


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
def test_sessions_hold_copies_and_let_them_go(library: Path, tmp_path: Path) -> None:
    made, size = _large(None), 1024 * 1024 * 4
    sizes = _alone(
        made.model,
        library,
        tmp_path,
        """
        first = open_session("held")
        say()
        second = open_session("held")
        say()
        del first
        second.run(None, {"X": x})
        del second
        say()
        """,
    )
    assert size <= sizes[0] < 2 * size <= sizes[1] and sizes[2] < size


def test_a_session_outlives_another_one(library: Path) -> None:
    made, x = _large(None), inputs(Layer(1024, 1024), 3)
    first, second = (_open(made.model, True) for _ in range(2))
    del first
    gc.collect()
    assert error(made.expected(x), second.run(None, {"X": x})[0]) < 3e-6


@_large_pages
def test_nothing_is_copied_where_it_was_not_wanted(library: Path, tmp_path: Path) -> None:
    script = """
        session = open_session("shared")
        say()
        """
    assert _alone(_large(None).model, library, tmp_path, script)[0] < 1024 * 1024 * 4


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


@_large_pages
def test_without_the_setting_weights_are_held(library: Path, tmp_path: Path) -> None:
    """Runtimes that know the library alone (genai, C++) give no setting."""
    script = """
        session = open_session("")
        say()
        """
    assert _alone(_large(None).model, library, tmp_path, script)[0] >= 1024 * 1024 * 4
