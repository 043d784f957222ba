"""Experts on all tokens and zero gates: every way to write them is lifted and exact, and what is not quite is not."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from dense_graphs import COLUMNS, GATES, HIDDEN, SUMS, D, Dense, E, tokens
from dense_near_misses import NEAR_MISSES
from harness import assert_close, run_model
from onnx_ir.passes import common

from sparse_onnx.blocks import blocks
from sparse_onnx.core.passes import Outcome
from sparse_onnx.passes.fuse_gating import FuseGating
from sparse_onnx.passes.infer_shapes import InferShapes
from sparse_onnx.passes.recognise_dense_mask import RecogniseDenseMask

CORPUS = Path(__file__).parents[3] / "shared" / "corpus"


def recognised(proto: onnx.ModelProto) -> tuple[ir.Model, Outcome]:
    model = ir.from_proto(onnx.ModelProto.FromString(proto.SerializeToString()))
    common.LiftConstantsToInitializersPass()(model)
    common.NameFixPass()(model)
    common.CommonSubexpressionEliminationPass()(model)
    InferShapes()(model)
    return model, RecogniseDenseMask()(model)


def check_lifted(dense: Dense, top_k: int = 2, left: tuple[str, ...] = ()) -> ir.Model:
    """One block of these sizes; no expert of the graph left; the same numbers lowered; found once only."""
    proto = dense.model()
    model, outcome = recognised(proto)
    assert (outcome.matched, outcome.rewritten, outcome.refusals) == (1, 1, ())
    [block] = blocks(model)
    assert (block.experts, block.top_k) == (E, top_k)
    common.RemoveUnusedNodesPass()(model)
    assert not any(node.op_type in ("Relu", "Gelu", *left) for node in model.graph)
    again = RecogniseDenseMask()(model)
    assert not again.modified and again.matched == 0
    assert FuseGating()(model).rewritten == 1
    before = ir.from_proto(proto)
    for x in tokens():
        if not len(x) and "Einsum" in dense.gates:
            continue  # ORT's Einsum divides by the size of an axis that is summed over
        for old, new in zip(run_model(before, {"x": x}), run_model(model, {"x": x}), strict=True):
            assert_close(old, new, 2e-6)
    return model


def check_refused(dense: Dense, reason: str) -> None:
    """Refused with this reason, and nothing changed."""
    model = ir.from_proto(dense.model())
    common.NameFixPass()(model)
    common.CommonSubexpressionEliminationPass()(model)
    InferShapes()(model)
    before = ir.to_proto(model).SerializeToString(deterministic=True)
    outcome = RecogniseDenseMask()(model)
    assert not outcome.modified
    assert ir.to_proto(model).SerializeToString(deterministic=True) == before
    assert [reason in refusal.reason for refusal in outcome.refusals] == [True], outcome.refusals
    assert all(
        refusal.hint and refusal.node and refusal.by == "recognise_dense_mask" for refusal in outcome.refusals
    )


@pytest.mark.parametrize("gates", GATES)
def test_gates(gates: str) -> None:
    check_lifted(Dense(gates=GATES[gates]))


@pytest.mark.parametrize("column", COLUMNS)
def test_columns(column: str) -> None:
    model = check_lifted(Dense(column=COLUMNS[column]))
    assert not any(node.op_type == "GatherElements" for node in model.graph)


@pytest.mark.parametrize("total", SUMS)
@pytest.mark.parametrize("gates", ["scatter", "renormalised"])
def test_sums_over_a_stack(total: str, gates: str) -> None:
    check_lifted(Dense(gates=GATES[gates], column="", term="", total=SUMS[total]))


def test_the_weights_are_the_routers_own_where_the_gates_hold_them() -> None:
    """A scatter's updates are read at once; computed gates are gathered where they were chosen."""
    plain, _ = recognised(Dense().model())
    computed, _ = recognised(Dense(gates=GATES["renormalised"]).model())
    ops = [[node.op_type for node in model.graph].count("GatherElements") for model in (plain, computed)]
    assert ops == [0, 1]


