"""Equal values become one, and nothing else does."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from graph.toy import external
from harness import check_rewrite, run_model
from onnx import GraphProto, NodeProto, TensorProto, helper, numpy_helper

from sparse_onnx.graph import io
from sparse_onnx.passes.share_values import ShareValues

node = helper.make_node
FLOAT = TensorProto.FLOAT
X = {"x": np.random.default_rng(0).standard_normal((3, 4)).astype(np.float32)}
AXES = {"a": np.asarray([1]), "b": np.asarray([1]), "c": np.asarray([0]), "half": np.asarray([1], np.int32)}


def model(
    nodes: Sequence[NodeProto],
    outputs: Sequence[str] = ("y",),
    constants: dict[str, np.ndarray] | None = None,
) -> ir.Model:
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", FLOAT, [3, 4])],
        [helper.make_tensor_value_info(name, FLOAT, [None, None]) for name in outputs],
        [
            numpy_helper.from_array(array, name)
            for name, array in (AXES if constants is None else constants).items()
        ],
    )
    imports = [helper.make_opsetid("", 18), helper.make_opsetid("other", 1)]
    proto = helper.make_model(graph, opset_imports=imports, ir_version=10)
    return ir.from_proto(onnx.shape_inference.infer_shapes(proto))


def types(after: ir.Model) -> list[str]:
    return [item.op_type for item in after.graph]


def test_what_is_computed_twice() -> None:
    before = model(
        [
            node("Relu", ["x"], ["p"]),
            node("Relu", ["x"], ["q"]),
            node("ReduceSum", ["p", "a"], ["r"], keepdims=1),
            node("ReduceSum", ["q", "b"], ["s"], keepdims=1),
            node("ReduceSum", ["q", "c"], ["t"], keepdims=1),
            node("Mul", ["r", "s"], ["u"]),
            node("Add", ["u", "t"], ["y"]),
        ],
    )
    # Two nodes, and the constant b.
    after, _ = check_rewrite(before, ShareValues(), rewritten=3, feeds=[X])
    assert types(after) == ["Relu", "ReduceSum", "ReduceSum", "Mul", "Add"]
    assert set(after.graph.initializers) == {"a", "c", "half"}
    mul = after.graph[3]
    assert mul.inputs[0] is mul.inputs[1]


def test_identities() -> None:
    before = model(
        [
            node("Identity", ["x"], ["i"]),
            node("Cast", ["i"], ["j"], to=FLOAT),
            node("Dropout", ["j"], ["k"]),
            node("Dropout", ["k", "ratio", "no"], ["l"]),
            node("Identity", ["a"], ["axes"]),
            node("ReduceSum", ["l", "axes"], ["y"]),
        ],
        constants={
            **AXES,
            "ratio": np.asarray(0.5, np.float32),
            "no": np.asarray(False),
            "b": np.asarray([7]),
        },
    )
    after, _ = check_rewrite(before, ShareValues(), rewritten=5, feeds=[X])
    assert types(after) == ["ReduceSum"]


STAY = {
    "another input": [node("Relu", ["x"], ["p"]), node("Relu", ["p"], ["q"]), node("Add", ["p", "q"], ["y"])],
    "another attribute": [
        node("LeakyRelu", ["x"], ["p"], alpha=0.0),
        node("LeakyRelu", ["x"], ["q"], alpha=-0.0),
        node("Add", ["p", "q"], ["y"]),
    ],
    "another type": [
        node("Cast", ["x"], ["p"], to=TensorProto.FLOAT16),
        node("Cast", ["x"], ["q"], to=TensorProto.DOUBLE),
        node("Cast", ["p"], ["r"], to=FLOAT),
        node("Cast", ["q"], ["s"], to=FLOAT),
        node("Add", ["r", "s"], ["y"]),
    ],
    "random numbers": [
        node("RandomNormalLike", ["x"], ["p"]),
        node("RandomNormalLike", ["x"], ["q"]),
        node("Sub", ["p", "q"], ["y"]),
    ],
    "draws": [
        node("Sigmoid", ["x"], ["u"]),
        node("Bernoulli", ["u"], ["p"]),
        node("Bernoulli", ["u"], ["q"]),
        node("Sub", ["p", "q"], ["y"]),
    ],
    "training": [
        node("Constant", [], ["yes"], value=numpy_helper.from_array(np.asarray(True))),
        node("Dropout", ["x", "", "yes"], ["p"]),
        node("Dropout", ["x", "", "yes"], ["q"]),
        node("Sub", ["p", "q"], ["y"]),
    ],
    "an operator of others": [
        node("Draw", ["x"], ["p"], domain="other"),
        node("Draw", ["x"], ["q"], domain="other"),
        node("Add", ["p", "q"], ["y"]),
    ],
    "an output that the other node lacks": [
        node("TopK", ["x", "a"], ["p", ""]),
        node("TopK", ["x", "a"], ["", "q"]),
        node("Cast", ["q"], ["r"], to=FLOAT),
        node("Add", ["p", "r"], ["y"]),
    ],
}


@pytest.mark.parametrize("name", STAY)
def test_what_differs_stays(name: str) -> None:
    before = model(STAY[name], constants={"a": np.asarray([1])})
    assert not ShareValues()(before).modified


def test_constants_of_other_types_or_shapes_stay() -> None:
    constants = {
        "p": np.asarray([1.0], np.float32),
        "q": np.asarray([[1.0]], np.float32),
        "r": np.asarray([-0.0], np.float32),
        "s": np.asarray([0.0], np.float32),
        "large": np.ones([3, 400], np.float32),
        "again": np.ones([3, 400], np.float32),
    }
    nodes = [
        node("Add", ["x", "p"], ["1"]),
        node("Add", ["1", "q"], ["2"]),
        node("Add", ["2", "r"], ["3"]),
        node("Add", ["3", "s"], ["y"]),
        node("Add", ["large", "again"], ["z"]),
    ]
    check_rewrite(model(nodes, ("y", "z"), constants), ShareValues(), rewritten=0)


def test_outputs_keep_their_names() -> None:
    nodes = [
        node("Relu", ["x"], ["p"]),
        node("Identity", ["p"], ["y"]),
        node("Identity", ["p"], ["z"]),
        node("Relu", ["x"], ["w"]),
        node("Identity", ["x"], ["v"]),
    ]
    before = model(nodes, ("p", "y", "z", "w", "v"))
    after, _ = check_rewrite(before, ShareValues(), rewritten=1, feeds=[X])  # constant b
    assert [value.name for value in after.graph.outputs] == ["p", "y", "z", "w", "v"]
    assert len(after.graph) == 5


def branch(nodes: Sequence[NodeProto], output: str) -> GraphProto:
    return helper.make_graph(nodes, output, [], [helper.make_tensor_value_info(output, FLOAT, [3, 4])])


def test_branches() -> None:
    """A branch uses what is computed outside; what it returns it computes itself; branches share nothing."""
    then = branch(
        [
            node("Relu", ["x"], ["p1"]),
            node("Exp", ["p1"], ["e1"]),
            node("Exp", ["p1"], ["f1"]),
            node("Add", ["e1", "f1"], ["t"]),
        ],
        "t",
    )
    other = branch(
        [node("Exp", ["p"], ["e2"]), node("Identity", ["e2"], ["i2"]), node("Relu", ["x"], ["u"])], "u"
    )
    constant = numpy_helper.from_array(np.asarray(True), "flag")
    nodes = [
        node("Relu", ["x"], ["p"]),
        node("If", ["flag"], ["r"], then_branch=then, else_branch=other),
        node("Identity", ["x"], ["kept"]),
        node("Add", ["r", "kept"], ["y"]),
        node("Exp", ["p"], ["late"]),
        node("Add", ["late", "x"], ["z"]),
    ]
    before = model(nodes, ("y", "z"), {"flag": numpy_helper.to_array(constant)})
    after, _ = check_rewrite(before, ShareValues(), rewritten=4, feeds=[X])
    found = {graph.name: [item.op_type for item in graph] for graph in after.graphs()}
    assert found == {"g": ["Relu", "If", "Add", "Exp", "Add"], "t": ["Exp", "Add"], "u": ["Exp", "Relu"]}


def test_branches_that_return_a_value_from_outside() -> None:
    then, other = branch([node("Identity", ["p"], ["t"])], "t"), branch([node("Identity", ["x"], ["u"])], "u")
    nodes = [
        node("Relu", ["x"], ["p"]),
        node("If", ["flag"], ["y"], then_branch=then, else_branch=other),
    ]
    for flag in (True, False):
        before = model(nodes, constants={"flag": np.asarray(flag)})
        check_rewrite(before, ShareValues(), rewritten=0, feeds=[X])


def test_loops_use_what_is_computed_outside() -> None:
    body = helper.make_graph(
        [
            node("Identity", ["go"], ["again"]),
            node("Exp", ["x"], ["e"]),
            node("Add", ["carried", "e"], ["next"]),
        ],
        "body",
        [
            helper.make_tensor_value_info("i", TensorProto.INT64, []),
            helper.make_tensor_value_info("go", TensorProto.BOOL, []),
            helper.make_tensor_value_info("carried", FLOAT, [3, 4]),
        ],
        [
            helper.make_tensor_value_info("again", TensorProto.BOOL, []),
            helper.make_tensor_value_info("next", FLOAT, [3, 4]),
        ],
    )
    nodes = [node("Exp", ["x"], ["outside"]), node("Loop", ["n", "", "outside"], ["y"], body=body)]
    after, _ = check_rewrite(
        model(nodes, constants={"n": np.asarray(3)}), ShareValues(), rewritten=1, feeds=[X]
    )
    np.testing.assert_allclose(run_model(after, X)[0], 4 * np.exp(X["x"]), rtol=1e-6)


def test_lowered_blocks_stay() -> None:
    nodes = [node("Relu", ["x"], ["p"]), node("Relu", ["x"], ["q"]), node("Add", ["p", "q"], ["y"])]
    entry = nodes[1].metadata_props.add()
    entry.key, entry.value = "sparse_onnx.form", "grouped"
    assert not ShareValues()(model(nodes, constants={})).modified


def test_weights_in_the_same_bytes_are_one(tmp_path: Path) -> None:
    (tmp_path / "w.bin").write_bytes(np.arange(800, dtype=np.float32).tobytes())
    weights = [
        external("p", [20, 20], "w.bin", 0, 1600),
        external("q", [20, 20], "w.bin", 0, 1600),
        external("r", [20, 20], "w.bin", 1600, 1600),
        external("s", [400], "w.bin", 0, 1600),
    ]
    graph = helper.make_graph(
        [node("Concat", ["p", "q", "r"], ["c"], axis=0), node("Shape", ["s"], ["n"])],
        "g",
        [],
        [
            helper.make_tensor_value_info("c", FLOAT, [60, 20]),
            helper.make_tensor_value_info("n", TensorProto.INT64, [1]),
        ],
        weights,
    )
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    (tmp_path / "m.onnx").write_bytes(proto.SerializeToString())
    loaded = io.load(tmp_path / "m.onnx")
    assert ShareValues()(loaded).rewritten == 1
    assert set(loaded.graph.initializers) == {"p", "r", "s"}


def test_time_is_linear_in_repeats() -> None:
    """A chain that is written 2,000 times: each node finds its first in one look, so this ends at once."""
    nodes = []
    for at in range(2000):
        nodes += [node("Relu", ["x"], [f"p{at}"]), node("Exp", [f"p{at}"], [f"q{at}"])]
    nodes.append(node("Sum", [f"q{at}" for at in range(2000)], ["y"]))
    after = model(nodes, constants={})
    assert ShareValues()(after).rewritten == 2 * 1999
    assert types(after) == ["Relu", "Exp", "Sum"]
