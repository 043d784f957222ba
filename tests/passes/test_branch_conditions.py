"""Parts behind a Where become branches: the same numbers, and really skipped."""

from __future__ import annotations

import collections

import numpy as np
import onnx_ir as ir
import pytest
from any_block import routing
from any_body import Graph
from builders import Shape, routed_model
from conditional_graphs import (
    FLAG,
    MASK,
    WIDTH,
    Input,
    X,
    finished,
    flags,
    layer,
    masks,
    products,
    rows,
    sure,
)
from executed import executed
from harness import assert_close, check_rewrite, run_model
from onnx import TensorProto, helper
from quantized_blocks import Storage, quantized_model

from sparse_onnx.passes.branch_conditions import BranchConditions
from sparse_onnx.passes.fuse_gating import FuseGating


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


def test_a_modality_that_some_samples_lack() -> None:
    """One flag a sample, and a constant for those that lack it."""
    graph = Graph()
    seen = layer(graph, graph.op("Unsqueeze", "x", graph.ints(1)))
    has = graph.op("Unsqueeze", "mask", graph.ints(2))
    model = finished(graph, [X, MASK], [graph.op("Where", has, seen, graph.vector(WIDTH))])
    after, _ = check_rewrite(model, BranchConditions(), rewritten=1, feeds=masks())
    assert [products(after, each) for each in masks()] == [1, 1, 0, 0, 1]


def test_a_mixture_of_depths() -> None:
    """A layer runs where any token takes it."""
    graph = Graph()
    y = graph.op("Where", "mask", graph.op("Add", "x", layer(graph, layer(graph, "x"))), "x")
    model = finished(graph, [X, MASK], [y])
    after, _ = check_rewrite(model, BranchConditions(), rewritten=1, feeds=masks())
    assert [products(after, each) for each in masks()] == [2, 2, 0, 0, 2]


@pytest.mark.parametrize(("first", "second"), [(8, 8), (8, 1), (1, 8)])
def test_a_mask_with_two_sides(first: int, second: int) -> None:
    """A mask without elements takes neither side: one runs all the same, for the sizes that both have."""
    graph = Graph()
    sides = [layer(graph, layer(graph, "x"), first), layer(graph, "x", second)]
    model = finished(graph, [X, MASK], [graph.op("Where", "mask", *sides)])
    after, _ = check_rewrite(model, BranchConditions(), rewritten=1, feeds=masks())
    assert [products(after, each) for each in masks()][:4] == [3, 2, 1, 1]


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


@pytest.mark.parametrize("view", [False, True])
def test_a_condition_computed_under_another(view: bool) -> None:
    """What the inner condition rules reads nothing that is computed with it, and still waits for it."""
    graph = Graph()
    stop = sure(graph, "x", "bound")
    stop = graph.op("Unsqueeze", stop, graph.ints(0)) if view else stop
    inner = graph.op("Where", stop, "x", layer(graph, layer(graph, "x")))
    model = finished(
        graph,
        [X, FLAG, ("bound", TensorProto.FLOAT, [])],
        [graph.op("Where", "flag", "x", graph.op("Neg", inner))],
    )
    feeds = [each | {"bound": np.asarray(bound, np.float32)} for each in flags() for bound in (-1e9, 1e9)]
    after, _ = check_rewrite(model, BranchConditions(), rewritten=2, feeds=feeds)
    assert [products(after, each) for each in feeds] == [0, 0, 1, 3]


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


def test_a_condition_within_itself() -> None:
    """The inner Where stands on one side and reads, without ever taking it, what the other side computes."""
    graph = Graph()
    other = layer(graph, "x")
    inner = graph.op("Where", "flag", graph.op("Neg", layer(graph, "x")), other)
    y = graph.op("Where", "flag", graph.op("Abs", inner), layer(graph, other))
    model = finished(graph, [X, FLAG], [y])
    after, _ = check_rewrite(model, BranchConditions(), rewritten=2, feeds=flags())
    assert [products(after, each) for each in flags()] == [1, 2]


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


def test_quantized_weights_of_a_neutral_block_stay_outside() -> None:
    """The block's lowering puts each expert's part beside them; in the branch ORT would hold them twice."""
    shape = Shape(hidden=32, inner=48)
    model = quantized_model(shape, Storage())
    y, tokens = model.graph.outputs[0], model.graph.inputs[0]
    flag = ir.Value(name="flag", type=ir.TensorType(ir.DataType.BOOL), shape=ir.Shape([]))
    model.graph.inputs.append(flag)
    where = ir.node("Where", [flag, y, tokens], name="choice")
    where.outputs[0].name, where.outputs[0].type, where.outputs[0].shape = "z", y.type, y.shape
    model.graph.append(where)
    model.graph.outputs[:] = [where.outputs[0]]
    feeds = [routing(shape, 5, "random") | {"flag": np.asarray(taken)} for taken in (True, False)]
    after, _ = check_rewrite(model, BranchConditions(), rewritten=1, feeds=feeds)
    assert sum(node.op_type == "DequantizeLinear" for node in after.graph) == 2
    lowered, _ = check_rewrite(after, FuseGating(), rewritten=1, feeds=feeds)
    assert [executed(lowered, each)["MatMulNBits"] for each in feeds] == [8, 0]
    held = {name for graph in lowered.graphs() if graph is not lowered.graph for name in graph.initializers}
    assert "fc1.0" in lowered.graph.initializers and not any(name.startswith("fc") for name in held)


def test_a_body_reads_what_leaves_its_branch() -> None:
    graph = Graph()
    hidden = layer(graph, "x")
    value = helper.make_tensor_value_info
    inner = [helper.make_node("Add", ["h", hidden], ["h2"]), helper.make_node("Identity", ["go"], ["go2"])]
    inputs = [value("i", TensorProto.INT64, []), value("go", TensorProto.BOOL, [])]
    body = helper.make_graph(
        inner,
        "body",
        [*inputs, value("h", TensorProto.FLOAT, ["T", WIDTH])],
        [value("go2", TensorProto.BOOL, []), value("h2", TensorProto.FLOAT, ["T", WIDTH])],
    )
    looped = graph.op("Loop", graph.constant(np.asarray(3)), "", "x", body=body)
    chosen = [graph.op("Where", "mask", each, "x") for each in (hidden, looped)]
    model = finished(graph, [X, MASK], chosen)
    for node in model.graph:
        node.outputs[0].shape = ir.Shape(["T", WIDTH])
    after, _ = check_rewrite(model, BranchConditions(), rewritten=2, feeds=masks())
    assert [executed(after, each)["Loop"] for each in masks()[:3]] == [1, 1, 0]


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
