"""Experts behind If: exact for every routing in each style, cold ones really skipped, weights where ORT packs them."""

from __future__ import annotations

import collections
from collections.abc import Iterator

import numpy as np
import onnx_ir as ir
import pytest
from any_block import KINDS, routing, shapes
from builders import Shape, layered_model, routed_model, save_external
from executed import executed
from harness import assert_close, check_rewrite, run_model
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper
from quantized_blocks import Storage, quantized_model

from sparse_onnx.blocks import blocks
from sparse_onnx.blocks.lowered import lowered_blocks
from sparse_onnx.blocks.lowering import Form, want, wanted
from sparse_onnx.core.errors import UsageError
from sparse_onnx.graph import io
from sparse_onnx.passes.branch_experts import STYLES, BranchExperts

STYLE = st.sampled_from(
    [BranchExperts(style="expert"), BranchExperts(style="loop"), BranchExperts(group=3), BranchExperts()]
)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    STYLE, shapes(), st.sampled_from([0, 1, 2, 7, 33]), st.sampled_from(KINDS), st.sampled_from([18, 20, 23])
)
def test_any_block_any_routing(
    rewrite: BranchExperts, shape: Shape, tokens: int, kind: str, opset: int
) -> None:
    feeds = [routing(shape, tokens, kind)]
    check_rewrite(routed_model(shape, opset=opset), rewrite, rewritten=1, feeds=feeds)


@pytest.mark.slow
@settings(max_examples=1500, deadline=None, derandomize=True)
@given(STYLE, shapes(), st.integers(0, 40), st.sampled_from(KINDS), st.integers(18, 24))
def test_any_block_any_routing_sweep(
    rewrite: BranchExperts, shape: Shape, tokens: int, kind: str, opset: int
) -> None:
    feeds = [routing(shape, tokens, kind)]
    check_rewrite(routed_model(shape, opset=opset), rewrite, rewritten=1, feeds=feeds)


@pytest.mark.parametrize(
    ("dtype", "weight_dtype", "tolerance"),
    [("float16", "float16", 4e-3), ("float16", "float32", 2e-3), ("float32", "float16", 1e-3)],
)
@pytest.mark.parametrize("style", STYLES)
def test_element_types(style: str, dtype: str, weight_dtype: str, tolerance: float) -> None:
    shape = Shape(experts=5, dtype=dtype, weight_dtype=weight_dtype, biases=True)
    feeds = [routing(shape, tokens, kind) for tokens in (0, 19) for kind in ("random", "dropped")]
    rewrite = BranchExperts(style=style, group=2)
    check_rewrite(routed_model(shape), rewrite, rewritten=1, feeds=feeds, tolerance=tolerance)


@pytest.mark.parametrize("style", STYLES)
def test_bfloat16_is_a_valid_model(style: str) -> None:
    """No ORT CPU kernel computes in bfloat16: structure and types are what can be checked."""
    shape = Shape(dtype="bfloat16", weight_dtype="bfloat16")
    refused = ["ONNX has no sequences of bfloat16"] if style == "loop" else []
    rewrite = BranchExperts(style=style, group=2)
    check_rewrite(routed_model(shape), rewrite, rewritten=not refused, refused=refused)


@pytest.mark.parametrize("style", STYLES)
def test_ties_follow_the_router(style: str) -> None:
    """All scores of a token tie: TopK takes the lower experts, before and after."""
    model = layered_model(Shape(experts=6, top_k=3), layers=2)
    feeds = [{"x": np.zeros((5, 16), np.float32)}, {"x": np.tile(np.ones(16, np.float32), (7, 1))}]
    check_rewrite(model, BranchExperts(style=style, group=2), rewritten=2, feeds=feeds)


def _all_nodes(model: ir.Model) -> Iterator[ir.Node]:
    return ir.traversal.RecursiveGraphIterator(model.graph)


def _matrices(model: ir.Model) -> Iterator[tuple[ir.Node, ir.Value]]:
    for node in _all_nodes(model):
        if node.op_type == "Gemm":
            assert node.inputs[1] is not None
            yield node, node.inputs[1]


