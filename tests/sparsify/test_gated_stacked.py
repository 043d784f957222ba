"""Gated layers and experts with nothing in between: each reads what the one before it was rewritten to."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from builders import Shape, finish, layered_model
from dense_layers import prepared
from gated_after import LEVEL, TABLE, after, close, plan_for
from gated_models import Net, expected, gated_model, rows
from harness import run_model

from sparse_onnx.optimize.watched import check_layers
from sparse_onnx.passes.fuse_gating import FuseGating
from sparse_onnx.passes.insert_thresholds import InsertThresholds
from sparse_onnx.sparsify.plan import MODES, Mode


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("biases", [False, True])
def test_layers(mode: Mode, biases: bool) -> None:
    net = Net(bare=True, layers=3, biases=biases)
    changed, outcome = after(gated_model(net), mode)
    assert outcome.rewritten == 3
    for tokens in (1, 7):
        feeds = rows(net, tokens, tokens)
        for level in (0, 20):
            taus = [TABLE[level] + (at / 10 if level else 0) for at in range(3)]
            actual = run_model(changed, feeds | {LEVEL: np.array(level)})[0]
            assert close(expected(net, feeds["x"], taus), actual, 5e-6), (tokens, level)
    reached, error = check_layers(changed, LEVEL, 20, [rows(net, 9)], kernels=False)
    assert reached == 3 and error < 2e-6


def experts_behind(separate: bool, before: str) -> ir.Model:
    """Experts whose tokens are what a gated layer, or a block before them, computes."""
    shape = Shape(hidden=32, inner=40, biases=True, separate=separate)
    model = ir.to_proto(layered_model(shape, layers=2 if before == "block" else 1))
    if before == "block":  # without the residual
        last, start = next(n for n in model.graph.node if n.output[0] == "layers.0.out"), "layers.0.moe"
        model.graph.node.remove(last)
        for node in model.graph.node:
            node.input[:] = [start if name == "layers.0.out" else name for name in node.input]
        return finish(model.graph)
    first = gated_model(Net(bare=True, layers=1))
    first.graph.node[-1].output[0] = "between"
    for node in model.graph.node:
        node.input[:] = ["layers.0.down.result" if name == "x" else name for name in node.input]
        node.name = f"second.{node.name}"
    nodes = [*first.graph.node, *model.graph.node]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    model.graph.initializer.extend(first.graph.initializer)
    return finish(model.graph)


@pytest.mark.parametrize("mode", ["native", "simulate"])
@pytest.mark.parametrize("separate", [False, True])
@pytest.mark.parametrize("before", ["block", "layer"])
def test_experts(mode: Mode, separate: bool, before: str) -> None:
    model, dense = (prepared(experts_behind(separate, before)) for _ in range(2))
    outcome = InsertThresholds(plan_for(model, mode))(model)
    assert outcome.rewritten == 2
    assert FuseGating()(model).rewritten == (2 if before == "block" else 1)
    onnx.checker.check_model(ir.to_proto(model), full_check=True)
    for tokens in (1, 30):
        feeds = rows(Net(), tokens, tokens)
        plain = run_model(dense, feeds)[0]
        assert close(plain, run_model(model, feeds | {LEVEL: np.array(0)})[0], 3e-6)
        assert not close(plain, run_model(model, feeds)[0], 1e-2)
    reached, error = check_layers(model, LEVEL, 50, [rows(Net(), 30)], kernels=False)
    assert reached == (8 if before == "block" else 5) and error < 2e-6
