"""Experts on rows sorted by expert: every way to write them is lifted and exact, and what is not quite one is not."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from grouped_graphs import grouped
from harness import assert_close, run_model
from onnx_ir.passes import common

from sparse_onnx.blocks import blocks
from sparse_onnx.core.passes import Outcome
from sparse_onnx.passes.fuse_gating import FuseGating
from sparse_onnx.passes.recognise_grouped import RecogniseGrouped


def recognised(proto: onnx.ModelProto) -> tuple[ir.Model, Outcome]:
    model = ir.from_proto(onnx.ModelProto.FromString(proto.SerializeToString()))
    common.LiftConstantsToInitializersPass()(model)
    return model, RecogniseGrouped()(model)


def check_lifted(proto: onnx.ModelProto, experts: int = 4, top_k: int = 2) -> ir.Model:
    """One block, of these sizes; the same numbers lowered; found once only."""
    model, outcome = recognised(proto)
    assert (outcome.matched, outcome.rewritten, outcome.refusals) == (1, 1, ())
    [block] = blocks(model)
    assert (block.experts, block.top_k) == (experts, top_k)
    assert not any(node.op_type in ("CumSum", "ScatterND", "ScatterElements") for node in model.graph)
    again = RecogniseGrouped()(model)
    assert not again.modified and again.matched == 0
    FuseGating()(model)
    before = ir.from_proto(proto)
    rng = np.random.default_rng(5)
    some = rng.standard_normal((33, 8)).astype(np.float32)
    for x in (some, some[:1], np.tile(some[:1], (9, 1)), np.zeros((5, 8), np.float32)):
        for old, new in zip(run_model(before, {"x": x}), run_model(model, {"x": x}), strict=True):
            assert_close(old, new, 2e-6)
    lowered = RecogniseGrouped()(model)
    assert (lowered.matched, lowered.modified) == (0, False)
    return model


COUNTS = ("histc", "scatter", "one-hot", "equal", "apart", "rows")
CUTS = ("range", "slice", "split", "running", "exclusive")


@pytest.mark.parametrize(("counts", "cut"), [*itertools.product(COUNTS, CUTS)])
def test_counts_and_segments(counts: str, cut: str) -> None:
    check_lifted(grouped(counts=counts, cut=cut))


@pytest.mark.parametrize("division", ["div", "chain", "float", "shift"])
@pytest.mark.parametrize("back", ["inverse", "argsort", "rows", "put", "add", "add-elements"])
def test_ways_there_and_back(division: str, back: str) -> None:
    check_lifted(grouped(division=division, back=back))


@pytest.mark.parametrize(
    "options",
    [
        {"bias": True},
        {"whole": True},
        {"early": False},
        {"early": False, "whole": True, "back": "put"},
        {"bias": True, "cut": "range"},
    ],
)
def test_experts_and_weights(options: dict[str, Any]) -> None:
    check_lifted(grouped(**options))


@pytest.mark.parametrize(("experts", "top_k"), [(2, 1), (2, 2), (3, 1), (7, 3), (9, 4)])
@pytest.mark.parametrize("back", ["inverse", "rows", "put", "add"])
def test_sizes(experts: int, top_k: int, back: str) -> None:
    check_lifted(
        grouped(experts=experts, top_k=top_k, back=back, counts="histc", cut="range"), experts, top_k
    )


NEAR_MISSES: dict[str, tuple[dict[str, Any], str]] = {
    "descending": ({}, "not proved to be sorted by expert, smallest id first"),
    "other ids": ({}, "is not proved to be the ids that are sorted"),
    "swapped": ({"cut": "range"}, "place 0 of a projection runs on the rows of expert 1"),
    "missing expert": ({"cut": "slice"}, "not proved to be below 3"),
    "another permutation": ({}, "is not proved to be the ids that are sorted"),
    "wrong K": ({}, "a token has 2 experts, but the rows are taken as if it had 3"),
    "clipped": ({}, "is not proved to be tokens in sorted order"),
    "bins": ({}, "the ids are counted in 5 bins"),
    "histc": ({"counts": "histc"}, "is not proved to be the ids that are sorted"),
    "used elsewhere": ({}, "a value of an expert is used elsewhere"),
    "ids beyond": ({"cut": "slice"}, "not proved to be below 4"),
    "sentinel": ({"cut": "slice"}, "not proved to be below 4"),
    "shifted": ({"cut": "slice"}, "place 0 of a projection runs on the rows of expert 1"),
    "unsorted bias": ({"bias": True}, "is picked by other ids than the sorted ones"),
    "weights of another order": ({}, "is not proved to be the routing weight of each slot"),
    "wrong sum": ({}, "is not proved to be the 2 rows of each token"),
    "no weight": ({}, "no routing weight is applied"),
    "counted from one": ({"cut": "slice"}, "the bounds of its rows are not proved"),
    "base": ({"back": "add"}, "is not proved to be all zeros"),
    "exclusive ends": ({"cut": "slice"}, "its rows are those of experts 0 to -1"),
    "other tokens": ({}, "are not proved to be 2 for each row of 'z'"),
    "another activation": ({"whole": True}, "expert 1"),
    "norm": ({}, "expert 0: no product with a constant matrix"),
}


@pytest.mark.parametrize("wrong", NEAR_MISSES)
def test_near_miss(wrong: str) -> None:
    options, reason = NEAR_MISSES[wrong]
    check_lifted(grouped(**options))  # without the change it is a block
    proto = grouped(**options, wrong=wrong)
    model, outcome = recognised(proto)
    untouched = ir.from_proto(onnx.ModelProto.FromString(proto.SerializeToString()))
    common.LiftConstantsToInitializersPass()(untouched)
    [refusal] = outcome.refusals
    assert reason in refusal.reason
    assert refusal.node and refusal.hint and refusal.by == "recognise_grouped"
    assert (outcome.matched, outcome.rewritten, outcome.modified) == (1, 0, False)
    assert ir.to_proto(model).SerializeToString(True) == ir.to_proto(untouched).SerializeToString(True)


@pytest.mark.parametrize("back", ["inverse", "put"])
def test_experts_that_read_other_rows(back: str) -> None:
    """The second expert's segment is one of rows of 2 x."""
    proto = grouped(whole=True, cut="slice", back=back)
    [rows] = [node for node in proto.graph.node if node.op_type == "GatherND"][:1]
    pieces = [
        node for node in proto.graph.node if node.op_type == "Slice" and node.input[0] == rows.output[0]
    ]
    pieces[1].input[0] = "doubled"
    at = list(proto.graph.node).index(rows)
    proto.graph.node.insert(at, onnx.helper.make_node("GatherND", ["twice", rows.input[1]], ["doubled"]))
    proto.graph.node.insert(at, onnx.helper.make_node("Add", ["x", "x"], ["twice"]))
    _, outcome = recognised(onnx.shape_inference.infer_shapes(proto, data_prop=True))
    assert outcome.rewritten == 0 and "one expert reads" in outcome.refusals[0].reason