@pytest.mark.parametrize(("style", "branches"), [("expert", 20), ("group", 3)])
def test_branches_are_one_deep_with_weights_around_them(style: str, branches: int) -> None:
    after, _ = check_rewrite(
        layered_model(Shape(experts=20), layers=1), BranchExperts(style=style), rewritten=1
    )
    outer = [node for node in after.graph if node.op_type == "If"]
    assert len(outer) == branches == sum(node.op_type == "If" for node in _all_nodes(after))
    assert all(
        matrix.graph is after.graph and node.graph is not after.graph for node, matrix in _matrices(after)
    )
    for node in outer:
        for branch in ("then_branch", "else_branch"):
            [result] = node.attributes[branch].as_graph().outputs
            assert result.shape is not None and len(result.shape) == 2 and result.shape[1] == 16
    [record] = lowered_blocks(after)
    assert (record.form, record.experts, record.top_k, record.hidden, record.inner) == (
        "branched",
        20,
        2,
        16,
        24,
    )
    marks = {node.metadata_props.get("sparse_onnx.block") for node in _all_nodes(after)}
    assert marks == {None, "layers.0.experts"}
    assert all("sparse_onnx.block" in node.metadata_props for node, _ in _matrices(after))


def test_the_loop_holds_weights_in_its_leaves() -> None:
    """Those of the graph around it would lie several graphs out."""
    after, _ = check_rewrite(
        layered_model(Shape(experts=20), layers=1), BranchExperts(style="loop"), rewritten=1
    )
    assert all(matrix.graph is node.graph for node, matrix in _matrices(after))
    assert len(list(_matrices(after))) == 40
    kinds = collections.Counter(node.op_type for node in _all_nodes(after))
    assert kinds["If"] == 19 and kinds["Loop"] == 1
    assert not any(name.startswith("layers.0.fc") for name in after.graph.initializers)


def test_a_group_shares_the_activation() -> None:
    after, _ = check_rewrite(layered_model(Shape(experts=20), layers=1), BranchExperts(), rewritten=1)
    assert sum(node.op_type == "Sigmoid" for node in _all_nodes(after)) == 3, "groups of 8, 8 and 4"


@pytest.mark.parametrize(("style", "experts"), [("expert", 2), ("group", 6), ("loop", 2)])
def test_cold_experts_do_not_run(style: str, experts: int) -> None:
    shape = Shape(experts=19)
    after, _ = check_rewrite(routed_model(shape), BranchExperts(style=style, group=3), rewritten=1)
    feeds = routing(shape, 6, "random")
    feeds["index"][:] = np.asarray([4, 16])
    ran = executed(after, feeds)
    assert ran["Gemm"] == 2 * experts
    assert ran["If"] == {"expert": 19, "group": 7, "loop": 2 * 4}[style] or style == "loop"
    feeds["index"][:] = 19  # all dropped
    assert executed(after, feeds)["Gemm"] == 0


@pytest.mark.parametrize("style", STYLES)
def test_packed_weights_stay_where_they_lie(style: str, tmp_path) -> None:
    path = save_external(layered_model(Shape(biases=True)), tmp_path / "m.onnx")
    model = io.load(path)
    packed = {
        name: value.const_value
        for name, value in model.graph.initializers.items()
        if name.endswith(("fc1", "fc2"))
    }
    assert len(packed) == 4
    BranchExperts(style=style, group=2)(model)
    parts = {}
    for _, matrix in _matrices(model):
        assert isinstance(matrix.const_value, ir.ExternalTensor)
        parts[matrix.const_value.location, matrix.const_value.offset] = matrix.const_value
    for name, whole in packed.items():
        assert name not in model.graph.initializers and isinstance(whole, ir.ExternalTensor)
        for expert in range(4):
            offset = (whole.offset or 0) + expert * whole.nbytes // 4
            part = parts.pop((whole.location, offset))
            np.testing.assert_array_equal(part.numpy(), whole.numpy()[expert])
    assert not parts


