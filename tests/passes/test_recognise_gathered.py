"""Experts gathered for each slot: spellings that are found, and blocks with one thing changed, which are refused."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper
from spoiling import Change, D, Draft, E, K, N, recognised, refused, silent, weights

from sparse_onnx.graph.infer import infer
from sparse_onnx.passes.recognise_gathered import RecogniseGathered

PASS = RecogniseGathered()


def block() -> Draft:
    """transformers' batched experts with biases, one slot a row."""
    g = Draft(constants=weights())
    g.add("logits", "MatMul", "x", "router")
    g.add("scores", "Softmax", "logits", axis=-1)
    g.add("values", "TopK", "scores", g.ints(K), axis=-1)
    g.add("ids", "Reshape", "values_index", g.ints(-1))
    g.add("x3", "Unsqueeze", "x", g.ints(1))
    g.add("wide", "Expand", "x3", g.ints(1, K, 1))
    g.add("rows", "Reshape", "wide", g.ints(-1, D))
    g.add("column", "Unsqueeze", "rows", g.ints(-1))
    g.add("g1", "Gather", "w1", "ids", axis=0)
    g.add("p1", "MatMul", "g1", "column")
    g.add("s1", "Squeeze", "p1", g.ints(-1))
    g.add("gb1", "Gather", "b1", "ids", axis=0)
    g.add("h1", "Add", "s1", "gb1")
    g.add("act", "Relu", "h1")
    g.add("column2", "Unsqueeze", "act", g.ints(-1))
    g.add("g2", "Gather", "w2", "ids", axis=0)
    g.add("p2", "MatMul", "g2", "column2")
    g.add("s2", "Squeeze", "p2", g.ints(-1))
    g.add("gb2", "Gather", "b2", "ids", axis=0)
    g.add("out", "Add", "s2", "gb2")
    g.add("weight", "Reshape", "values", g.ints(-1, 1))
    g.add("weighted", "Mul", "out", "weight")
    g.add("slots", "Reshape", "weighted", g.ints(-1, K, D))
    g.add("y", "ReduceSum", "slots", g.ints(1), keepdims=0)
    return g


def einsums() -> Draft:
    """gpt-fast: slots on two axes, a token broadcast over its slots."""
    g = Draft(constants=weights())
    g.add("logits", "MatMul", "x", "router")
    g.add("values", "TopK", "logits", g.ints(K), axis=-1)
    g.add("share", "Softmax", "values", axis=-1)
    g.add("g1", "Gather", "w1", "values_index", axis=0)
    g.add("h1", "Einsum", "x", "g1", equation="ti,taoi->tao")
    g.add("act", "Relu", "h1")
    g.add("g2", "Gather", "w2", "values_index", axis=0)
    g.add("out", "Einsum", "g2", "act", equation="taio, tao -> tai")
    g.add("y", "Einsum", "share", "out", equation="ta,tai->ti")
    return g


def test_found_as_it_is_written() -> None:
    found = recognised(block().build(), PASS)
    assert (found.experts, found.top_k, found.hidden, found.inner) == (E, K, D, N)
    assert found.expert_index.name == "values_index"


def tiled(g: Draft) -> None:
    g.nodes["wide"] = ("Tile", ["x3", g.ints(1, K, 1)], {})


def rows_taken(g: Draft) -> None:
    g.constants |= {"zero": np.array(0, np.int64), "one": np.array(1, np.int64)}
    g.before("rows", "count", "Size", "values_index")
    g.before("rows", "pairs", "Range", "zero", "count", "one")
    g.before("rows", "halves", "Div", "pairs", g.ints(K))
    g.nodes["rows"] = ("Gather", ["x", "halves"], {"axis": 0})


def turned(g: Draft) -> None:
    """The row on the left, and the matrix turned; the bias on the left of its Add."""
    g.nodes["column"] = ("Unsqueeze", ["rows", g.ints(1)], {})
    g.before("p1", "t1", "Transpose", "g1", perm=[0, 2, 1])
    g.nodes["p1"] = ("MatMul", ["column", "t1"], {})
    g.nodes["s1"] = ("Reshape", ["p1", g.ints(-1, N)], {})
    g.nodes["h1"] = ("Add", ["gb1", "s1"], {})


def gather_nd(g: Draft) -> None:
    g.before("g1", "nd", "Unsqueeze", "ids", g.ints(-1))
    for name, data in (("g1", "w1"), ("gb1", "b1"), ("g2", "w2"), ("gb2", "b2")):
        g.nodes[name] = ("GatherND", [data, "nd"], {})


def summed_by_matmul(g: Draft) -> None:
    g.nodes["slots"] = ("Reshape", ["out", g.ints(-1, K, D)], {})
    g.nodes["weight"] = ("Unsqueeze", ["values", g.ints(1)], {})
    del g.nodes["weighted"], g.nodes["y"]
    g.add("sum", "MatMul", "weight", "slots")
    g.add("y", "Squeeze", "sum", g.ints(1))


