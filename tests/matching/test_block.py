"""Blocks put into a graph: how weights are packed, what refuses, names, and that a refusal leaves nothing behind."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from test_linear import graph

from sparse_onnx.blocks import GateLayout, MoEBlock, WeightLayout
from sparse_onnx.graph.build import Namespace
from sparse_onnx.matching.block import Found, Workshop, commit
from sparse_onnx.matching.expert import Expert, read_expert
from sparse_onnx.matching.naming import block_name
from sparse_onnx.matching.stacking import Obstacle, stacked

RNG = np.random.default_rng(3)
E, D, N = 3, 4, 6
SILU = "s{0} = Sigmoid (g{0}) a{0} = Mul (g{0}, s{0}) h{0} = Mul (a{0}, u{0})"


def experts(body: str, weights: dict[str, np.ndarray]) -> tuple[ir.Graph, list[Expert]]:
    text = "".join(body.format(e) for e in range(E)) + " y = Sum (y0, y1, y2)"
    built = graph(text, **weights)
    found = [read_expert(value) for value in built.outputs[0].producer().inputs]  # type: ignore[union-attr]
    assert all(isinstance(item, Expert) for item in found), found
    return built, found  # type: ignore[return-value]


def array(value: ir.Value) -> np.ndarray:
    assert value.const_value is not None
    return value.const_value.numpy()


def apart(*names: str, shape: tuple[int, int]) -> dict[str, np.ndarray]:
    return {f"{n}{e}": RNG.standard_normal(shape).astype(np.float32) for n in names for e in range(E)}


def test_matrices_stored_apart_become_one_stack() -> None:
    weights = apart("p", shape=(D, N)) | apart("q", shape=(N, D)) | {"b1": np.ones(N, np.float32)}
    bodies = ("m{0} = MatMul (x, p{0}) ", "r{0} = Relu (m{0}) y{0} = MatMul (r{0}, q{0}) ")
    body = [bodies[0] + bodies[1]] * E
    text = (
        body[0].format(0) + "n1 = MatMul (x, p1) m1 = Add (n1, b1) " + bodies[1].format(1) + body[2].format(2)
    )
    built = graph(text + " y = Sum (y0, y1, y2)", **weights)
    found = [read_expert(v) for v in built.outputs[0].producer().inputs]  # type: ignore[union-attr]
    values, layout = stacked(found, "moe", built, Namespace(ir.Model(built, ir_version=9)))  # type: ignore[arg-type]
    assert layout is WeightLayout.IN_OUT
    for role, name in (("fc1", "p"), ("fc2", "q")):
        np.testing.assert_array_equal(
            array(values[role]), np.stack([weights[f"{name}{e}"] for e in range(E)])
        )
    expected = np.zeros((E, N), np.float32)
    expected[1] = 1
    np.testing.assert_array_equal(array(values["fc1_bias"]), expected)
    assert not array(values["fc2_bias"]).any()


def test_matrices_that_lie_differently_are_turned_one_by_one() -> None:
    weights = apart("p", shape=(N, D)) | apart("q", shape=(N, D))
    built, found = experts(
        "m{0} = Gemm <transB = 1> (x, p{0}) r{0} = Relu (m{0}) y{0} = MatMul (r{0}, q{0}) ", weights
    )
    values, layout = stacked(found, "moe", built, Namespace(ir.Model(built, ir_version=9)))
    assert layout is WeightLayout.OUT_IN
    np.testing.assert_array_equal(array(values["fc1"]), np.stack([weights[f"p{e}"] for e in range(E)]))
    np.testing.assert_array_equal(array(values["fc2"]), np.stack([weights[f"q{e}"].T for e in range(E)]))


@pytest.mark.parametrize("turned", [False, True])
def test_a_gate_in_the_second_half_is_cut_out(turned: bool) -> None:
    weights = apart("p", shape=(2 * N, D) if turned else (D, 2 * N)) | apart("q", shape=(N, D))
    product = "m{0} = Gemm <transB = 1> (x, p{0})" if turned else "m{0} = MatMul (x, p{0})"
    built, found = experts(
        f"{product} u{{0}}, g{{0}} = Split <axis = 1, num_outputs = 2> (m{{0}}) {SILU} "
        "y{0} = MatMul (h{0}, q{0}) ",
        weights,
    )
    assert found[0].kind.gate_layout is GateLayout.SEPARATE
    values, layout = stacked(found, "moe", built, Namespace(ir.Model(built, ir_version=9)))
    for role, half in (("up", 0), ("gate", 1)):
        wanted = np.stack([np.split(weights[f"p{e}"], 2, 0 if turned else 1)[half] for e in range(E)])
        have = array(values[role])
        if (layout is WeightLayout.OUT_IN) != turned:
            have = have.swapaxes(1, 2)
        np.testing.assert_array_equal(have, wanted)


def test_packed_weights_are_used_as_they_lie() -> None:
    packed = {
        "p": RNG.standard_normal((E, D, N)).astype(np.float32),
        "q": RNG.standard_normal((E, N, D)).astype(np.float32),
    }
    cut = "c{0} = Constant <value = int64 {{{{{0}}}}}> () "
    text = "".join(
        cut.format(e).replace("{{", "{").replace("}}", "}")
        + f"P{e} = Gather (p, c{e}) Q{e} = Gather (q, c{e}) m{e} = MatMul (x, P{e}) r{e} = Relu (m{e}) "
        f"y{e} = MatMul (r{e}, Q{e}) "
        for e in range(E)
    )
    built = graph(text + "y = Sum (y0, y1, y2)", **packed)
    found = [read_expert(v) for v in built.outputs[0].producer().inputs]  # type: ignore[union-attr]
    assert all(isinstance(item, Expert) for item in found), found
    names = Namespace(ir.Model(built, ir_version=9))
    values, _ = stacked(found, "moe", built, names)  # type: ignore[arg-type]
    assert values["fc1"] is built.initializers["p"] and values["fc2"] is built.initializers["q"]
    other = [found[1], found[0], found[2]]
    values, _ = stacked(other, "moe", built, names)  # type: ignore[arg-type]
    np.testing.assert_array_equal(array(values["fc1"]), packed["p"][[1, 0, 2]])


def test_shapes_that_differ_are_an_obstacle() -> None:
    weights = apart("p", shape=(D, N)) | apart("q", shape=(N, D))
    weights["p2"], weights["q2"] = np.ones((D, 8), np.float32), np.ones((8, D), np.float32)
    built, found = experts("m{0} = MatMul (x, p{0}) r{0} = Relu (m{0}) y{0} = MatMul (r{0}, q{0}) ", weights)
    with pytest.raises(Obstacle, match="do not fit together"):
        stacked(found, "moe", built, Namespace(ir.Model(built, ir_version=9)))


def routed(last: str) -> tuple[ir.Model, Found]:
    """Three experts summed in one node, with a routing beside them: enough for `commit`, which does not prove."""
    weights = apart("p", shape=(D, N)) | apart("q", shape=(N, D))
    router = "k = Constant <value_ints = [2]> () w, i = TopK (x, k) "
    body = "m{0} = MatMul (x, p{0}) r{0} = Relu (m{0}) y{0} = MatMul (r{0}, q{0}) "
    built = graph(router + "".join(body.format(e) for e in range(E)) + last, **weights)
    total = next(node for node in built if node.op_type == "Sum")
    total.outputs[0].shape = ir.Shape([None, D])
    choice = next(node for node in built if node.op_type == "TopK")
    found = [read_expert(value) for value in total.inputs]  # type: ignore[arg-type]
    x = built.inputs[0]
    block = Found("dense-mask", total.outputs[0], x, choice.outputs[1], choice.outputs[0], 2, found)  # type: ignore[arg-type]
    built.opset_imports[""] = 18
    return ir.Model(built, ir_version=9), block


def test_a_block_replaces_all_that_only_it_needed() -> None:
    model, found = routed("y = Sum (y0, y1, y2)")
    shop = Workshop(model, "test")
    assert commit(found, shop) and shop.rewritten == 1
    assert sorted(node.op_type for node in model.graph) == ["MoE", "TopK"]
    (block,) = [MoEBlock.of(node) for node in model.graph if node.domain]
    assert block is not None and (block.experts, block.top_k, block.spelling) == (E, 2, "dense-mask")
    assert model.graph.outputs[0].name == "y" and model.graph.outputs[0] in list(model.graph)[-1].outputs


@pytest.mark.parametrize("where", ["z = Exp (m1) y = Add (t, z)", "z = Exp (y2) y = Add (t, z)"])
def test_a_value_that_is_read_elsewhere_refuses_and_leaves_everything(where: str) -> None:
    where = where.replace("Exp (m1)", "ReduceSum (m1)").replace("Exp (y2)", "ReduceSum (y2)")
    model, found = routed(f"t = Sum (y0, y1, y2) {where}")
    before = [str(node) for node in model.graph], sorted(model.graph.initializers)
    shop = Workshop(model, "test")
    assert not commit(found, shop)
    assert "used elsewhere" in shop.refusals[0].reason
    assert ([str(node) for node in model.graph], sorted(model.graph.initializers)) == before


def test_names_come_from_what_the_nodes_share() -> None:
    def node(name: str, **metadata: str) -> ir.Node:
        return ir.Node("", "MatMul", [], name=name, metadata_props=metadata)

    anchor = node("sum")
    legacy = [node(f"/model/layers.3/mlp/experts.{e}/up/MatMul") for e in (0, 7)]
    assert block_name(legacy, anchor) == "model.layers.3.mlp"
    key = "pkg.torch.onnx.name_scopes"
    dynamo = [node("n", **{key: "['', 'model', 'model.layers.0.mlp.experts', 'bmm']"})] * 2
    assert block_name(dynamo, anchor) == "model.layers.0.mlp"
    assert block_name([node("v1"), node("v2")], anchor) == "moe/sum"
    assert block_name([node("n", **{key: "not a list"})], anchor) == "moe/sum"