def _in_body(shape: Shape, weights_inside: bool) -> ir.Model:
    """The block in an If body."""
    model = ir.to_proto(routed_model(shape))
    result = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["T", shape.hidden])
    inside = list(model.graph.initializer) if weights_inside else []
    then = helper.make_graph([model.graph.node[0]], "then", [], [result], inside)
    other = helper.make_graph(
        [helper.make_node("Identity", ["tokens"], ["z"], name="pass")],
        "else",
        [],
        [helper.make_tensor_value_info("z", TensorProto.FLOAT, ["T", shape.hidden])],
    )
    del model.graph.node[:]
    if weights_inside:
        del model.graph.initializer[:]
    model.graph.node.append(
        helper.make_node("If", ["use"], ["out"], name="choice", then_branch=then, else_branch=other)
    )
    model.graph.input.append(helper.make_tensor_value_info("use", TensorProto.BOOL, []))
    del model.graph.output[:]
    model.graph.output.append(helper.make_tensor_value_info("out", TensorProto.FLOAT, ["T", shape.hidden]))
    return ir.from_proto(model)


@pytest.mark.parametrize("weights_inside", [False, True])
@pytest.mark.parametrize("style", STYLES)
def test_inside_a_branch(style: str, weights_inside: bool) -> None:
    """Branches in a body would have weights of the main graph two graphs out: refused, unless they hold their own."""
    shape = Shape()
    feeds = [
        routing(shape, tokens, "dropped") | {"use": np.asarray(use)}
        for tokens in (0, 9)
        for use in (True, False)
    ]
    refused = ["fc1 outside of it: ORT does not prepack"] if style != "loop" and not weights_inside else []
    after, _ = check_rewrite(
        _in_body(shape, weights_inside),
        BranchExperts(style=style, group=2),
        rewritten=not refused,
        feeds=feeds,
        refused=refused,
    )
    if not refused:
        assert len(list(_matrices(after))) == 8


@pytest.mark.parametrize("style", STYLES)
def test_two_nodes_share_weights(style: str) -> None:
    model = ir.to_proto(routed_model(Shape()))
    again = model.graph.node.add()
    again.CopyFrom(model.graph.node[0])
    again.name, again.input[0], again.output[0] = "again", "y", "z"  # chained directly
    again.metadata_props[0].value = "again"
    model.graph.output.append(helper.make_tensor_value_info("z", TensorProto.FLOAT, ["T", 16]))
    feeds = [routing(Shape(), 9, "random")]
    after, _ = check_rewrite(
        ir.from_proto(model), BranchExperts(style=style, group=2), rewritten=2, feeds=feeds
    )
    parts = {name for graph in after.graphs() for name in graph.initializers if name.startswith("fc1.")}
    assert len(parts) == (8 if style == "loop" else 4)


def test_weights_that_another_form_reads_too() -> None:
    """The loop takes copies into its leaves; the other block's stay in the main graph."""
    model = ir.to_proto(routed_model(Shape()))
    again = model.graph.node.add()
    again.CopyFrom(model.graph.node[0])
    again.name, again.input[0], again.output[0] = "again", "y", "z"
    again.metadata_props[0].value = "again"
    model.graph.output.append(helper.make_tensor_value_info("z", TensorProto.FLOAT, ["T", 16]))
    for styles in (("loop", "expert"), ("expert", "loop")):
        wished = ir.from_proto(ir.to_proto(ir.from_proto(model)))
        for block, style in zip(blocks(wished), styles, strict=True):
            want(block.node, [Form.parse(f"branched:style={style}")])
        check_rewrite(wished, BranchExperts(), rewritten=2, feeds=[routing(Shape(), 9, "random")])


STORAGES = [
    (Storage(), "MatMulNBits"),
    (Storage("uint8", points="one"), "MatMulNBits"),
    (Storage("int8", axis=1, block=0), "DequantizeLinear"),
    (Storage("int4", axis=0, block=0), "DequantizeLinear"),
]


@pytest.mark.parametrize(("storage", "product"), STORAGES)
@pytest.mark.parametrize("style", STYLES)
def test_quantized_weights(style: str, storage: Storage, product: str) -> None:
    """Only experts with tokens multiply by their integers, or turn them into numbers."""
    shape = Shape(experts=5, hidden=32, inner=48, biases=True)
    feeds = [routing(shape, tokens, kind) for tokens in (0, 1, 9) for kind in ("random", "dropped")]
    model = quantized_model(shape, storage)
    after, _ = check_rewrite(model, BranchExperts(style=style, group=2), rewritten=1, feeds=feeds)
    assert not any(node.name.endswith(".node") for node in after.graph), "the packed ones are gone"
    assert ("com.microsoft" in after.opset_imports) == (product == "MatMulNBits")
    feeds[0]["index"] = np.asarray([[1, 1], [1, 4]])
    feeds[0]["tokens"], feeds[0]["weight"] = feeds[0]["tokens"][:0], feeds[0]["weight"][:0]
    few = routing(shape, 2, "random") | {"index": feeds[0]["index"]}
    assert executed(after, few)[product] == 2 * (3 if style == "group" else 2)


