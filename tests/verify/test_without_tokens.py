"""Nothing is run without a token that would end the process: ORT's Einsum, wherever it stands."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper

from sparse_onnx.verify import whole
from sparse_onnx.verify.inputs import cases
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
