"""Experts of any body on their own rows only: exact for every routing, cold experts skipped, refused where rows mix."""

from __future__ import annotations

import collections

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from any_body import Graph, Written, dense_model, outlined, routing
from bodies_of_experts import BODIES, conv, linear
from executed import executed
from harness import assert_close, check_rewrite, run_model
from onnx import TensorProto, helper

from sparse_onnx.blocks import combine_blocks
from sparse_onnx.blocks.lowered import lowered_blocks
from sparse_onnx.blocks.lowering import Form, want
from sparse_onnx.passes.route_experts import RouteExperts


def neutral(written: Written) -> ir.Model:
    model, shop = outlined(written)
    assert shop.rewritten == 1, shop.refusals
    return model


def feeds_of(
    written: Written, sizes: dict[str, int] | None = None, empty: bool = True
) -> list[dict[str, np.ndarray]]:
    counts = [(0, 3), (1, 1), (2, 5)] if written.leading == 2 else [0, 1, 7]
    kinds = ("random", "one", "dropped")
    return [routing(written, count, kind, sizes) for count in counts[not empty :] for kind in kinds]


@pytest.mark.parametrize("name", BODIES)
def test_bodies(name: str) -> None:
    body = BODIES[name]
    written = dense_model(body.write, body.row, body.out, lead=body.lead, opset=body.opset)
    model = neutral(written)
    feeds = feeds_of(written, body.sizes, body.empty)
    after, _ = check_rewrite(model, RouteExperts(), rewritten=1, feeds=feeds, tolerance=3e-6)
    for each in feeds:  # the dense original, too: both sides above come from the same function
        assert_close(run_model(written.ir(), each)[0], run_model(after, each, threads=2)[0], 3e-6)
    none = feeds_of(written, body.sizes)[0]
    assert run_model(after, none)[0].size == 0, "no tokens, though the original may not run on none"
    ops = collections.Counter(node.op_type for node in after.graph)
    assert ops["If"] == (4 if body.guarded else 0)
    assert not any(op.startswith("Expert_") for op in ops) and ops["Combine"] == 0


def test_only_experts_with_rows_compute() -> None:
    """What a cold expert would compute is poison: its weights are NaN."""

    def write(graph: Graph, x: str, expert: int) -> str:
        hidden = linear(graph, x, 16, 16)
        return graph.op("Mul", hidden, graph.constant(np.float32(np.nan if expert == 1 else 1)))

    written = dense_model(write, experts=3, top_k=1)
    after = neutral(written)
    RouteExperts()(after)
    feeds = routing(written, 6)
    feeds["index"][:] = np.asarray([[0], [2], [0], [3], [2], [2]])
    assert np.isfinite(run_model(after, feeds)[0]).all()
    feeds["index"][1] = 1
    assert np.isnan(run_model(after, feeds)[0][1]).all()


def test_different_bodies_in_one_block() -> None:
    def write(graph: Graph, x: str, expert: int) -> str:
        if expert == 0:
            return graph.op("Identity", x)
        if expert == 1:
            return conv(graph, graph.op("Relu", conv(graph, x, 4, 9)), 9, 4, 1)
        return graph.op("GroupNormalization", x, graph.vector(4), graph.vector(4), num_groups=expert)

    written = dense_model(write, (4, 5, 5), experts=3, opset=21)
    after, _ = check_rewrite(
        neutral(written), RouteExperts(), rewritten=1, feeds=feeds_of(written, empty=False)
    )
    assert sum(node.op_type == "If" for node in after.graph) == 1


def test_results_of_one_module_share_the_dispatch() -> None:
    def write(graph: Graph, x: str, expert: int) -> tuple[str, str, str]:
        hidden = graph.op("Tanh", linear(graph, x, 16, 16))
        return linear(graph, hidden, 16, 16), graph.op("Softmax", hidden), hidden

    written = dense_model(write, experts=5)
    after, _ = check_rewrite(neutral(written), RouteExperts(), rewritten=3, feeds=feeds_of(written))
    ops = collections.Counter(node.op_type for node in after.graph)
    assert ops["MatMul"] == 10 + 3 and ops["Split"] == 1
    first, second, third = lowered_blocks(after)
    assert (first.kind, first.activation, first.gated, first.form) == ("moe", None, False, "grouped")
    assert first.parameters == 5 * 2 * (256 + 16) and first.active_parameters == 2 * 2 * (256 + 16)
    assert second.parameters == third.parameters == 0
    assert (first.experts, first.top_k, first.hidden, first.inner) == (5, 2, 16, None)


def test_one_expert() -> None:
    def write(graph: Graph, x: str, expert: int) -> str:
        return graph.op("Tanh", linear(graph, x, 16, 16))

    written = dense_model(write, experts=1, top_k=1)
    check_rewrite(neutral(written), RouteExperts(), rewritten=1, feeds=feeds_of(written))


