"""A model run a few nodes at a time gives what it gives whole."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from builders import Shape, layered_model, save_external

from sparse_onnx.export import twin
from sparse_onnx.export.checkpoint import segments
from sparse_onnx.export.checkpoint.segments import Segmented
from sparse_onnx.graph import io
from sparse_onnx.targets import session as sessions
from sparse_onnx.verify.routing import observed, routers


@pytest.mark.parametrize("budget", [1, 8000, 1 << 30], ids=["node by node", "a few nodes", "whole"])
@pytest.mark.parametrize(
    "shape", [Shape(), Shape(experts=5, top_k=3, biases=True, separate=True)], ids=["moe", "gated"]
)
def test_same_answers(budget: int, shape: Shape, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(segments, "SEGMENT_BYTES", budget)
    monkeypatch.setattr(segments, "_SMALL", 0)
    path = save_external(layered_model(shape, layers=3), tmp_path / "model.onnx")
    model = io.load(path)
    watched = observed(model, routers(model))
    session, segmented = sessions.create_session(watched), Segmented(watched)
    assert budget > 1 or len(segmented._segments) > 10
    (name,) = (value.name for value in model.graph.inputs)
    for tokens in (1, 0, 17, 2):
        x = np.random.default_rng(tokens).standard_normal((tokens, shape.hidden)).astype(np.float32)
        expected, actual = session.run(None, {name: x}), segmented({name: x})
        assert len(expected) == len(actual) == len(watched.graph.outputs) > 3
        for ours, theirs in zip(actual, expected, strict=True):
            assert ours.dtype == theirs.dtype and ours.shape == theirs.shape
            np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)


def test_experts_are_read_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a widened model too: only those that a token was sent to, one at a time."""
    monkeypatch.setattr(segments, "SEGMENT_BYTES", 1)
    monkeypatch.setattr(segments, "_SMALL", 0)
    shape = Shape(experts=6, dtype="bfloat16")
    model = io.load(save_external(layered_model(shape, layers=1), tmp_path / "model.onnx"))
    twin.widen(model)
    taken: list[int] = []
    part = twin.Widened.part
    monkeypatch.setattr(twin.Widened, "part", lambda self, at, name: taken.append(at) or part(self, at, name))
    whole: list[str] = []
    read = segments.read_array
    monkeypatch.setattr(
        segments, "read_array", lambda tensor: whole.append(str(tensor.shape)) or read(tensor)
    )
    (name,) = (value.name for value in model.graph.inputs)
    Segmented(model)({name: np.ones((1, shape.hidden), np.float32)})
    assert len(set(taken)) == shape.top_k and len(taken) == 4 * shape.top_k
    assert not any(sizes.startswith(f"[{shape.experts},{shape.inner}") for sizes in whole)


def test_subgraphs_see_values_of_other_segments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The branch of an If reads what was computed, and a weight, far before it; an output is a constant."""
    monkeypatch.setattr(segments, "SEGMENT_BYTES", 1)
    monkeypatch.setattr(segments, "_SMALL", 0)
    model = ir.from_onnx_text(
        """
        <ir_version: 10, opset_import: ["" : 20]>
        graph (float[N, 2] x, bool flag) => (float[N, 2] y, float[2, 2] w)
        <float[2, 2] w = {1, 2, 3, 4}, float[2, 2] v = {0, 1, 1, 0}, float[1] b = {0.5}>
        {
            early = MatMul (x, w)
            late = MatMul (early, v)
            y = If (flag) <
                then_branch = then () => (a) { sum = Add (early, late)  a = MatMul (sum, w) },
                else_branch = other () => (c) { c = Sub (late, b) }
            >
        }
        """
    )
    session = sessions.create_session(model)
    x = np.arange(6, dtype=np.float32).reshape(3, 2)
    for flag in (True, False):
        feeds = {"x": x, "flag": np.asarray(flag)}
        for ours, theirs in zip(Segmented(model)(feeds), session.run(None, feeds), strict=True):
            np.testing.assert_array_equal(ours, theirs)
