"""Graphs at random, with choices within choices, of conditions that are computed, of sizes that are broadcast."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import onnx_ir as ir
import pytest
from any_body import Graph
from conditional_graphs import (
    FLAG,
    MASK,
    WIDTH,
    X,
    finished,
    layer,
    products,
    rows,
)
from harness import check_rewrite
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto

from sparse_onnx.passes.branch_conditions import BranchConditions


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
    st.integers(0, 3),
    st.integers(0, 3),
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