def test_masks_around_the_product() -> None:
    """makeMoE's form: the mask hides the expert's result, a dense softmax weights it."""
    check_lifted(
        Dense(
            gates="p = Softmax <axis = -1> (logits) nothing = Mul (x, zero)",
            column="h{e} = Equal (ids, n{e}) i{e} = Cast <to = 7> (h{e}) m{e} = ReduceMax (i{e}, last) "
            "c{e} = Cast <to = 9> (m{e}) q{e} = Slice (p, at{e}, at{f}, last)",
            term="v{e} = Mul (y{e}, q{e}) t{e} = Where (c{e}, v{e}, nothing)",
        )
    )


def test_one_expert_a_token() -> None:
    router = "logits = MatMul (x, router) p = Softmax <axis = -1> (logits) w = ReduceMax (p, last) "
    arg = "ids = ArgMax <axis = -1> (logits)"
    column = "h{e} = Equal (ids, n{e}) f{e} = Cast <to = 1> (h{e}) c{e} = Mul (w, f{e})"
    check_lifted(Dense(router=router + arg, gates="", column=column), top_k=1)


@pytest.mark.parametrize("rest", ["x", "other"])
def test_what_else_the_sum_holds_stays(rest: str) -> None:
    """A residual in the middle, a shared expert in front."""
    total = "other = MatMul (x, shared) r0 = Add ({first}, t0) r1 = Add (r0, t1) r2 = Add (t2, r1) y = Add (r2, t3)"
    model = check_lifted(Dense(total=total.replace("{first}", rest)))
    assert any(node.op_type == "Add" and "x" in [v.name for v in node.inputs] for node in model.graph) == (
        rest == "x"
    )


def test_a_sum_that_begins_with_zeros() -> None:
    total = (
        "nothing = Mul (x, zero) r0 = Add (nothing, t0) r1 = Add (r0, t1) r2 = Add (r1, t2) y = Add (r2, t3)"
    )
    model = check_lifted(Dense(total=total))
    assert not any(node.op_type == "Add" for node in model.graph)


PACKED = {
    "broadcast": ("p0 = MatMul (x, ups)", "q1 = Unsqueeze (bs, one_axis)"),
    "tiled": (
        "xt = Tile (x, copies) xe = Reshape (xt, as_packed) p0 = MatMul (xe, ups)",
        "q1 = Unsqueeze (bs, one_axis)",
    ),
    "einsum": ('p0 = Einsum <equation = "td,edi->eti"> (x, ups)', "q1 = Unsqueeze (bs, one_axis)"),
}


@pytest.mark.parametrize("packed", PACKED)
@pytest.mark.parametrize("gates", ["scatter", "softmax-of-scatter"])
def test_packed_experts(packed: str, gates: str) -> None:
    first, bias = PACKED[packed]
    total = (
        f"{first} {bias} a0 = Add (p0, q1) h0 = Gelu (a0) p1 = MatMul (h0, downs) p2 = Add (end_bs, p1) "
        "gt = Transpose <perm = [1, 0]> (g) gw = Unsqueeze (gt, last) p3 = Mul (p2, gw) "
        "y = ReduceSum <keepdims = 0> (p3, first)"
    )
    model = check_lifted(Dense(gates=GATES[gates], expert="", column="", term="", total=total))
    assert not any(node.op_type == "Einsum" for node in model.graph)