def summed_by_turned_matmul(g: Draft) -> None:
    summed_by_matmul(g)
    g.before("sum", "turned", "Transpose", "slots", perm=[0, 2, 1])
    g.nodes["weight"] = ("Unsqueeze", ["values", g.ints(-1)], {})
    g.nodes["sum"] = ("MatMul", ["turned", "weight"], {})
    g.nodes["y"] = ("Squeeze", ["sum", g.ints(-1)], {})


def one_expert_a_token(g: Draft) -> None:
    g.nodes["values"] = ("TopK", ["scores", g.ints(1)], {"axis": -1})
    g.nodes["column"] = ("Unsqueeze", ["x", g.ints(-1)], {})
    g.nodes["y"] = ("Identity", ["weighted"], {})
    del g.nodes["slots"]


def no_bias(g: Draft) -> None:
    g.rewire("act", "h1", "s1")
    g.rewire("weighted", "out", "s2")


def halves_of_columns(g: Draft) -> None:
    """SwiGLU split while the rows are still columns, without biases."""
    no_bias(g)
    g.constants["w1"] = np.random.default_rng(1).standard_normal((E, 2 * N, D)).astype(np.float32)
    g.before("column2", "cut", "Identity", "p1")
    g.split("cut", "p1", "gate", "up", axis=1)
    g.before("column2", "slope", "Sigmoid", "gate")
    g.before("column2", "silu", "Mul", "gate", "slope")
    g.nodes["column2"] = ("Mul", ["silu", "up"], {})


def turned_slots(g: Draft) -> None:
    """Ids of all first choices before those of the second: of other tokens, but K for each."""
    g.before("ids", "by_slot", "Transpose", "values_index", perm=[1, 0])
    g.rewire("ids", "values_index", "by_slot")


FOUND: list[Change] = [
    tiled,
    rows_taken,
    turned,
    gather_nd,
    summed_by_matmul,
    summed_by_turned_matmul,
    one_expert_a_token,
    no_bias,
    halves_of_columns,
    turned_slots,
]


@pytest.mark.parametrize("change", FOUND)
def test_found_in_other_words(change: Change) -> None:
    draft = block()
    change(draft)
    recognised(draft.build(), PASS)


@pytest.mark.parametrize(
    ("name", "equation"),
    [("h1", "td,tkod->tko"), ("out", "abcd,abd->abc"), ("y", "zk,zkd->zd")],
)
def test_found_with_einsums(name: str, equation: str) -> None:
    draft = einsums()
    draft.nodes[name] = ("Einsum", draft.nodes[name][1], {"equation": equation})
    recognised(draft.build(), PASS)


def test_ids_from_the_end_are_counted_from_the_front() -> None:
    draft = block()
    draft.constants["minus"] = np.array(E, np.int64)
    draft.before("ids", "negative", "Sub", "values_index", "minus")
    draft.rewire("ids", "values_index", "negative")
    recognised(draft.build(), PASS)


