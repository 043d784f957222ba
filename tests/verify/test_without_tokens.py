"""Nothing is run without a token that would end the process: ORT's Einsum, wherever it stands."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper

from sparse_onnx.core.errors import ModelError, OutsideError
from sparse_onnx.verify import whole
from sparse_onnx.verify.inputs import Case, Size, cases
from sparse_onnx.verify.whole import compare_whole

OPSETS = [helper.make_opsetid("", 18), helper.make_opsetid("own", 1)]
EINSUM = helper.make_node("Einsum", ["x", "x"], ["g"], equation="ta,tb->ab")
#: The same without an Einsum.
PRODUCT = [
    helper.make_node("Transpose", ["x"], ["turned"], perm=[1, 0]),
    helper.make_node("MatMul", ["turned", "x"], ["g"]),
]


def info(name: str, shape: list) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)


def model(place: str) -> ir.Model:
    """``y = x @ (x^T x)``."""
    functions = []
    if place == "none":
        nodes = PRODUCT
    elif place == "graph":
        nodes = [EINSUM]
    else:
        branches = [
            helper.make_graph(
                [helper.make_node("Einsum", ["x", "x"], [out], equation="ta,tb->ab")],
                out,
                [],
                [info(out, [4, 4])],
            )
            for out in ("p", "q")
        ]
        size = helper.make_node("Size", ["x"], ["n"])
        flag = helper.make_node("Cast", ["n"], ["c"], to=TensorProto.BOOL)
        nodes = [
            size,
            flag,
            helper.make_node("If", ["c"], ["g"], then_branch=branches[0], else_branch=branches[1]),
        ]
        if place == "branch of a function":
            functions = [helper.make_function("own", "F", ["x"], ["g"], nodes, OPSETS)]
            nodes = [helper.make_node("F", ["x"], ["g"], domain="own")]
    nodes = [*nodes, helper.make_node("MatMul", ["x", "g"], ["y"])]
    graph = helper.make_graph(nodes, "g", [info("x", ["T", 4])], [info("y", ["T", 4])])
    made = helper.make_model(graph, opset_imports=OPSETS, functions=functions, ir_version=9)
    return ir.from_proto(made)


@pytest.mark.parametrize("place", ["none", "graph", "branch", "branch of a function"])
@pytest.mark.parametrize("first", [True, False])
def test_only_what_survives_is_run(place: str, first: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    real, lengths = whole.sessions.run, []

    def run(session: object, feeds: dict[str, np.ndarray], name: str = "") -> list[np.ndarray]:
        lengths.append(len(feeds["x"]))
        assert lengths[-1] or place == "none"
        return real(session, feeds, name)

    monkeypatch.setattr(whole.sessions, "run", run)
    pair = (model(place), model("none"))
    drawn = cases(pair[0], large=False)
    assert any(not case.feeds["x"].size for case in drawn)
    record = compare_whole(*(pair if first else pair[::-1]), drawn, threads=1)
    assert record.passed
    assert (0 in lengths) == (place == "none")


@pytest.mark.parametrize("theirs", ["fails too", "runs", "does not load", "never runs"])
def test_a_provider_that_fails_without_tokens(theirs: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is no fault of the result where the original, which runs otherwise, fails there too."""
    create, run, elsewhere = whole.sessions.create_session, whole.sessions.run, {}

    def created(model: ir.Model, *, provider: str = "", **settings: object) -> object:
        if provider == "Rocket" and model is not candidate and theirs == "does not load":
            raise ModelError("no such operator")
        session = create(model, **settings)
        if provider == "Rocket":
            elsewhere[id(session)] = (session, model is candidate)
        return session

    def ran(session: object, feeds: dict[str, np.ndarray], name: str = "") -> list[np.ndarray]:
        _, is_candidate = elsewhere.get(id(session), (None, None))
        fails = is_candidate or theirs in ("fails too", "never runs")
        if is_candidate is not None and fails and not feeds["x"].size:
            raise OutsideError("divided by zero")
        if is_candidate is False and theirs == "never runs":
            raise OutsideError("out of order")
        return run(session, feeds, name)

    reference, candidate = model("none"), model("none")
    monkeypatch.setattr(whole.sessions, "create_session", created)
    monkeypatch.setattr(whole.sessions, "run", ran)
    drawn = cases(reference, large=False)
    record = compare_whole(reference, candidate, drawn[::-1], threads=1, provider="Rocket")
    assert record.passed is (theirs == "fails too")
    if record.passed:
        assert record.not_run == ["0 tokens: divided by zero"] and record.runs == len(drawn) - 1
        assert "0 tokens" not in record.inputs
    else:
        assert record.failure == "input 0 tokens: divided by zero" and not record.not_run


def test_a_simulated_device_has_no_races(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = [Case("two", Size(1, 2), {"x": np.ones((2, 4), np.float32)}, repeats=3)]
    assert compare_whole(model("none"), model("none"), drawn, threads=1).runs == 3
    monkeypatch.setattr(whole, "simulated", lambda provider: True)
    record = compare_whole(model("none"), model("none"), drawn, threads=1)
    assert record.runs == 1 and record.inputs == ["two"]