def test_rows_narrower_than_what_they_return_to() -> None:
    """ScatterElements would reach the first columns alone."""
    proto = grouped(back="add-elements", whole=True)
    for held in proto.graph.initializer:
        if list(held.dims) == [4, 6, 8]:
            held.CopyFrom(
                onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(held)[..., :3].copy(), held.name)
            )
    del proto.graph.value_info[:]
    _, outcome = recognised(onnx.shape_inference.infer_shapes(proto, data_prop=True))
    assert outcome.rewritten == 0 and "are not proved to be as wide as" in outcome.refusals[0].reason


def test_a_block_in_the_branch_of_an_if() -> None:
    inner = grouped()
    branch = inner.graph
    x = branch.input.pop()
    flag = onnx.helper.make_tensor_value_info("flag", onnx.TensorProto.BOOL, [])
    y = onnx.helper.make_tensor_value_info("z", onnx.TensorProto.FLOAT, None)
    other = onnx.helper.make_graph(
        [onnx.helper.make_node("Identity", ["x"], ["else"])],
        "other",
        [],
        [onnx.helper.make_tensor_value_info("else", onnx.TensorProto.FLOAT, None)],
    )
    choice = onnx.helper.make_node("If", ["flag"], ["z"], "choice", then_branch=branch, else_branch=other)
    graph = onnx.helper.make_graph([choice], "main", [x, flag], [y])
    proto = onnx.helper.make_model(graph, opset_imports=inner.opset_import, ir_version=10)
    model, outcome = recognised(proto)
    assert (outcome.rewritten, outcome.refusals) == (1, ())
    FuseGating()(model)
    feeds = {"x": np.random.default_rng(1).standard_normal((6, 8)).astype(np.float32)}
    for flagged in (True, False):
        both = feeds | {"flag": np.array(flagged)}
        assert_close(run_model(ir.from_proto(proto), both)[0], run_model(model, both)[0], 2e-6)


def test_sorts_of_other_things_are_passed_over_in_silence() -> None:
    text = """<ir_version: 10, opset_import: ["" : 18]>
    sorts (int64[N] keys, float[N,4] rows) => (float[N,4] y)
    { n = Shape(keys)
      ordered, order = TopK<axis=0, largest=0>(keys, n)
      y = Gather<axis=0>(rows, order) }"""
    _, outcome = recognised(onnx.parser.parse_model(text))
    assert (outcome.matched, outcome.refusals) == (0, ())


CORPUS = {
    "hf-mixtral-grouped": (2, "concatenated"),
    "hf-mixtral-grouped-ortfused": (2, "concatenated"),
    "hf-gptoss-grouped": (2, "interleaved"),
    "hf-deepseekv3-grouped": (1, "concatenated"),
}


@pytest.mark.parametrize("name", CORPUS)
def test_corpus(corpus: Path, name: str) -> None:
    before = ir.load(corpus / f"{name}.onnx")
    model = ir.load(corpus / f"{name}.onnx")
    outcome = RecogniseGrouped()(model)
    found = [(block.experts, block.top_k, block.spec.gate_layout.name.lower()) for block in blocks(model)]
    count, layout = CORPUS[name]
    assert outcome.refusals == ()
    assert found == [(8, 2, layout)] * count
    FuseGating()(model)
    ids = np.random.default_rng(2).integers(0, 250, (3, 11))
    feeds = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
    for old, new in zip(run_model(before, feeds), run_model(model, feeds), strict=True):
        assert_close(old, new, 1e-5)


@pytest.mark.parametrize(
    "name", ["torch-mixtral-batched", "module-topk-activation", "dense-llama", "optimum-qwen3moe-loop"]
)
def test_other_graphs_are_passed_over_in_silence(corpus: Path, name: str) -> None:
    outcome = RecogniseGrouped()(ir.load(corpus / f"{name}.onnx"))
    assert (outcome.matched, outcome.modified) == (0, False)
