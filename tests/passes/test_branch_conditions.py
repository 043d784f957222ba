"""Parts behind a Where become branches: the same numbers, really skipped, and left alone where that is not proved."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
import onnx_ir as ir
import pytest
from any_body import Graph
from executed import executed
from harness import Feeds, assert_close, check_rewrite, run_model
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

from sparse_onnx.graph.infer import infer
from sparse_onnx.passes.branch_conditions import BranchConditions
from sparse_onnx.passes.fuse_gating import FuseGating

WIDTH = 8
#: Name, element type, axes.
Input = tuple[str, int, Sequence[int | str]]
X: Input = ("x", TensorProto.FLOAT, ["T", WIDTH])
FLAG: Input = ("flag", TensorProto.BOOL, [])
MASK: Input = ("mask", TensorProto.BOOL, ["T", 1])


def finished(graph: Graph, inputs: Sequence[Input], outputs: Sequence[str], opset: int = 20) -> ir.Model:
    """A model of what was written, with types and shapes as `optimize` has them when the pass runs."""
    names = [graph.op("Identity", name) for name in outputs]
    values = [helper.make_tensor_value_info(*each) for each in inputs]
    results = [helper.make_empty_tensor_value_info(name) for name in names]
    proto = helper.make_graph(graph.nodes, "g", values, results, graph.initializers)
    imports = [helper.make_opsetid("", opset), helper.make_opsetid("com.microsoft", 1)]
    model = ir.from_proto(helper.make_model(proto, opset_imports=imports, ir_version=10))
    infer(model)
    for value in model.graph.outputs:
        assert value.type is not None
    return model


def layer(graph: Graph, x: str, width: int = WIDTH) -> str:
    return graph.op("Tanh", graph.op("MatMul", x, graph.weight(WIDTH, width)))


def sure(graph: Graph, x: str, bound: str) -> str:
    """One boolean: a confidence above a bound."""
    score = graph.op("ReduceMax", graph.op("MatMul", x, graph.weight(WIDTH, 1)), keepdims=0)
    return graph.op("Greater", score, bound)


def rows(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((count, WIDTH)).astype(np.float32)


def flags(count: int = 5) -> list[Feeds]:
    return [{"x": rows(count), "flag": np.asarray(flag)} for flag in (True, False)]


def masks() -> list[Feeds]:
    some = np.asarray([[True], [False], [False], [True], [False]])
    found = [{"x": rows(5), "mask": each} for each in (some, some | True, some & False)]
    return [*found, {"x": rows(0), "mask": some[:0]}, {"x": rows(1), "mask": some[:1]}]


def products(model: ir.Model, feeds: Feeds) -> int:
    return executed(model, feeds)["MatMul"]


# What runs


def test_an_early_exit() -> None:
    graph = Graph()
    hidden = layer(graph, "x")
    stop = sure(graph, hidden, "bound")
    y = graph.op("Where", stop, hidden, layer(graph, layer(graph, hidden)))
    model = finished(graph, [X, ("bound", TensorProto.FLOAT, [])], [y])
    feeds = [{"x": rows(5), "bound": np.asarray(bound, np.float32)} for bound in (-1e9, 1e9)]
    after, outcome = check_rewrite(model, BranchConditions(), rewritten=1, feeds=feeds)
    assert outcome.matched == 1
    assert [products(after, each) for each in feeds] == [2, 4] and products(model, feeds[0]) == 4
    kinds = collections.Counter(node.op_type for node in after.graph)
    assert kinds["If"] == 1 and kinds["Where"] == 0 and kinds["MatMul"] == 2


def test_both_sides() -> None:
    """Each side is a branch, cheap nodes with it; what both read runs once, before them."""
    graph = Graph()
    shared = layer(graph, "x")
    y = graph.op("Where", "flag", layer(graph, layer(graph, shared)), graph.op("Neg", layer(graph, shared)))
    model = finished(graph, [X, FLAG], [y])
    after, _ = check_rewrite(model, BranchConditions(), rewritten=1, feeds=flags())
    assert [products(after, each) for each in flags()] == [3, 2]
    assert [executed(after, each)["Neg"] for each in flags()] == [0, 1]


def test_a_modality_that_is_absent() -> None:
    """The tower gives way to a number: its sizes come from numbers and from an input of the graph."""
    graph = Graph()
    seen = graph.op("Add", layer(graph, "image"), graph.vector(WIDTH))
    seen = graph.op("Where", "flag", seen, graph.constant(np.float32(0)))
    y = graph.op("Concat", layer(graph, "x"), seen, axis=0)
    model = finished(graph, [X, FLAG, ("image", TensorProto.FLOAT, ["patches", WIDTH])], [y])
    feeds = [each | {"image": rows(count, 1)} for each in flags() for count in (0, 3)]
    after, _ = check_rewrite(model, BranchConditions(), rewritten=1, feeds=feeds)
    assert [products(after, each) for each in feeds] == [2, 2, 1, 1]


def test_a_mixture_of_depths() -> None:
    """A layer runs where any token takes it."""
    graph = Graph()
    y = graph.op("Where", "mask", graph.op("Add", "x", layer(graph, layer(graph, "x"))), "x")
    model = finished(graph, [X, MASK], [y])
    after, _ = check_rewrite(model, BranchConditions(), rewritten=1, feeds=masks())
    assert [products(after, each) for each in masks()] == [2, 2, 0, 0, 2]


def test_a_mask_with_two_sides() -> None:
    """Of a mask without elements neither side is taken: one runs for its sizes, though its width is 1 elsewhere."""
    graph = Graph()
    wide, narrow = layer(graph, layer(graph, "x")), layer(graph, "x", 1)
    for first, second in ((wide, narrow), (narrow, wide)):
        fresh = Graph(nodes=list(graph.nodes), initializers=list(graph.initializers))
        y = fresh.op("Where", "mask", first, second)
        model = finished(fresh, [X, MASK], [y])
        after, _ = check_rewrite(model, BranchConditions(), rewritten=1, feeds=masks())
        wider = 2 if first == wide else 1
        assert [products(after, each) for each in masks()][:3] == [3, wider, 3 - wider]


def test_masks_can_be_left_out() -> None:
    graph = Graph()
    inner = graph.op("Where", "flag", layer(graph, "x"), "x")
    model = finished(graph, [X, MASK, FLAG], [graph.op("Where", "mask", layer(graph, inner), "x")])
    feeds = [
        {**one, **two} for one in masks() for two in ({"flag": np.asarray(True)}, {"flag": np.asarray(False)})
    ]
    after, _ = check_rewrite(model, BranchConditions(masks=False), rewritten=1, feeds=feeds)
    assert [products(after, each) for each in feeds[:2]] == [2, 1]
    after, _ = check_rewrite(model, BranchConditions(), rewritten=2, feeds=feeds)
    assert [products(after, each) for each in feeds[4:6]] == [0, 0]


def test_a_chain_of_early_exits() -> None:
    """One choice within another: each part runs under all its conditions, and no branch stands in another."""
    graph = Graph()
    exits, stops, hidden = [], [], "x"
    for depth in range(3):
        hidden = layer(graph, hidden)
        stops.append(sure(graph, hidden, f"bound{depth}"))
        exits.append(layer(graph, hidden))
    y = layer(graph, layer(graph, hidden))
    for stop, leave in zip(stops[::-1], exits[::-1], strict=True):
        y = graph.op("Where", stop, leave, y)
    bounds: list[Input] = [(f"bound{depth}", TensorProto.FLOAT, []) for depth in range(3)]
    model = finished(graph, [X, *bounds], [y])
    feeds = []
    for taken in range(4):
        values = {
            f"bound{depth}": np.asarray(-1e9 if depth >= taken else 1e9, np.float32) for depth in range(3)
        }
        feeds.append({"x": rows(4), **values})
    after, _ = check_rewrite(model, BranchConditions(), rewritten=3, feeds=feeds)
    # A layer and its confidence for each depth up to the exit, the exit's own layer; two layers behind the last.
    assert [products(after, each) for each in feeds] == [3, 5, 7, 8]
    inner = [node for graph in after.graphs() if graph is not after.graph for node in graph]
    assert not any(node.op_type == "If" for node in inner)


def test_choices_of_one_condition_share_what_they_read() -> None:
    """Hidden states, keys and values of skipped layers: no one Where has the layers to itself."""
    graph = Graph()
    hidden = layer(graph, layer(graph, "x"))
    parts = [hidden, layer(graph, hidden), layer(graph, hidden)]
    chosen = [graph.op("Where", "flag", each, "x") for each in parts[:2]]
    chosen.append(
        graph.op("Where", graph.op("Not", graph.op("Unsqueeze", "flag", graph.ints(0))), "x", parts[2])
    )
    model = finished(graph, [X, FLAG], chosen)
    after, _ = check_rewrite(model, BranchConditions(), rewritten=3, feeds=flags())
    assert sum(node.op_type == "If" for node in after.graph) == 1
    assert [products(after, each) for each in flags()] == [4, 0]


def test_one_condition_again_behind_its_own_result() -> None:
    """The second part reads what the first gave: a branch each."""
    graph = Graph()
    middle = graph.op("Where", "flag", layer(graph, "x"), "x")
    y = graph.op("Where", "flag", layer(graph, graph.op("Abs", middle)), graph.op("Neg", middle))
    model = finished(graph, [X, FLAG], [middle, y])
    after, _ = check_rewrite(model, BranchConditions(), rewritten=2, feeds=flags())
    assert sum(node.op_type == "If" for node in after.graph) == 2
    assert [products(after, each) for each in flags()] == [2, 0]


def test_what_is_not_taken_does_not_run() -> None:
    """Exact where the original gives an answer: here it fails in the part that is not taken."""
    graph = Graph()
    table = graph.op("MatMul", "x", graph.weight(WIDTH, WIDTH))
    picked = graph.op("Gather", table, "place", axis=0)
    y = graph.op("Where", "flag", picked, graph.constant(np.float32(0)))
    model = finished(graph, [X, FLAG, ("place", TensorProto.INT64, ["N"])], [y])
    feeds = [each | {"place": np.asarray([1, 4])} for each in flags()]
    after, _ = check_rewrite(model, BranchConditions(), rewritten=1, feeds=feeds)
    feeds[1]["place"] = np.asarray([1, 7])
    assert not run_model(after, feeds[1])[0].any()
    with pytest.raises(Exception, match=r"out of (data )?bounds"):
        run_model(model, feeds[1])


def test_nothing_leaks_from_what_is_not_taken() -> None:
    graph = Graph()
    broken = graph.op("MatMul", "x", graph.constant(np.full((WIDTH, WIDTH), np.nan, np.float32)))
    model = finished(graph, [X, MASK], [graph.op("Where", "mask", graph.op("Log", broken), "x")])
    check_rewrite(model, BranchConditions(), rewritten=1, feeds=masks())
    feeds = masks()[2]
    BranchConditions()(model)
    np.testing.assert_array_equal(run_model(model, feeds)[0], feeds["x"])


@pytest.mark.parametrize("axes", [[], [1], [1, 1], [1, 1, 1]])
def test_a_condition_of_any_rank(axes: list[int]) -> None:
    """The result has the axes of the condition too."""
    graph = Graph()
    y = graph.op("Where", "flag", layer(graph, "x"), graph.constant(np.float32(1)))
    model = finished(graph, [X, ("flag", TensorProto.BOOL, axes)], [y])
    feeds = [each | {"flag": each["flag"].reshape(axes)} for each in flags()]
    after, _ = check_rewrite(model, BranchConditions(), rewritten=1, feeds=feeds)
    assert [products(after, each) for each in feeds] == [1, 0]


def test_a_condition_that_is_expanded_first() -> None:
    graph = Graph()
    condition = graph.op("Expand", "flag", graph.op("Shape", "x"))
    model = finished(graph, [X, FLAG], [graph.op("Where", condition, layer(graph, "x"), graph.vector(WIDTH))])
    after, _ = check_rewrite(model, BranchConditions(), rewritten=1, feeds=[*flags(), *flags(0)])
    assert [products(after, each) for each in flags()] == [1, 0]


def test_a_neutral_block_may_be_skipped() -> None:
    """It is lowered in the branch afterwards; its weights stay in the graph around it."""
    from builders import Shape, routed_model

    model = routed_model(Shape(hidden=WIDTH, inner=WIDTH))
    block = next(iter(model.graph))
    tokens, y = block.inputs[0], block.outputs[0]
    assert tokens is not None
    flag = ir.Value(name="flag", type=ir.TensorType(ir.DataType.BOOL), shape=ir.Shape([]))
    model.graph.inputs.append(flag)
    where = ir.node("Where", [flag, y, tokens], name="choice")
    where.outputs[0].name, where.outputs[0].type, where.outputs[0].shape = "z", y.type, y.shape
    model.graph.append(where)
    model.graph.outputs[:] = [where.outputs[0]]
    rng = np.random.default_rng(0)
    common = {"index": rng.integers(0, 4, (5, 2)), "weight": rng.uniform(size=(5, 2)).astype(np.float32)}
    feeds = [{**common, "tokens": rows(5), "flag": np.asarray(flag)} for flag in (True, False)]
    after, _ = check_rewrite(model, BranchConditions(), rewritten=1, feeds=feeds)
    lowered, _ = check_rewrite(after, FuseGating(), rewritten=1, feeds=feeds)
    assert "fc1.0" in lowered.graph.initializers
    assert [executed(lowered, each)["Gemm"] for each in feeds] == [8, 0]


def test_bodies_of_their_own() -> None:
    """A loop moves with the side, unless it reads weights around it: those would lie two graphs out."""
    for outside in (False, True):
        graph = Graph()
        weight = graph.weight(WIDTH, WIDTH)
        value = helper.make_tensor_value_info
        inner = [
            helper.make_node("Constant", [], ["own"], value=graph.initializers[0]),
            helper.make_node("MatMul", ["h", weight if outside else "own"], ["h2"]),
            helper.make_node("Identity", ["go"], ["go2"]),
        ]
        body = helper.make_graph(
            inner[outside:],
            "body",
            [
                value("i", TensorProto.INT64, []),
                value("go", TensorProto.BOOL, []),
                value("h", TensorProto.FLOAT, None),
            ],
            [value("go2", TensorProto.BOOL, []), value("h2", TensorProto.FLOAT, None)],
        )
        start = layer(graph, "x")
        looped = graph.op("Loop", graph.constant(np.asarray(3)), "", start, body=body)
        model = finished(graph, [X, FLAG], [graph.op("Where", "flag", graph.op("Neg", looped), "x")])
        model.graph.outputs[0].shape = ir.Shape(["T", WIDTH])
        for node in model.graph:
            if node.op_type in ("Loop", "Neg"):
                node.outputs[0].shape = ir.Shape(["T", WIDTH])
        refused = ["Loop 'n2' stays: its body reads weights of the graph around it"] if outside else []
        after, _ = check_rewrite(
            model, BranchConditions(), rewritten=not outside, feeds=flags(), refused=refused, tolerance=1e-5
        )
        assert [products(after, each) for each in flags()] == ([4, 4] if outside else [4, 0])


# What is left alone


def _product_with_a_mask(graph: Graph) -> str:
    """0 * inf is NaN."""
    return graph.op("Add", "x", graph.op("Mul", graph.op("Cast", "mask", to=1), layer(graph, "x")))


def _attention(graph: Graph) -> str:
    scores = graph.op("MatMul", layer(graph, "x"), graph.op("Transpose", layer(graph, "x"), perm=[1, 0]))
    seen = graph.op("Equal", graph.op("Transpose", "mask", perm=[1, 0]), "mask")
    return graph.op("Softmax", graph.op("Where", seen, scores, graph.constant(np.float32(-1e9))))


def _cheap(graph: Graph) -> str:
    return graph.op("Where", "mask", graph.op("Tanh", "x"), "x")


def _read_elsewhere(graph: Graph) -> str:
    hidden = layer(graph, "x")
    return graph.op("Add", graph.op("Where", "mask", graph.op("Neg", hidden), "x"), hidden)


def _decides_itself(graph: Graph) -> str:
    hidden = layer(graph, "x")
    best = graph.op("ReduceMax", hidden, graph.ints(-1))
    return graph.op("Where", graph.op("Less", best, graph.constant(np.float32(0.5))), hidden, "x")


def _same_sides(graph: Graph) -> str:
    hidden = layer(graph, "x")
    return graph.op("Where", "mask", hidden, hidden)


def _other_order(graph: Graph) -> str:
    """Taken where the mask is true by one, where it is false by the other."""
    hidden = layer(graph, "x")
    return graph.op("Add", graph.op("Where", "mask", hidden, "x"), graph.op("Where", "mask", "x", hidden))


def _constant(graph: Graph) -> str:
    return graph.op("Where", graph.constant(np.asarray(True)), layer(graph, "x"), "x")


ALONE = [
    _product_with_a_mask,
    _attention,
    _cheap,
    _read_elsewhere,
    _decides_itself,
    _same_sides,
    _other_order,
    _constant,
]


@pytest.mark.parametrize("write", ALONE)
def test_left_alone(write: Callable[[Graph], str]) -> None:
    graph = Graph()
    model = finished(graph, [X, MASK], [write(graph)])
    after, outcome = check_rewrite(model, BranchConditions(), rewritten=0, feeds=masks()[:3])
    assert outcome.matched == 0 and not any(node.op_type == "If" for node in after.graph)


def test_an_output_of_the_graph_is_computed() -> None:
    graph = Graph()
    hidden = layer(graph, "x")
    model = finished(graph, [X, FLAG], [graph.op("Where", "flag", hidden, "x")])
    value = next(node for node in model.graph if node.op_type == "Tanh").outputs[0]
    model.graph.outputs.append(value)
    check_rewrite(model, BranchConditions(), rewritten=0, feeds=flags())


def _random(graph: Graph) -> str:
    noisy = graph.op("Add", layer(graph, "x"), graph.op("RandomNormalLike", "x"))
    return graph.op("MatMul", noisy, graph.op("RandomNormal", shape=[WIDTH, WIDTH]))


def _dropout(graph: Graph) -> str:
    half, training = graph.constant(np.float32(0.5)), graph.constant(np.asarray(True))
    return graph.op("Dropout", layer(graph, "x"), half, training)


def _unknown_operator(graph: Graph) -> str:
    return graph.op("Counted", layer(graph, "x"), domain="elsewhere")


def _unknown_contrib(graph: Graph) -> str:
    return graph.op("BiasDropout", layer(graph, "x"), graph.vector(WIDTH), domain="com.microsoft")


HELD = {
    "random numbers": (_dropout, "Dropout 'n2' stays: its results are random"),
    "operators of others": (_unknown_operator, "operators of 'elsewhere' are not known"),
    "operators of ORT": (_unknown_contrib, "com.microsoft::BiasDropout is not known"),
}


@pytest.mark.parametrize("name", HELD)
def test_held(name: str) -> None:
    """What must run, and all that it needs."""
    write, reason = HELD[name]
    graph = Graph()
    y = graph.op("Where", "flag", write(graph), "x")
    model = _typed(graph, y)
    after = ir.from_proto(ir.to_proto(model))
    outcome = BranchConditions()(after)
    assert not outcome.modified and outcome.matched == 1
    [refusal] = outcome.refusals
    assert reason in refusal.reason and refusal.by == "branch_conditions"


def _typed(graph: Graph, y: str) -> ir.Model:
    proto = helper.make_graph(
        graph.nodes,
        "g",
        [helper.make_tensor_value_info(*each) for each in (X, FLAG)],
        [helper.make_tensor_value_info(y, TensorProto.FLOAT, ["T", WIDTH])],
        graph.initializers,
    )
    imports = [helper.make_opsetid(domain, version) for domain, version in (("", 20), ("elsewhere", 1))]
    return ir.from_proto(helper.make_model(proto, opset_imports=imports, ir_version=10))


def test_the_rest_moves_where_random_numbers_stay() -> None:
    graph = Graph()
    model = finished(graph, [X, FLAG], [graph.op("Where", "flag", _random(graph), "x")])
    outcome = BranchConditions()(model)
    assert outcome.rewritten == 1 and not outcome.refusals
    assert {"RandomNormalLike", "RandomNormal"} <= {node.op_type for node in model.graph}
    [taken, left] = [executed(model, each) for each in flags()]
    assert taken["MatMul"] == 2 and left["MatMul"] == 0 and left["RandomNormal"] == 1


def test_sizes_that_nothing_tells_are_refused() -> None:
    """Which rows NonZero finds decides how many the side has, and the other side is one number."""
    graph = Graph()
    found = graph.op(
        "Transpose", graph.op("NonZero", graph.op("ReduceMax", "x", graph.ints(1), keepdims=0)), perm=[1, 0]
    )
    picked = graph.op("MatMul", graph.op("GatherND", "x", found), graph.weight(WIDTH, WIDTH))
    picked = graph.op(
        "GatherND",
        picked,
        graph.op(
            "Transpose",
            graph.op("NonZero", graph.op("ReduceMax", picked, graph.ints(1), keepdims=0)),
            perm=[1, 0],
        ),
    )
    y = graph.op("Where", "flag", picked, graph.constant(np.float32(0)))
    model = finished(graph, [X, FLAG], [y])
    check_rewrite(model, BranchConditions(), rewritten=0, feeds=flags(), refused=["is that of no value"])


def test_unknown_ranks_are_refused() -> None:
    graph = Graph()
    y = graph.op("Where", "flag", graph.op("Reshape", layer(graph, "x"), "sizes"), graph.vector(WIDTH))
    model = finished(graph, [X, FLAG, ("sizes", TensorProto.INT64, ["N"])], [y])
    model.graph.outputs[0].shape = ir.Shape([None, WIDTH])
    feeds = [each | {"sizes": np.asarray([-1, WIDTH])} for each in flags()]
    check_rewrite(
        model, BranchConditions(), rewritten=0, feeds=feeds, refused=["the number of axes of 'Reshape_2_0'"]
    )


def test_strings_are_refused() -> None:
    graph = Graph()
    best = graph.op("ArgMax", layer(graph, "x"), axis=1)
    words = graph.op("Gather", graph.constant(np.asarray(["a"] * WIDTH, object)), best)
    y = graph.op("Where", "mask", words, graph.constant(np.asarray(["b"], object)))
    model = finished(graph, [X, MASK], [y])
    outcome = BranchConditions()(model)
    assert not outcome.modified and "tensor of numbers" in outcome.refusals[0].reason


def test_old_opsets_are_refused() -> None:
    graph = Graph()
    model = finished(graph, [X, FLAG], [graph.op("Where", "flag", layer(graph, "x"), "x")], opset=13)
    check_rewrite(model, BranchConditions(), rewritten=0, feeds=flags(), refused=["opset 13"])


def test_choices_in_bodies_are_refused() -> None:
    graph, inner = Graph(), Graph()
    y = inner.op("Where", "flag", layer(inner, "x"), "x")
    other = [helper.make_node("Identity", ["x"], ["same"])]
    results = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["T", WIDTH]) for name in (y, "same")]
    branches = {
        "then_branch": helper.make_graph(inner.nodes, "then", [], results[:1], inner.initializers),
        "else_branch": helper.make_graph(other, "else", [], results[1:]),
    }
    model = finished(graph, [X, FLAG, ("use", TensorProto.BOOL, [])], [graph.op("If", "use", **branches)])
    feeds = [each | {"use": np.asarray(True)} for each in flags()]
    check_rewrite(
        model,
        BranchConditions(),
        rewritten=0,
        feeds=feeds,
        refused=["it stands in the body of an If, Loop or Scan"],
    )


# Any graph


@dataclasses.dataclass(frozen=True)
class Step:
    """One node: operator, the places of its inputs among the values so far, and a condition where it chooses."""

    kind: str
    left: int
    right: int
    mask: int


CONDITIONS = ("flag", "other", "mask", "rare", "seen", "seen rows")
STEPS = st.builds(
    Step,
    st.sampled_from(["MatMul", "MatMul", "Add", "Tanh", "ReduceMean", "Where", "Where", "Where"]),
    st.integers(0, 5),
    st.integers(0, 5),
    st.integers(0, len(CONDITIONS) - 1),
)


def any_graph(steps: Sequence[Step], outputs: int) -> ir.Model:
    """Nodes that read what was computed shortly before them; conditions are inputs, or computed from such values."""
    graph = Graph(np.random.default_rng(len(steps)))
    zero = graph.constant(np.float32(0))
    values = ["x", graph.vector(WIDTH), zero]
    for step in steps:
        left, right = (values[-1 - at % len(values)] for at in (step.left, step.right))
        if step.kind == "MatMul":
            spread = graph.op("Add", left, graph.op("Mul", graph.vector(WIDTH), zero))
            values.append(layer(graph, spread))
        elif step.kind == "Add":
            values.append(graph.op("Add", left, right))
        elif step.kind == "Tanh":
            values.append(graph.op("Tanh", left))
        elif step.kind == "ReduceMean":
            values.append(graph.op("ReduceMean", graph.op("Add", left, graph.vector(WIDTH)), graph.ints(-1)))
        else:
            name = CONDITIONS[step.mask]
            if name.startswith("seen"):
                spread = graph.op("Add", values[-1 - (step.left + 1) % len(values)], graph.vector(WIDTH))
                best = (
                    graph.op("ReduceMax", spread, graph.ints(-1))
                    if "rows" in name
                    else graph.op("ReduceMax", spread, keepdims=0)
                )
                name = graph.op("Greater", best, graph.constant(np.float32(1.3)))
            values.append(graph.op("Where", name, left, right))
    inputs = [X, FLAG, ("other", TensorProto.BOOL, [1]), MASK, ("rare", TensorProto.BOOL, ["T", 1])]
    return finished(graph, inputs, list(dict.fromkeys(values[-outputs:])))


def check_any(model: ir.Model, seed: int) -> None:
    rng = np.random.default_rng(seed)
    feeds = []
    for count in (0, 1, 4, 4):
        masks = {name: rng.random((count, 1)) < chance for name, chance in (("mask", 0.5), ("rare", 0.1))}
        scalars = {"flag": np.asarray(rng.random() < 0.5), "other": rng.random(1) < 0.5}
        feeds.append({"x": rows(count, seed), **masks, **scalars})
    trial = ir.from_proto(ir.to_proto(model))
    outcome = BranchConditions()(trial)
    refused = [refusal.reason for refusal in outcome.refusals]
    check_rewrite(model, BranchConditions(), rewritten=outcome.rewritten, feeds=feeds, refused=refused)
    for each in feeds:
        assert products(trial, each) <= products(model, each)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.lists(STEPS, min_size=3, max_size=14), st.integers(1, 3), st.integers(0, 99))
def test_any_graph(steps: list[Step], outputs: int, seed: int) -> None:
    check_any(any_graph(steps, outputs), seed)


@pytest.mark.slow
@settings(max_examples=2000, deadline=None, derandomize=True)
@given(st.lists(STEPS, min_size=3, max_size=30), st.integers(1, 3), st.integers(0, 999))
def test_any_graph_sweep(steps: list[Step], outputs: int, seed: int) -> None:
    check_any(any_graph(steps, outputs), seed)


def test_no_races_at_realistic_size() -> None:
    """Two threads, several parts of which some run, the same answer every time."""
    graph = Graph()
    width = 512
    hidden = "x"
    for depth in range(4):
        inner = graph.op("Relu", graph.op("MatMul", hidden, graph.weight(width, width)))
        changed = graph.op("MatMul", inner, graph.weight(width, width))
        hidden = graph.op("Where", f"mask{depth}", changed, hidden)
    names = [f"mask{depth}" for depth in range(4)]
    inputs: list[Input] = [(name, TensorProto.BOOL, ["T", 1]) for name in names]
    model = finished(graph, [("x", TensorProto.FLOAT, ["T", width]), *inputs], [hidden])
    rng = np.random.default_rng(0)
    feeds = {"x": rng.standard_normal((256, width)).astype(np.float32)}
    feeds |= {
        name: rng.random((256, 1)) < chance for name, chance in zip(names, (0.5, 0, 1, 0.01), strict=True)
    }
    after, _ = check_rewrite(model, BranchConditions(), rewritten=4)
    expected = run_model(model, feeds)[0]
    results = [run_model(after, feeds, threads=2)[0] for _ in range(4)]
    for result in results:
        assert_close(expected, result, 2e-6)
        np.testing.assert_array_equal(result, results[0])
    assert products(after, feeds) == 6