@pytest.mark.parametrize("inferred", [True, False])
def test_gpt_oss(inferred: bool) -> None:
    """All experts on all tokens as one product; gate and up are every second of its outputs, clamped.

    Where inference failed, their width is only known from the weights.
    """
    total = (
        "xt = Tile (x, copies) xe = Reshape (xt, as_packed) p0 = MatMul (xe, both) a0 = Add (p0, both_bs) "
        "g0 = Slice (a0, at0, far, last, step) g1 = Clip (g0, , limit) "
        "u0 = Slice (a0, at1, far, last, step) u1 = Clip (u0, low_limit, limit) "
        "s0 = Mul (g1, alpha) s1 = Sigmoid (s0) s2 = Mul (g1, s1) u2 = Add (u1, one) h0 = Mul (u2, s2) "
        "p1 = MatMul (h0, downs) p2 = Add (p1, end_bs) v0 = Reshape (p2, as_packed) "
        "gt = Transpose <perm = [1, 0]> (g) gw = Unsqueeze (gt, last) p3 = Mul (v0, gw) "
        "y = ReduceSum <keepdims = 0> (p3, first)"
    )
    weights = {
        "both_bs": np.random.default_rng(3).standard_normal((E, 1, 2 * HIDDEN)).astype(np.float32),
        "far": np.array([2**63 - 1]),
        "step": np.array([2]),
        "limit": np.float32(0.7),
        "low_limit": np.float32(-0.7),
        "alpha": np.float32(1.702),
    }
    dense = Dense(expert="", column="", term="", total=total, weights=weights)
    if inferred:
        check_lifted(dense)
        return
    proto = dense.model()
    router = [info for info in proto.graph.value_info if info.name in ("logits", "top", "ids", "w", "g")]
    proto.graph.ClearField("value_info")
    proto.graph.value_info.extend(router)
    model = ir.from_proto(proto)
    outcome = RecogniseDenseMask()(model)
    assert (outcome.rewritten, outcome.refusals) == (1, ())
    for x in tokens():
        assert_close(run_model(ir.from_proto(proto), {"x": x})[0], run_model(model, {"x": x})[0], 2e-6)


LLAMA4 = Dense(
    gates=GATES["sigmoid-of-scatter"],
    expert="",
    column="",
    term="",
    total="xt = Tile (x, copies) gt = Transpose <perm = [1, 0]> (g) gc = Reshape (gt, as_column) "
    "xs = Mul (xt, gc) xe = Reshape (xs, as_packed) p0 = MatMul (xe, both) "
    "a0, a1 = Split <axis = -1, num_outputs = 2> (p0) s0 = Sigmoid (a0) s1 = Mul (s0, a0) h0 = Mul (a1, s1) "
    "p1 = MatMul (h0, downs) y = ReduceSum <keepdims = 0> (p1, first)",
)


def test_weighted_tokens() -> None:
    """Llama 4: sum of expert_e(w x), which is not w expert_e(x)."""
    proto = LLAMA4.model()
    model, outcome = recognised(proto)
    assert (outcome.rewritten, outcome.refusals) == (1, ())
    [block] = blocks(model)
    assert (block.experts, block.top_k) == (E, 1)
    FuseGating()(model)
    for x in tokens():
        assert_close(run_model(ir.from_proto(proto), {"x": x})[0], run_model(model, {"x": x})[0], 2e-6)


def test_weighted_tokens_of_experts_with_a_bias_are_no_mask() -> None:
    total = LLAMA4.total.replace("p1 = MatMul (h0, downs)", "p2 = MatMul (h0, downs) p1 = Add (p2, end_bs)")
    check_refused(dataclasses.replace(LLAMA4, total=total), "still adds to it")


APART = {
    "expert": "x{e} = Mul (x, c{e}) a{e} = MatMul (x{e}, up{e}) hid{e} = Relu (a{e}) y{e} = MatMul (hid{e}, down{e})",
    "term": "",
}
SCALED_SUMS = {
    "chain": "y = Sum (y0, y1, y2, y3)",
    "with a shared expert": "other = MatMul (x, shared) r0 = Add (other, y0) r1 = Add (r0, y2) r2 = Add (r1, x) "
    "r3 = Add (r2, y1) y = Add (r3, y3)",
    "stack": "s0 = Concat <axis = 0> ({wide0}) y = ReduceSum <keepdims = 0> (s0, first)",
}


def scaled(total: str, expert: str = APART["expert"]) -> Dense:
    column = COLUMNS["slice"]
    return Dense(
        gates=GATES["sigmoid-of-scatter"], column="", term="", expert=f"{column} {expert}", total=total
    )


@pytest.mark.parametrize("total", SCALED_SUMS)
def test_weighted_tokens_of_experts_apart(total: str) -> None:
    proto = scaled(SCALED_SUMS[total]).model()
    model, outcome = recognised(proto)
    assert (outcome.rewritten, outcome.refusals) == (1, ())
    [block] = blocks(model)
    assert (block.experts, block.top_k) == (E, 1)
    again = RecogniseDenseMask()(model)
    assert not again.modified and again.matched == 0
    for x in tokens():
        assert_close(run_model(ir.from_proto(proto), {"x": x})[0], run_model(model, {"x": x})[0], 2e-6)


