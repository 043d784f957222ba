"""Gated layers that skip units by their gate, in every mode, spelling and type, against numpy."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from builders import Shape, routed_model
from dense_layers import prepared
from gated_after import LEVEL, TABLE, after, close, plan_for
from gated_models import Net, expected, gated_model, quantized, rows
from harness import run_model
from onnx import helper, numpy_helper

from sparse_onnx.kernels import build
from sparse_onnx.optimize.kept_weights import compare_weights
from sparse_onnx.optimize.watched import EXACT, Dialled, check_layers, measure_skipping
from sparse_onnx.passes.insert_thresholds import InsertThresholds
from sparse_onnx.sparsify.plan import MODES, Mode
from sparse_onnx.sparsify.record import ACTING_KEY, acting
from sparse_onnx.targets import session as sessions


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh", "erf", "relu"])
@pytest.mark.parametrize("spelling", ["matmul", "gemm", "transposed"])
@pytest.mark.parametrize("biases", [False, True])
def test_every_mode_is_what_numpy_says(mode: Mode, activation: str, spelling: str, biases: bool) -> None:
    net = Net(activation=activation, spelling=spelling, biases=biases)
    model = gated_model(net)
    changed, outcome = after(model, mode)
    assert outcome.rewritten == outcome.matched == 2 and outcome.refusals == ()
    dense = prepared(ir.from_proto(copy.deepcopy(model)))
    for tokens in (0, 1, 2, 40):
        feeds = rows(net, tokens, tokens)
        for level in (0, 1, 50):
            actual = run_model(changed, feeds | {LEVEL: np.array(level)})[0]
            taus = [-1.0, -1.0] if not level else [TABLE[level], TABLE[level] + 0.1]
            assert actual.shape == (tokens, net.width)
            if tokens:
                assert close(expected(net, feeds["x"], taus), actual, 3e-6), (tokens, level)
        if tokens:
            plain = run_model(dense, feeds)[0]
            assert close(plain, run_model(changed, feeds | {LEVEL: np.array(0)})[0], 1e-6), "0 is dense"
            assert not close(plain, run_model(changed, feeds)[0], 1e-2), "the level it was made for is not"
    reached, error = check_layers(changed, LEVEL, 50, [rows(net, 9)], kernels=False)
    assert reached == 2 and error < 2e-6


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("shape", [(1,), (1, 1)])
def test_one_bias_of_all_units(mode: Mode, shape: tuple[int, ...]) -> None:
    model = gated_model()
    for item in model.graph.initializer:
        if item.name.endswith("up.bias"):
            item.CopyFrom(numpy_helper.from_array(np.full(shape, 0.7, np.float32), item.name))
    changed, outcome = after(model, mode)
    assert outcome.rewritten == 2
    dense = prepared(ir.from_proto(copy.deepcopy(model)))
    for tokens in (1, 5):
        feeds = rows(Net(), tokens)
        plain = run_model(dense, feeds)[0]
        assert close(plain, run_model(changed, feeds | {LEVEL: np.array(0)})[0], 1e-6)
    reached, error = check_layers(changed, LEVEL, 50, [rows(Net(), 9)], kernels=False)
    assert reached == 2 and error < 2e-6
    if mode != "simulate":
        assert compare_weights(dense, changed) == 2


def test_the_native_kernels_run_it(tmp_path: Path) -> None:
    build()
    changed, _ = after(gated_model(), "native")
    reached, error = check_layers(changed, LEVEL, 50, [rows(Net(), 1), rows(Net(), 7)], kernels=True)
    assert reached == 2 and error < 2e-6


def test_up_lies_by_unit_and_nothing_is_kept_twice() -> None:
    for spelling in ("matmul", "gemm", "transposed"):
        changed, _ = after(gated_model(Net(spelling=spelling)), "native")
        kinds = [node.op_type for node in changed.graph]
        assert kinds.count("ThresholdedGatedMLP") == 2
        assert kinds.count("Gemm" if spelling == "gemm" else "MatMul") == 2, "the gates alone"
        found = {v.name: tuple(v.shape.numpy()) for v in changed.graph.initializers.values() if v.shape}
        matrices = [shape for shape in found.values() if len(shape) == 2]
        gate = (32, 72) if spelling == "matmul" else (72, 32)
        assert sorted(matrices) == sorted([gate, (72, 32), (72, 32)] * 2 + [(101, 2)])


def test_half_precision() -> None:
    net = Net(dtype="float16", layers=1)
    for mode in MODES:
        changed, outcome = after(gated_model(net), mode)
        assert outcome.rewritten == 1
        feeds = rows(net, 20)
        reached, error = check_layers(changed, LEVEL, 50, [feeds], kernels=False)
        assert reached == 1 and error < 2e-2
        actual = run_model(changed, feeds | {LEVEL: np.array(0)})[0]
        assert close(expected(net, feeds["x"], [-1.0]), actual, 1e-2)


def test_what_is_no_number_comes_out_as_such() -> None:
    for mode in MODES:
        changed, _ = after(gated_model(), mode)
        feeds = rows(Net(), 3)
        feeds["x"][1, 5] = np.nan
        result = run_model(changed, feeds)[0]
        assert np.isnan(result[1]).all() and np.isfinite(result[[0, 2]]).all()


def test_what_is_skipped_is_counted() -> None:
    net = Net()
    changed, _ = after(gated_model(net), "native")
    seen = measure_skipping(changed, LEVEL, 50, [rows(net, 200)])
    assert len(seen) == 2 and all(0.3 < each.share < 0.95 for each in seen.values() if each.share)
    none = measure_skipping(changed, LEVEL, 0, [rows(net, 200)])
    assert {each.share for each in none.values()} == {0.0}


@pytest.mark.parametrize(("bits", "op"), [(4, "nbits"), (8, "nbits"), (8, "dq")])
def test_integers_stay_integers(bits: int, op: str) -> None:
    build()
    net = Net(width=32, units=64)
    model = quantized(net, bits, op)
    changed, outcome = after(model, "native")
    assert outcome.rewritten == 2, [refusal.reason for refusal in outcome.refusals]
    assert [node.op_type for node in changed.graph].count("ThresholdedGatedMLPNBits") == 2
    dense = prepared(ir.from_proto(copy.deepcopy(model)))
    feeds = rows(net, 5)
    for kernels in (False, True):
        reached, error = check_layers(changed, LEVEL, 50, [feeds], kernels=kernels)
        assert reached == 2 and error < 3e-6
    [off] = Dialled(changed, LEVEL)(feeds, 0)  # in which no product rounds activations
    session = sessions.create_session(dense, entries=EXACT)
    assert close(sessions.run(session, feeds)[0], off, 1e-5)
    _, gathered = after(model, "gather")
    assert gathered.rewritten == 0 and "not gathered" in gathered.refusals[0].reason


def test_a_layer_that_skips_too_little_stays_dense() -> None:
    model = prepared(ir.from_proto(gated_model()))
    plan = plan_for(model, "native", least=0.6)
    outcome = InsertThresholds(plan)(model)
    assert not outcome.modified and "does not pay" in outcome.refusals[0].reason and not acting(model)


def test_metadata_that_is_not_whole_is_no_layer() -> None:
    model, _ = after(gated_model(), "native")
    [_, second] = acting(model)
    node = next(node for node in model.graph if ACTING_KEY in node.metadata_props)
    entry = json.loads(node.metadata_props[ACTING_KEY])
    del entry["bound"]
    node.metadata_props[ACTING_KEY] = json.dumps(entry)
    assert acting(model) == [second]


def test_a_bias_of_both_gate_and_up_that_is_quantized() -> None:
    model = ir.to_proto(routed_model(Shape(biases=True)))
    [bias] = [item for item in model.graph.initializer if item.name == "fc1_bias"]
    numbers = np.random.default_rng(0).integers(-9, 9, tuple(bias.dims)).astype(np.int8)
    bias.CopyFrom(numpy_helper.from_array(numbers, "q"))
    model.graph.initializer.append(numpy_helper.from_array(np.float32(0.1), "s"))
    model.graph.node.insert(0, helper.make_node("DequantizeLinear", ["q", "s"], ["fc1_bias"], name="dq"))
    changed = prepared(ir.from_proto(model))
    outcome = InsertThresholds(plan_for(changed, "native"))(changed)
    assert not outcome.modified and not acting(changed)
    assert any("bias of its experts' gate and up" in refusal.reason for refusal in outcome.refusals)


def test_a_second_time_is_refused_and_the_bytes_are_the_same() -> None:
    first, second = (after(gated_model(), "native")[0] for _ in range(2))
    texts = [ir.to_proto(each).SerializeToString(deterministic=True) for each in (first, second)]
    assert texts[0] == texts[1]
    plan = plan_for(prepared(ir.from_proto(gated_model())), "native")
    outcome = InsertThresholds(plan)(first)
    assert not outcome.modified and "already" in outcome.refusals[0].reason
