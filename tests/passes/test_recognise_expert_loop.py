"""Loops over experts: exact where they are one, refused with the reason where one thing is off."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnx_ir.passes.common as common
import pytest
from harness import Feeds, assert_close, check_rewrite, run_model
from loop_models import Loop, lifted, ready, refused, rows

from sparse_onnx.core.passes import Outcome
from sparse_onnx.passes.recognise_expert_loop import RecogniseExpertLoop

CORPUS = Path(__file__).parents[3] / "shared" / "corpus"


def block(model: ir.Model) -> ir.Node:
    [node] = [node for node in model.graph if node.domain == "sparse_onnx"]
    return node


@pytest.mark.parametrize("add", ["gather", "elements", "add"])
@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_accumulators(add: str, top_k: int) -> None:
    after = lifted(Loop(add=add, top_k=top_k))
    assert block(after).metadata_props["sparse_onnx.spelling"] == "per-expert-loop"


def test_experts_in_any_order() -> None:
    lifted(Loop(order=(2, 0, 3, 1)))


def test_what_the_sum_began_with_stays_an_addition() -> None:
    after = lifted(Loop(change={"start": lambda g, e, v: g.op("Relu", "x")}))
    assert [node.op_type for node in after.graph][-3:] == ["MoE", "Add", "Identity"]


def test_what_is_added_behind_stays() -> None:
    after = lifted(Loop(change={"end": lambda g, e, v: g.op("Add", v, "x")}))
    assert [node.op_type for node in after.graph][-3:] == ["MoE", "Add", "Identity"]


def test_top_one_overwrites() -> None:
    lifted(Loop(top_k=1, add="overwrite"))


def test_top_one_overwrites_whatever_was_there() -> None:
    """Every token has an expert: what the sum began with is gone."""
    after = lifted(Loop(top_k=1, add="overwrite", change={"start": lambda g, e, v: g.op("Relu", "x")}))
    assert "Add" not in {node.op_type for node in after.graph}


def test_weight_behind_a_switch_loop() -> None:
    def unweighted(g: Loop, e: int, value: str) -> str:
        return g.nodes[-1].input[1]

    def weighted(g: Loop, e: int, value: str) -> str:
        return g.op("Mul", value, next(node.output[0] for node in g.nodes if node.op_type == "TopK"))

    after = lifted(Loop(top_k=1, add="overwrite", change={"y": unweighted, "end": weighted}))
    assert "Mul" not in {node.op_type for node in after.graph}
    after = lifted(Loop(top_k=1, add="overwrite", change={"y": unweighted}))
    assert "Expand" in {node.op_type for node in after.graph}, "a weight of one"


def test_weight_from_a_column_for_each_expert() -> None:
    """The mask is over any slot, the weight that of the expert among all."""

    class Columns(Loop):
        def coordinates(self, mask: str) -> tuple[str, str]:
            chosen = self.op("ReduceMax", self.op("Cast", mask, to=7), [-1], keepdims=0)
            token = self.op("Squeeze", self.op("NonZero", self.op("Cast", chosen, to=9)), [0])
            return token, token

        def build(self) -> onnx.ModelProto:
            self.change = {"y": self.scaled}
            return super().build()

        def scaled(self, g: Loop, e: int, value: str) -> str:
            product = g.nodes[-1].input
            dense = next(node.output[0] for node in g.nodes if node.op_type == "Softmax")
            column = g.op("Gather", dense, self.column(e), axis=1)
            token = next(node.output[0] for node in g.nodes[::-1] if node.op_type == "Squeeze")
            return g.op("Mul", product[1], g.op("Unsqueeze", g.op("Gather", column, token, axis=0), [1]))

        def column(self, e: int) -> int:
            return e

    after = lifted(Columns())
    assert "GatherElements" in {node.op_type for node in after.graph}

    class Other(Columns):
        def column(self, e: int) -> int:
            return 1 if e == 2 else e

    refused(Other(), "expert 2: its weight is that of expert 1")


def test_indices_of_no_router_are_guarded() -> None:
    """What is none of the experts adds nothing, before and after; a token may choose an expert twice."""
    rng = np.random.default_rng(2)
    given = [
        rows(12, seed)
        | {
            "ids": rng.integers(-2, 7, (12, 2)),
            "w": rng.standard_normal((12, 2)).astype(np.float32),
        }
        for seed in range(3)
    ]
    lifted(Loop(router=-1, add="add"), feeds=given)
    refused(Loop(router=-1, add="gather"), "nothing proves that a token's experts are different ones")


def test_an_expert_of_another_body_is_outlined() -> None:
    def normed(g: Loop, e: int, value: str) -> str:
        product = g.nodes.pop().input
        return g.op("Mul", product[0], g.op("Tanh", product[1]))

    after = lifted(Loop(change={"y": normed}))
    assert "Combine" in {node.op_type for node in after.graph}


def test_looks_like_nothing() -> None:
    """One scatter of what one comparison found is no mixture of experts: silence."""
    refused_nothing = Loop(experts=1, top_k=1, router=-1, add="add")
    check_rewrite(ready(refused_nothing.build()), RecogniseExpertLoop(), rewritten=0)


@pytest.mark.parametrize("name", ["module-mistral-reference-loop", "optimum-qwen3moe-loop"])
def test_corpus(name: str) -> None:
    path = CORPUS / f"{name}.onnx"
    if not path.exists():
        pytest.skip("the corpus of exported models is not here")
    proto = onnx.shape_inference.infer_shapes(onnx.load(path), data_prop=True)
    model = ir.from_proto(proto)
    for prepare in (common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),):
        prepare(model)
    model = ready(ir.to_proto(model))
    expected = ir.from_proto(ir.to_proto(model))
    outcome = RecogniseExpertLoop()(model)
    assert isinstance(outcome, Outcome) and not outcome.refusals
    assert outcome.rewritten == (2 if "qwen" in name else 1)
    for given in _inputs(expected):
        for left, right in zip(run_model(expected, given), run_model(model, given), strict=True):
            assert_close(left, right, 1e-5)


def _inputs(model: ir.Model) -> list[Feeds]:
    made = []
    for batch, length in ((1, 1), (2, 7), (3, 11)):
        rng = np.random.default_rng(length)
        given: Feeds = {}
        for value in model.graph.inputs:
            if value.name == "attention_mask":
                given[value.name] = np.ones((batch, length), np.int64)
            elif value.name == "position_ids":
                given[value.name] = np.tile(np.arange(length), (batch, 1))
            elif value.dtype == ir.DataType.INT64:
                given[value.name or ""] = rng.integers(0, 90, (batch, length))
            else:
                given[value.name or ""] = rng.standard_normal((batch, length, 32)).astype(np.float32)
        made.append(given)
    return made
