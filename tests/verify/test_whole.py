from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from builders import Shape, layered_model
from onnx import helper, numpy_helper
from verify.variants import change, edited

from sparse_onnx.core.errors import OutsideError
from sparse_onnx.verify import whole
from sparse_onnx.verify.inputs import Case, Size, cases
from sparse_onnx.verify.whole import compare_whole

SHAPE = Shape(experts=4, top_k=1, hidden=8, inner=8)


def near_tied(sign: int) -> ir.Model:
    """Experts 0 and 1 differ by less than rounding where x[0] is not 0; 2 is chosen where x[1] is larger."""

    def edit(router: np.ndarray) -> None:
        router[:] = 0
        router[0, 0], router[0, 1], router[1, 2] = 1, 1 + sign * 2e-7, 1

    return change(layered_model(SHAPE, layers=1), "layers.0.router", edit)


def tokens() -> np.ndarray:
    """One near-tied token, five that are not."""
    x = np.zeros((6, 8), np.float32)
    x[0, 0], x[1:, 1] = 1, 3
    x[:, 4:] = np.random.default_rng(0).standard_normal((6, 4))
    return x


def test_what_was_deployed_is_judged(monkeypatch: pytest.MonkeyPatch) -> None:
    """A fault of one session is not taken back by another session that has none."""
    one, other, case = near_tied(1), near_tied(-1), Case("six", Size(1, 6), {"x": tokens()})
    real = whole.sessions.run

    def faulty(session, feeds, name=""):
        results = real(session, feeds, name)
        if name == "B" and len(results) == 1:
            results[0][3] += 100
        return results

    monkeypatch.setattr(whole.sessions, "run", faulty)
    record = compare_whole(one, other, [case], threads=1, names=("A", "B"))
    assert record.passed is False and record.max_abs_error > 50


def test_near_ties_everywhere_are_left_out_but_something_must_be_compared() -> None:
    one, other = near_tied(1), near_tied(-1)
    x = tokens()
    tied = Case("tied", Size(1, 1), {"x": x[:1]})
    record = compare_whole(one, other, [tied], threads=1)
    assert record.passed is False and "nothing could be compared" in (record.failure or "")
    record = compare_whole(one, other, [tied, Case("all", Size(1, 6), {"x": x})], threads=1)
    assert record.passed and record.tokens_left_out == 2


def test_an_output_of_nans_was_not_compared() -> None:
    def edit(proto) -> None:
        proto.graph.initializer.append(numpy_helper.from_array(np.array(np.nan, np.float32), "nan"))
        proto.graph.node.append(helper.make_node("Mul", ["y", "nan"], ["z"], name="spoiled"))
        proto.graph.output[0].name = "z"

    model = edited(layered_model(SHAPE), edit)
    record = compare_whole(model, model, cases(model, large=False), threads=1)
    assert record.passed is None and "nothing but infinities and NaNs" in (record.failure or "")


def test_outputs_have_the_same_type() -> None:
    def edit(proto) -> None:
        proto.graph.node.append(helper.make_node("Cast", ["y"], ["half"], to=10, name="half"))
        proto.graph.output[0].name = "half"
        proto.graph.output[0].type.tensor_type.elem_type = 10

    model = layered_model(SHAPE)
    record = compare_whole(model, edited(model, edit), cases(model, large=False), threads=1)
    assert record.passed is False and "float16 instead of float32" in (record.failure or "")


def test_optional_cases_are_the_references_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    model, real = layered_model(SHAPE), whole.sessions.run

    def no_empty(session, feeds, name=""):
        if name == failing and not feeds["x"].size:
            raise OutsideError("cannot run on nothing")
        return real(session, feeds, name)

    monkeypatch.setattr(whole.sessions, "run", no_empty)
    failing = "the original"
    record = compare_whole(model, model, cases(model, large=False), threads=1)
    assert record.passed and "0 tokens" not in record.inputs
    failing = "the result"
    record = compare_whole(model, model, cases(model, large=False), threads=1)
    assert record.passed is False and "0 tokens: cannot run on nothing" in (record.failure or "")