def test_without_operators_of_onnx_runtime() -> None:
    shape = Shape(experts=5, hidden=32, inner=48)
    rewrite = BranchExperts(contrib=False)
    after, _ = check_rewrite(
        quantized_model(shape, Storage()), rewrite, rewritten=1, feeds=[routing(shape, 9, "random")]
    )
    assert {node.domain for node in _all_nodes(after)} == {""}


def test_options_of_a_block() -> None:
    """Each block in the style that it is wanted in; a refused one falls to its next form."""
    model = layered_model(Shape(), layers=3)
    first, second, third = blocks(model)
    want(first.node, [Form.parse("branched:style=loop")])
    want(second.node, [Form.parse("branched:style=group,group=2")])
    want(third.node, [Form.parse("grouped")])
    after, _ = check_rewrite(model, BranchExperts(), rewritten=2)
    kinds = collections.Counter(node.op_type for node in after.graph)
    assert kinds["Loop"] == 1 and kinds["If"] == 2 and kinds["MoE"] == 1

    nested = _in_body(Shape(), weights_inside=False)
    [block] = blocks(nested)
    want(block.node, [Form.parse("branched"), Form.parse("grouped")])
    outcome = BranchExperts()(nested)
    assert not outcome.modified and wanted(block.node) == [Form("grouped")]


def test_bad_options() -> None:
    with pytest.raises(UsageError, match="style=tree is not one of group, expert, loop"):
        BranchExperts(style="tree")
    with pytest.raises(UsageError, match="group=0"):
        BranchExperts(group=0)


def test_computed_weights_are_refused() -> None:
    model = ir.to_proto(routed_model(Shape()))
    model.graph.node.insert(0, helper.make_node("Neg", ["fc2"], ["negative"], name="neg"))
    model.graph.node[1].input[5] = "negative"
    for style in STYLES:
        rewrite = BranchExperts(style=style)
        check_rewrite(ir.from_proto(model), rewrite, rewritten=0, refused=["block 'block': fc2 is computed"])


def test_an_unknown_number_of_experts_is_refused() -> None:
    model = routed_model(Shape())
    model.graph.inputs[1].shape = ir.Shape(["T", "K"])
    model.graph.inputs[2].shape = ir.Shape(["T", "K"])
    check_rewrite(model, BranchExperts(), rewritten=0, refused=["experts of a token is not known"])


@pytest.mark.parametrize(
    "rewrite", [BranchExperts(style="expert"), BranchExperts(), BranchExperts(style="loop")]
)
def test_no_races_at_realistic_size(rewrite: BranchExperts) -> None:
    """Two threads, rows long enough for ORT to divide them, the same answer every time."""
    shape = Shape(experts=16, top_k=4, hidden=1024, inner=64)
    model = routed_model(shape)
    after, _ = check_rewrite(model, rewrite, rewritten=1)
    feeds = routing(shape, 256, "random")
    expected = run_model(model, feeds, threads=1)[0]
    results = [run_model(after, feeds, threads=2)[0] for _ in range(3)]
    for result in results:
        assert_close(expected, result, 2e-6)
        np.testing.assert_array_equal(result, results[0])


def test_the_loop_is_valid_onnx_elsewhere() -> None:
    """By onnx's reference evaluator, which is no part of ORT."""
    from onnx.reference import ReferenceEvaluator

    shape = Shape(experts=5)
    model = routed_model(shape)
    feeds = routing(shape, 7, "dropped")
    feeds["tokens"], feeds["weight"] = (
        np.nan_to_num(feeds["tokens"]),
        np.nan_to_num(feeds["weight"], posinf=1),
    )
    for style in STYLES:
        after, _ = check_rewrite(model, BranchExperts(style=style, group=2), rewritten=1)
        [actual] = ReferenceEvaluator(ir.to_proto(after)).run(None, feeds)
        assert_close(run_model(model, feeds)[0], actual, 5e-6)
