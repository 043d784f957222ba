"""What is proved to treat rows one by one, what is refused, and that proofs hold when they are run."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from harness import run_model
from hypothesis import given, settings
from hypothesis import strategies as st
from row_bodies import MIXING, PROVED, REFUSED, SHAPES, STEPS, function

from sparse_onnx.graph.build import Emitter, Namespace
from sparse_onnx.matching.body_rows import RUNS_ON_NO_ROWS, emit_body, runs_on_no_rows
from sparse_onnx.matching.rowwise import Counterexample, Proof, Typed, prove

FLOAT = ir.DataType.FLOAT


def proof(
    text: str, row: tuple[int | None, ...] = (8,), weights: str = "", lead: int = 1, opset: int = 20
) -> Proof | Counterexample:
    types = [Typed(FLOAT, SHAPES[name]) for name in weights.split()]
    return prove(function(text, weights, opset), Typed(FLOAT, (*[None] * lead, *row)), types, lead=lead)


@pytest.mark.parametrize("name", PROVED)
def test_proved(name: str) -> None:
    """And so it is: any selection of rows gives the same rows of the result."""
    case = PROVED[name]
    found = proof(case.text, case.row, case.weights)
    assert isinstance(found, Proof), found
    rng = np.random.default_rng(0)
    x = rng.standard_normal((5, *(6 if size is None else size for size in case.row))).astype(np.float32)
    graph = found.graph
    model = ir.Model(graph, ir_version=10)
    for value, size in zip(graph.inputs[1:], case.weights.split(), strict=True):
        assert value.shape == ir.Shape(SHAPES[size])
    feeds = {
        value.name: rng.uniform(0.5, 1, value.shape.numpy()).astype(np.float32) for value in graph.inputs[1:]
    }
    whole = run_model(model, {"x": x, **feeds})[0]
    for chosen in ([3], [4, 0, 0], [0, 1, 2, 3, 4, 2, 1]):
        part = run_model(model, {"x": x[chosen], **feeds})[0]
        np.testing.assert_allclose(part, whole[chosen], rtol=1e-5, atol=1e-6)
    told = [size if isinstance(size, int) else None for size in found.outputs[0].dims[1:]]
    assert [size for size, real in zip(told, whole.shape[1:], strict=True) if size not in (None, real)] == []
    if runs_on_no_rows(found):
        again = model.clone().graph
        del again.outputs[:]
        again.remove(list(again)[::-1])
        emit = Emitter(again, Namespace(ir.Model(again, ir_version=10)), "again")
        again.outputs.extend(emit_body(emit, found, list(again.inputs)))
        again.extend(emit.nodes)
        assert len(run_model(ir.Model(again, ir_version=10), {"x": x[:0], **feeds})[0]) == 0


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str) -> None:
    case = REFUSED[name]
    found = proof(case.text, case.row, case.weights)
    assert isinstance(found, Counterexample) and case.reason in found.reason


def test_two_axes_of_rows() -> None:
    assert isinstance(proof("y = MatMul (x, w)", (8,), "w", lead=2), Proof)
    back = "n = Shape <start = 0, end = 2> (x) t = Concat <axis = 0> (n, {6}) y = Reshape (h, t)"
    flat = "r = Reshape (x, {-1, 8}) h = MatMul (r, w) "
    assert isinstance(proof(flat + back, (8,), "w", lead=2), Proof)
    count = (
        "q = Shape (x) i = Constant <value_int = 0> () j = Constant <value_int = 1> () "
        "B = Gather (q, i) S = Gather (q, j) T = Mul (B, S) u = Unsqueeze (T, {0}) f = Concat <axis = 0> (u, {8}) "
    )
    assert isinstance(proof(count + "r = Reshape (x, f) h = MatMul (r, w) " + back, (8,), "w", lead=2), Proof)

    for text, reason in (
        ("a = ReduceMean (x, {1}) y = Sub (x, a)", "reduces over the rows"),
        ("y = Softmax <axis = 1> (x)", "along the axis of the rows"),
        ("y = MatMul (m, x)", "moves them"),
        ("y = Transpose <perm = [1, 0, 2]> (x)", "moves the axis of the rows"),
        ("y = Add (x, each)", "an entry for each row"),
        ("y = InstanceNormalization (x, one, one)", "only the first axis"),
        (flat + "y = Relu (h)", "one part for each row"),
    ):
        found = proof(text, (8,), "w m each one", lead=2)
        assert isinstance(found, Counterexample) and reason in found.reason, text


def test_what_is_not_known_is_refused() -> None:
    other = prove(function("y = Add (x, b)", "b"), Typed(FLOAT, (None, 8)), [None])
    assert isinstance(other, Counterexample) and "unknown rank" in other.reason
    old = proof("y = Relu (x)", opset=17)
    assert isinstance(old, Counterexample) and "opset 17" in old.reason
    foreign = proof("y = com.microsoft.Inverse (x)")
    assert isinstance(foreign, Counterexample) and foreign.op_type == "Inverse" and foreign.index == 0
    malformed = proof("y = Concat <axis = 7> (x, x)")
    assert isinstance(malformed, Counterexample)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.lists(st.sampled_from(sorted(STEPS)), min_size=1, max_size=5))
def test_chains(names: list[str]) -> None:
    text, last = "", "x"
    for at, name in enumerate(names):
        text += STEPS[name].replace("$y", f"v{at}").replace("$x", last) + " "
        last = f"v{at}"
    found = proof(f"{text} y = Identity ({last})", (8,), "b z")
    assert isinstance(found, Proof) == (not MIXING & set(names))


def test_guards_are_for_what_fails() -> None:
    """ORT may learn to run these on 0 rows; this test then says so."""
    assert (
        not {("", "Einsum"), ("", "GroupNormalization"), ("", "Attention"), ("", "Reshape")} & RUNS_ON_NO_ROWS
    )
    model = proof("y = GroupNormalization <num_groups = 2> (x, s, s)", (4, 6), "s", opset=21)
    assert isinstance(model, Proof)
    ones = np.ones(4, np.float32)
    feeds = {"x": np.zeros((0, 4, 6), np.float32), "s": ones}
    with pytest.raises(Exception, match="cannot be reshaped"):
        run_model(ir.Model(model.graph, ir_version=10), feeds)