def test_found_in_a_body() -> None:
    inner = ir.to_proto(block().build()).graph
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, ["T", D]) for name in "xy")
    body = helper.make_graph(list(inner.node), "body", [], [y], list(inner.initializer))
    other = helper.make_graph([helper.make_node("Neg", ["x"], ["y"])], "other", [], [y])
    graph = helper.make_graph(
        [helper.make_node("If", ["yes"], ["z"], then_branch=body, else_branch=other, name="choice")],
        "main",
        [x, helper.make_tensor_value_info("yes", TensorProto.BOOL, [])],
        [helper.make_tensor_value_info("z", TensorProto.FLOAT, ["T", D])],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    read = ir.from_proto(model)
    infer(read)
    recognised(read, PASS, yes=np.array(True))


def other_ids(target: str) -> Change:
    def change(g: Draft) -> None:
        g.before(target, "later", "TopK", "logits", g.ints(K), axis=-1, largest=0)
        g.before(target, "other", "Reshape", "later_index", g.ints(-1))
        g.rewire(target, "ids", "other")

    return change


def copies_after_one_another(g: Draft) -> None:
    g.nodes["rows"] = ("Tile", ["x", g.ints(K, 1)], {})


def elements_repeated(g: Draft) -> None:
    g.nodes["x3"] = ("Unsqueeze", ["x", g.ints(-1)], {})
    g.nodes["wide"] = ("Expand", ["x3", g.ints(1, 1, K)], {})


def summed_over_tokens(g: Draft) -> None:
    g.nodes["slots"] = ("Reshape", ["weighted", g.ints(K, -1, D)], {})
    g.nodes["y"] = ("ReduceSum", ["slots", g.ints(0)], {"keepdims": 0})


def weighted_twice(g: Draft) -> None:
    g.before("slots", "again", "Mul", "weighted", "weight")
    g.rewire("slots", "weighted", "again")


def weights_of_slots_alone(g: Draft) -> None:
    g.constants["fixed"] = np.linspace(0.5, 1, K, dtype=np.float32).reshape(1, K, 1)
    g.nodes["slots"] = ("Reshape", ["out", g.ints(-1, K, D)], {})
    g.before("y", "scaled", "Mul", "slots", "fixed")
    del g.nodes["weighted"]
    g.rewire("y", "slots", "scaled")


def weight_of_one_token(g: Draft) -> None:
    g.before("weight", "first", "Slice", "values", g.ints(0), g.ints(1), g.ints(0))
    g.nodes["weight"] = ("Unsqueeze", ["first", g.ints(-1)], {})
    g.nodes["slots"] = ("Reshape", ["out", g.ints(-1, K, D)], {})
    del g.nodes["weighted"]
    g.before("y", "scaled", "Mul", "slots", "weight")
    g.rewire("y", "slots", "scaled")


def weights_along_the_outputs(g: Draft) -> None:
    g.constants["columns"] = np.linspace(0, 1, D, dtype=np.float32).reshape(1, D)
    g.nodes["weight"] = ("Mul", ["columns", "columns"], {})


def computed_weights(g: Draft) -> None:
    g.before("g2", "w2_now", "Mul", "w2", "scale")
    g.inputs["scale"] = [1]
    g.rewire("g2", "w2", "w2_now")


def output_read_elsewhere(g: Draft) -> None:
    g.outputs.append("weighted")


def hidden_read_elsewhere(g: Draft) -> None:
    g.add("seen", "ReduceMax", "act", keepdims=0)
    g.outputs.append("seen")


def mean_taken_off(g: Draft) -> None:
    g.before("column2", "mean", "ReduceMean", "act", g.ints(0), keepdims=1)
    g.before("column2", "centred", "Sub", "act", "mean")
    g.rewire("column2", "act", "centred")


def unweighted(g: Draft) -> None:
    g.rewire("slots", "weighted", "out")


def three_slots_summed(g: Draft) -> None:
    g.nodes["slots"] = ("Reshape", ["weighted", g.ints(-1, 2 * K, D)], {})


def bias_of_the_first_expert(g: Draft) -> None:
    g.nodes["gb2"] = ("Gather", ["b2", g.ints(0)], {"axis": 0})


NEAR: list[tuple[Change, str]] = [
    (other_ids("g1"), "of the same expert"),
    (other_ids("gb1"), "the bias of"),
    (other_ids("g2"), "of the same expert"),
    (copies_after_one_another, "is not proved to read token s // K"),
    (elements_repeated, "is not proved to read token s // K"),
    (summed_over_tokens, "sums over another axis"),
    (weighted_twice, "a second weight"),
    (weights_of_slots_alone, "one weight for each index"),
    (weight_of_one_token, "one weight for each index"),
    (weights_along_the_outputs, "is not one weight a slot"),
    (computed_weights, "are not constant"),
    (output_read_elsewhere, "leave the graph"),
    (hidden_read_elsewhere, "used elsewhere"),
    (mean_taken_off, "ReduceMean"),
    (unweighted, "without a weight"),
    (three_slots_summed, "4 slots are summed"),
    (bias_of_the_first_expert, "the bias of"),
]


@pytest.mark.parametrize(
    ("change", "says"), NEAR, ids=[f"{change.__name__}-{n}" for n, (change, _) in enumerate(NEAR)]
)
def test_refused(change: Change, says: str) -> None:
    draft = block()
    change(draft)
    refused(draft.build(), PASS, says)


@pytest.mark.parametrize("equation", ["ta,tai->ai", "ta,tai->tai", "tb,tai->ti"])
def test_refused_einsum(equation: str) -> None:
    draft = einsums()
    draft.nodes["y"] = ("Einsum", draft.nodes["y"][1], {"equation": equation})
    refused(draft.build(), PASS, "sum")


def test_one_gathered_matrix_is_a_lookup() -> None:
    g = Draft(constants=weights())
    g.constants["table"] = np.random.default_rng(0).standard_normal((E, D, D)).astype(np.float32)
    g.add("logits", "MatMul", "x", "router")
    g.add("ids", "ArgMax", "logits", axis=-1, keepdims=0)
    g.add("row", "Unsqueeze", "x", g.ints(1))
    g.add("matrix", "Gather", "table", "ids", axis=0)
    g.add("product", "MatMul", "row", "matrix")
    g.add("y", "Squeeze", "product", g.ints(1))
    silent(g.build(), PASS)