def test_two_blocks_in_a_row() -> None:
    """The second one's tokens are what the first one gives."""

    def write(graph: Graph, x: str, expert: int) -> str:
        return graph.op("Tanh", linear(graph, x, 16, 16))

    first = dense_model(write)
    proto = ir.to_proto(neutral(first))
    again = onnx.compose.add_prefix(proto, "b/", rename_functions=False)
    again.graph.node[-1].output[0] = "b/out"
    graph = proto.graph
    for node in again.graph.node:
        for at, name in enumerate(node.input):
            node.input[at] = {"b/x": graph.output[0].name, "b/index": "index", "b/weight": "weight"}.get(
                name, name
            )
        for entry in node.metadata_props:
            entry.value = f"b/{entry.value}"
    graph.node.extend(again.graph.node)
    graph.initializer.extend(again.graph.initializer)
    graph.value_info.extend([*again.graph.value_info, graph.output[0]])
    del graph.output[:]
    graph.output.append(helper.make_tensor_value_info("b/out", TensorProto.FLOAT, ["T", 16]))
    check_rewrite(ir.from_proto(proto), RouteExperts(), rewritten=2, feeds=feeds_of(first))


def _put_in_a_branch(written: Written) -> None:
    """All nodes into an If body; its weights stay in the graph around it."""
    graph = written.model.graph
    name = graph.output[0].name
    branches = []
    for kind, nodes in (
        ("then", list(graph.node)),
        ("else", [helper.make_node("Neg", ["x"], ["negative"], "n")]),
    ):
        result = helper.make_tensor_value_info(
            name if kind == "then" else "negative", TensorProto.FLOAT, ["T", 16]
        )
        branches.append(helper.make_graph(nodes, kind, [], [result]))
    del graph.node[:]
    choice = helper.make_node(
        "If", ["use"], ["out"], "choice", then_branch=branches[0], else_branch=branches[1]
    )
    graph.node.append(choice)
    graph.input.append(helper.make_tensor_value_info("use", TensorProto.BOOL, []))
    graph.output[0].name = "out"


def test_inside_a_branch() -> None:
    """A block in an If body reads weights of the graph around it."""
    written = dense_model(BODIES["einsum"].write)
    _put_in_a_branch(written)
    feeds = [routing(written, 7) | {"use": np.asarray(use)} for use in (True, False)]
    check_rewrite(neutral(written), RouteExperts(), rewritten=1, feeds=feeds)


def _mixing(model: ir.Model) -> None:
    """The body of the saved file mixes rows, whatever the recogniser proved once."""
    function = next(each for each in model.functions.values() if each.name.startswith("Expert_"))
    axis = ir.node("Constant", [], {"value_ints": [0]})
    axis.outputs[0].name = "axis"
    mean = ir.node("ReduceMean", [function.outputs[0], axis.outputs[0]])
    mean.outputs[0].name = "mean"
    less = ir.node("Sub", [function.outputs[0], mean.outputs[0]])
    less.outputs[0].name = "less"
    function.extend([axis, mean, less])
    function.outputs[0] = less.outputs[0]


def _read_elsewhere(model: ir.Model) -> None:
    call = next(node for node in model.graph if node.op_type.startswith("Expert_"))
    value = call.outputs[0]
    value.shape = ir.Shape(["T", 16])
    model.graph.outputs.append(value)


def _computed_stack(model: ir.Model) -> None:
    combine = next(node for node in model.graph if node.op_type == "Combine")
    negative = ir.node("Neg", [combine.inputs[2]], name="negative")
    negative.outputs[0].name, negative.outputs[0].type = "negative", combine.inputs[2].type
    model.graph.insert_before(combine, negative)
    combine.replace_input_with(2, negative.outputs[0])


def _other_tokens(model: ir.Model) -> None:
    call = [node for node in model.graph if node.op_type.startswith("Expert_")][-1]
    negative = ir.node("Neg", [call.inputs[0]], name="negative")
    negative.outputs[0].name = "negative"
    model.graph.insert_before(call, negative)
    call.replace_input_with(0, negative.outputs[0])


def _open_slots(model: ir.Model) -> None:
    for value in model.graph.inputs[1:]:
        value.shape = ir.Shape(["T", "K"])


