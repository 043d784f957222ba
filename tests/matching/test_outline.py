"""Experts of any body become calls: exact for every routing, one function a body, refused where rows mix."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from any_body import Graph, Written, dense_model, outlined, routing
from bodies_of_experts import BODIES, linear
from harness import assert_close, run_model
from onnx import TensorProto, helper

from sparse_onnx.blocks import combine_blocks
from sparse_onnx.matching.block import Workshop
from sparse_onnx.matching.outline import shared_entry


def exact(written: Written, model: ir.Model, sizes: dict[str, int] | None = None, empty: bool = True) -> None:
    """The outlined model is valid, and the same function."""
    onnx.checker.check_model(ir.to_proto(model), full_check=True)
    counts = [(0, 3), (1, 1), (2, 5)] if written.leading == 2 else [0, 1, 7]
    for count in counts if empty else counts[1:]:
        for kind in ("random", "one", "dropped"):
            feeds = routing(written, count, kind, sizes)
            for left, right in zip(run_model(written.ir(), feeds), run_model(model, feeds), strict=True):
                assert_close(left, right, 3e-6)


def functions(model: ir.Model) -> list[str]:
    return [function.name for function in model.functions.values() if function.name.startswith("Expert_")]


def unchanged(written: Written, shop: Workshop) -> bool:
    """Whether the graph is as it was, but for what `attach_functions` never adds here."""
    return ir.to_proto(shop.model).SerializeToString(deterministic=True) == ir.to_proto(
        written.ir()
    ).SerializeToString(deterministic=True)


@pytest.mark.parametrize("name", BODIES)
def test_bodies(name: str) -> None:
    body = BODIES[name]
    written = dense_model(body.write, body.row, body.out, lead=body.lead, opset=body.opset)
    model, shop = outlined(written)
    assert not shop.refusals, shop.refusals
    exact(written, model, body.sizes, body.empty)
    assert len(functions(model)) == 1
    [block] = combine_blocks(model)
    assert (block.experts, block.top_k, block.spelling) == (4, 2, "test")
    assert not any(node.op_type == "Equal" for node in model.graph), "the masks are gone"


def test_one_function_for_each_body_and_weights_as_inputs() -> None:
    def write(graph: Graph, x: str, expert: int) -> str:
        hidden = linear(graph, x, 16, 8 if expert == 2 else 16)
        hidden = graph.op("Tanh" if expert != 3 else "Softplus", hidden)
        return linear(graph, hidden, 8 if expert == 2 else 16, 16)

    written = dense_model(write, experts=5)
    model, shop = outlined(written)
    assert shop.rewritten == 1
    exact(written, model)
    called = [node.op_type for node in model.graph if node.op_type.startswith("Expert_")]
    assert len(called) == 5 and len(set(called)) == 3 == len(functions(model))
    assert called[0] == called[1] == called[4]
    [block] = combine_blocks(model)
    assert block.parameters == 4 * (2 * 16 * 16 + 32) + (2 * 16 * 8 + 8 + 16)


def test_attributes_and_small_constants_make_a_body() -> None:
    def write(graph: Graph, x: str, expert: int) -> str:
        low = graph.constant(np.float32(-0.5 if expert < 2 else -0.25))
        cut = graph.op("Clip", linear(graph, x, 16, 16), low, graph.constant(np.float32(0.5)))
        return graph.op("LeakyRelu", cut, alpha=0.1 if expert != 1 else 0.2)

    written = dense_model(write)
    model, shop = outlined(written)
    assert shop.rewritten == 1
    exact(written, model)
    assert len(functions(model)) == 2, "the slope is an attribute; the bound is an input, since it differs"


def test_a_module_with_several_results() -> None:
    def write(graph: Graph, x: str, expert: int) -> tuple[str, str]:
        hidden = graph.op("Tanh", linear(graph, x, 16, 16))
        return linear(graph, hidden, 16, 16), graph.op("Softmax", hidden)

    written = dense_model(write)
    model, shop = outlined(written)
    assert shop.rewritten == 1
    exact(written, model)
    first, second = combine_blocks(model)
    assert first.expert_index is second.expert_index and first.nodes == second.nodes
    assert first.parameters == 4 * 2 * (16 * 16 + 16) and second.parameters == 0


def test_what_all_experts_begin_with_may_be_read_elsewhere() -> None:
    """Common subexpressions are one value: a norm in front of all experts, and the shape of the tokens."""
    first: list[str] = []

    def write(graph: Graph, x: str, expert: int) -> str:
        if not first:
            first.append(graph.op("LpNormalization", x))
        return linear(graph, first[0], 16, 16)

    written = dense_model(write, after=lambda graph, _: [graph.op("Neg", first[0])])
    model, shop = outlined(written)
    assert shop.rewritten == 1
    exact(written, model)


def test_the_nearest_shared_entry() -> None:
    first: list[str] = []

    def write(graph: Graph, x: str, expert: int) -> str:
        if not first:
            first.append(graph.op("Relu", linear(graph, x, 16, 16)))
        shape = graph.op("Shape", first[0])
        return graph.op("Reshape", graph.op("Tanh", linear(graph, first[0], 16, 16)), shape)

    written = dense_model(write)
    model = written.ir()
    values = ir.convenience.create_value_mapping(model.graph)
    exits = [values[name] for (name,) in written.exits]
    assert shared_entry(exits, Workshop(model, "test")) is values[first[0]]
    assert shared_entry(exits[:1], Workshop(model, "test")) is None
    assert shared_entry([values["x"], values["weight"]], Workshop(model, "test")) is None


def test_a_value_that_is_the_same_for_all_tokens_may_come_from_outside() -> None:
    """Even one that is computed from the tokens: it has no axis of tokens, so no token has its own."""
    shared: list[str] = []

    def write(graph: Graph, x: str, expert: int) -> str:
        if not shared:
            mean = graph.op("ReduceMean", "weight", graph.ints(0, 1), keepdims=0)
            shared.append(graph.op("Mul", mean, graph.vector(16)))
        return graph.op("Tanh", graph.op("Add", linear(graph, x, 16, 16), shared[0]))

    written = dense_model(write)
    model, shop = outlined(written)
    assert shop.rewritten == 1, shop.refusals
    onnx.checker.check_model(ir.to_proto(model), full_check=True)
    feeds = routing(written, 7)
    assert_close(run_model(written.ir(), feeds)[0], run_model(model, feeds)[0], 3e-6)


def test_experts_that_run_on_gathered_rows() -> None:
    """The loop over experts: each reads the rows of its own, and adds to the sum."""
    graph, entries, exits = Graph(), [], []
    total = graph.op("Mul", "x", graph.constant(np.float32(0)))
    for expert in range(3):
        chosen = graph.op("Equal", "index", graph.ints(expert))
        weight = graph.op("Where", chosen, "weight", graph.constant(np.float32(0)))
        rows = graph.op(
            "Squeeze", graph.op("NonZero", graph.op("Squeeze", chosen, graph.ints(1))), graph.ints(0)
        )
        entries.append(graph.op("Gather", "x", rows, axis=0))
        normal = graph.op("LayerNormalization", linear(graph, entries[-1], 16, 16), graph.vector(16))
        exits.append((normal,))
        scaled = graph.op("Mul", normal, graph.op("Gather", weight, rows, axis=0))
        total = graph.op("ScatterND", total, graph.op("Unsqueeze", rows, graph.ints(-1)), scaled)
    written = dense_model(lambda g, x, e: g.op("Neg", x), top_k=1)
    del written.model.graph.node[:], written.model.graph.initializer[:]
    written.model.graph.node.extend([*graph.nodes, helper.make_node("Identity", [total], ["y"], "end")])
    written.model.graph.initializer.extend(graph.initializers)
    written.model.graph.output[0].name = "y"
    written.entries, written.exits, written.sums = entries, exits, [total]
    model, shop = outlined(written)
    assert not shop.refusals, shop.refusals
    assert not any(node.op_type == "NonZero" for node in model.graph)
    exact(written, model)
    mixing = graph.nodes[[node.op_type for node in graph.nodes].index("LayerNormalization")]
    mixing.op_type, mixing.input[:] = "Softmax", mixing.input[:1]
    mixing.attribute.append(helper.make_attribute("axis", 0))
    del written.model.graph.node[:]
    written.model.graph.node.extend([*graph.nodes, helper.make_node("Identity", [total], ["y"], "end")])
    _, shop = outlined(written)
    [refusal] = shop.refusals
    assert "operator Softmax: it works along the axis of the rows" in refusal.reason


def _mean_over_tokens(graph: Graph, x: str, expert: int) -> str:
    hidden = linear(graph, x, 16, 16)
    if expert != 2:
        return hidden
    return graph.op("Sub", hidden, graph.op("ReduceMean", hidden, graph.ints(0)))


def _aligned_with_tokens(graph: Graph, x: str, expert: int) -> str:
    mine = graph.op("Slice", "weight", graph.ints(0), graph.ints(1), graph.ints(1))
    return graph.op("Add", linear(graph, x, 16, 16), mine)


def _random(graph: Graph, x: str, expert: int) -> str:
    hidden = linear(graph, x, 16, 16)
    return graph.op("Add", hidden, graph.op("RandomNormalLike", hidden))


def _branch(graph: Graph, x: str, expert: int) -> str:
    hidden = linear(graph, x, 16, 16)

    def body(name: str, op_type: str) -> onnx.GraphProto:
        result = helper.make_tensor_value_info(f"{name}{expert}", TensorProto.FLOAT, ["T", 16])
        return helper.make_graph([helper.make_node(op_type, [hidden], [result.name])], name, [], [result])

    condition = graph.constant(np.asarray(True))
    return graph.op("If", condition, then_branch=body("then", "Relu"), else_branch=body("else", "Neg"))


def _constant_expert(graph: Graph, x: str, expert: int) -> str:
    return linear(graph, x, 16, 16) if expert else graph.op("Identity", graph.vector(16))


def _wider_expert(graph: Graph, x: str, expert: int) -> str:
    return linear(graph, x, 16, 16) if expert else linear(graph, x, 16, 1)


REFUSED = {
    "reduces over tokens": (_mean_over_tokens, "expert 2 is not known to treat its tokens one by one: operator Reduce"),
    "reads another value of the tokens": (_aligned_with_tokens, "an entry for each row"),
    "random": (_random, "operator RandomNormalLike: it is not known to treat rows one by one"),
    "branch": (_branch, "expert 0 holds a node with a body of its own, If"),
    "constant": (_constant_expert, "the result of expert 0 does not depend on its rows"),
    "another width": (_wider_expert, "the results of the experts differ in shape or type"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str) -> None:
    write, reason = REFUSED[name]
    written = dense_model(write)
    _, shop = outlined(written)
    [refusal] = shop.refusals
    assert reason in refusal.reason and refusal.by == "test" and refusal.hint
    assert unchanged(written, shop)


@pytest.mark.parametrize("where", ["exit", "inside"])
def test_values_of_an_expert_read_elsewhere_are_refused(where: str) -> None:
    inner: list[str] = []

    def write(graph: Graph, x: str, expert: int) -> str:
        inner.append(linear(graph, x, 16, 16))
        return graph.op("Tanh", inner[-1])

    def after(graph: Graph, written: Written) -> list[str]:
        return [graph.op("Neg", inner[1] if where == "inside" else written.exits[1][0])]

    written = dense_model(write, after=after)
    _, shop = outlined(written)
    [refusal] = shop.refusals
    assert "a value of an expert is used elsewhere" in refusal.reason
    assert unchanged(written, shop)


def test_other_tokens_than_the_entry_are_refused() -> None:
    """Expert 1 reads the rows of expert 0, too."""

    def write(graph: Graph, x: str, expert: int) -> str:
        own = graph.op("Neg", x)
        entries.append(own)
        hidden = linear(graph, own, 16, 16)
        return graph.op("Add", hidden, entries[0]) if expert == 1 else hidden

    entries: list[str] = []
    written = dense_model(write)
    written.entries = entries
    _, shop = outlined(written)
    [refusal] = shop.refusals
    assert "expert 1 reads the rows" in refusal.reason and "of another expert too" in refusal.reason