def test_weighted_tokens_of_experts_apart_that_are_no_block() -> None:
    total = SCALED_SUMS["chain"]
    biased = APART["expert"].replace("MatMul (x{e}, up{e})", "Gemm (x{e}, up{e}, b{e})")
    check_refused(scaled(total, biased), "still adds to it")
    check_refused(scaled("y = Sum (y0, y1, y2)"), "expert 3 is missing")
    others = APART["expert"].replace("x{e} = Mul (x,", "o{e} = Add (x, b{e}) x{e} = Mul (o{e},")
    shifts = {f"b{e}": np.full(D, e / 8, np.float32) for e in range(E)}
    check_refused(dataclasses.replace(scaled(total, others), weights=shifts), "weight different rows")


def test_weights_of_an_expert_chosen_twice_do_not_add_up() -> None:
    """``expert((u + v) x)`` is not ``expert(u x) + expert(v x)``."""
    wild = "wild = Gather (table, ids) " + GATES["one-hot"].replace("ids,", "wild,")
    table = {"table": np.array([0, 0, 2, 3])}
    twice = dataclasses.replace(scaled(SCALED_SUMS["chain"]), gates=wild, weights=table)
    check_refused(twice, "not proved to differ")
    check_refused(dataclasses.replace(LLAMA4, gates=wild, weights=table), "not proved to differ")


def test_an_einsum_of_three_operands() -> None:
    total = (
        'h0 = Einsum <equation = "td,edi->eti"> (x, ups) h1 = Relu (h0) '
        'y = Einsum <equation = "te,eti,eid->td"> (g, h1, downs)'
    )
    check_refused(Dense(expert="", column="", term="", total=total), "one einsum of three operands")


def test_blocks_in_a_branch() -> None:
    """The experts run in an If: the block is lifted where it stands."""
    dense = Dense()
    proto = dense.model()
    inner = onnx.helper.make_graph(proto.graph.node, "then", [], [proto.graph.output[0]])
    other = onnx.helper.make_node("Identity", ["x"], ["y_else"])
    kept = onnx.helper.make_tensor_value_info("y_else", 1, ["T", D])
    branch = onnx.helper.make_graph([other], "else", [], [kept])
    node = onnx.helper.make_node("If", ["condition"], ["out"], then_branch=inner, else_branch=branch)
    proto.graph.ClearField("node")
    proto.graph.node.append(node)
    proto.graph.input.append(onnx.helper.make_tensor_value_info("condition", 9, []))
    proto.graph.ClearField("output")
    proto.graph.ClearField("value_info")
    proto.graph.output.append(onnx.helper.make_tensor_value_info("out", 1, ["T", D]))
    model, outcome = recognised(proto)
    assert (outcome.rewritten, outcome.refusals) == (1, ())
    for x in tokens()[:2]:
        for condition in (True, False):
            feeds = {"x": x, "condition": np.array(condition)}
            assert_close(run_model(ir.from_proto(proto), feeds)[0], run_model(model, feeds)[0], 2e-6)


@pytest.mark.parametrize("name", NEAR_MISSES)
def test_near_misses(name: str) -> None:
    changes, reason = NEAR_MISSES[name]
    check_refused(Dense(**changes), reason)


def test_a_permuted_sum_is_a_block() -> None:
    """Columns in another order are the same experts under other numbers."""
    numbers = {f"m{e}": np.array(other) for e, other in enumerate((2, 0, 3, 1))}
    column = "q{e} = Gather <axis = 1> (g, m{e}) c{e} = Unsqueeze (q{e}, last)"
    check_lifted(Dense(column=column, weights=numbers))


@pytest.mark.parametrize(
    ("name", "count"),
    [("mobius-mixtral-densemask", 2), ("module-all-experts-scatter-mask", 1), ("module-soft-mixture", 0)],
)
def test_corpus(name: str, count: int) -> None:
    path = CORPUS / f"{name}.onnx"
    if not path.exists():
        pytest.skip("the shared corpus is not beside this checkout")
    _, outcome = recognised(onnx.load(path))
    assert outcome.rewritten == count
    assert [refusal.reason for refusal in outcome.refusals] == (
        [] if count else ["soft mixture: every expert takes part in every token"]
    )