REFUSED = {
    "a body that mixes rows": (
        _mixing,
        "expert 0 is not known to treat its rows one by one: operator ReduceMean",
    ),
    "a result that leaves the graph": (
        _read_elsewhere,
        "the result of an expert for all rows leaves the graph",
    ),
    "a stack that is computed": (_computed_stack, "its experts are not calls on the same rows"),
    "calls on other rows": (_other_tokens, "its experts are not calls on the same rows"),
    "unknown k": (_open_slots, "the number of experts of a token is not known"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str) -> None:
    change, reason = REFUSED[name]
    model = neutral(dense_model(BODIES["three layers"].write))
    change(model)
    before = ir.to_proto(model).SerializeToString(deterministic=True)
    check_rewrite(model, RouteExperts(), rewritten=0, refused=[reason])
    RouteExperts()(model)
    assert ir.to_proto(model).SerializeToString(deterministic=True) == before


def wanted_in(model: ir.Model, *forms: str) -> ir.Model:
    for block in combine_blocks(model):
        want(block.node, [Form.parse(form) for form in forms])
    return model


@pytest.mark.parametrize("name", BODIES)
def test_bodies_in_branches(name: str) -> None:
    """Every expert behind an If, where the sizes that a cold one gives are known; else as without one."""
    body = BODIES[name]
    written = dense_model(body.write, body.row, body.out, lead=body.lead, opset=body.opset)
    model = wanted_in(neutral(written), "branched", "grouped")
    feeds = feeds_of(written, body.sizes, body.empty)
    known = all(isinstance(size, int) for size in body.out or body.row)
    refused = [] if known else ["expert 0 is to be skipped, and the sizes of its results are not known"]
    after, _ = check_rewrite(model, RouteExperts(), rewritten=1, feeds=feeds, refused=refused, tolerance=3e-6)
    branches = [node for node in after.graph if node.op_type == "If"]
    assert len(branches) == (4 if known or body.guarded else 0)
    [record] = lowered_blocks(after)
    assert record.form == ("branched" if known else "grouped")
    for node in branches:
        for branch in ("then_branch", "else_branch"):
            for value in node.attributes[branch].as_graph().outputs:
                assert value.type is not None and value.shape is not None


def test_a_cold_branch_runs_nothing() -> None:
    def write(graph: Graph, x: str, expert: int) -> tuple[str, str]:
        hidden = graph.op("Tanh", linear(graph, x, 16, 16))
        return linear(graph, hidden, 16, 16), graph.op("Softmax", hidden)

    written = dense_model(write, experts=5, top_k=1)
    model = wanted_in(neutral(written), "branched")
    after, _ = check_rewrite(model, RouteExperts(), rewritten=2, feeds=feeds_of(written))
    assert sum(node.op_type == "If" for node in after.graph) == 5, "both results from one branch"
    assert [record.form for record in lowered_blocks(after)] == ["branched", "branched"]
    feeds = routing(written, 6)
    feeds["index"][:] = np.asarray([[1], [3], [1], [5], [3], [3]])
    ran = executed(after, feeds)
    assert (ran["Tanh"], ran["Softmax"]) == (2, 2)
    feeds["index"][:] = 5
    assert executed(after, feeds)["Tanh"] == 0


def test_a_block_that_is_wanted_in_other_forms_only() -> None:
    written = dense_model(BODIES["three layers"].write)
    _, outcome = check_rewrite(wanted_in(neutral(written), "dense"), RouteExperts(), rewritten=0)
    assert outcome.matched == 0
    model = wanted_in(neutral(written), "fused", "branched")
    after, _ = check_rewrite(model, RouteExperts(), rewritten=1, feeds=feeds_of(written))
    assert lowered_blocks(after)[0].form == "branched", "nobody makes a fused operator of any body"


def test_branches_in_a_body_are_refused() -> None:
    """Their weights would lie two graphs out; the next form takes the block."""
    written = dense_model(BODIES["three layers"].write)
    _put_in_a_branch(written)
    feeds = [routing(written, 7) | {"use": np.asarray(use)} for use in (True, False)]
    model = wanted_in(neutral(written), "branched", "grouped")
    after, _ = check_rewrite(
        model, RouteExperts(), rewritten=1, feeds=feeds, refused=["it stands in the body of an If"]
    )
    assert lowered_blocks(after)[0].form == "grouped"


def test_a_body_that_mixes_rows_is_refused_once() -> None:
    model = neutral(dense_model(BODIES["three layers"].write))
    _mixing(model)
    wanted_in(model, "branched", "grouped")
    check_rewrite(model, RouteExperts(), rewritten=0, refused=["expert 0 is not known to treat its rows"])


def test_open_sizes_behind_a_guard_are_refused() -> None:
    body = BODIES["group norm"]
    model = neutral(dense_model(body.write, (4, "H", "W"), opset=21))
    check_rewrite(model, RouteExperts(), rewritten=0, refused=["expert 0 cannot run on 0 rows"])


def test_no_races_at_realistic_size() -> None:
    """Two threads, images large enough for ORT to divide them, the same answer every time."""

    def write(graph: Graph, x: str, expert: int) -> str:
        return graph.op("Add", x, conv(graph, graph.op("Relu", conv(graph, x, 16, 32)), 32, 16))

    written = dense_model(write, (16, 24, 24), experts=6)
    model = neutral(written)
    feeds = routing(written, 16)
    expected = run_model(written.ir(), feeds)[0]
    RouteExperts()(model)
    results = [run_model(model, feeds, threads=2)[0] for _ in range(3)]
    for result in results:
        assert_close(expected, result, 3e-6)
        np.testing.assert_array_equal(result, results[0])
