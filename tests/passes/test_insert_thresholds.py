"""Thresholded layers against numpy in every mode, spelling and type; what is left alone; experts."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from builders import Shape, layered_model
from dense_layers import Net, dense_model, plan_for, prepared, rows
from harness import run_model
from onnx import TensorProto, helper, numpy_helper

from sparse_onnx.core.errors import UsageError
from sparse_onnx.core.passes import Outcome, parse_options
from sparse_onnx.matching.sites import sites
from sparse_onnx.optimize.watched import check_layers
from sparse_onnx.passes.branch_experts import BranchExperts
from sparse_onnx.passes.fuse_gating import FuseGating
from sparse_onnx.passes.fuse_moe_op import FuseMoEOp
from sparse_onnx.passes.insert_thresholds import InsertThresholds
from sparse_onnx.sparsify.plan import MODES, Mode, Plan
from sparse_onnx.sparsify.record import acting, thresholds_of
from sparse_onnx.verify.inputs import sized_inputs

LEVEL = "sparsity_level"
SPELLINGS = ("matmul", "gemm", "transposed")


def after(model: onnx.ModelProto, plan: Plan) -> tuple[ir.Model, Outcome]:
    changed = prepared(ir.from_proto(copy.deepcopy(model)))
    outcome = InsertThresholds(plan)(changed)
    assert isinstance(outcome, Outcome)
    onnx.checker.check_model(ir.to_proto(changed), full_check=True)
    return changed, outcome


def close(expected: np.ndarray, actual: np.ndarray, tolerance: float) -> bool:
    scale = np.abs(expected.astype(np.float64)).max()
    return bool(np.abs(actual.astype(np.float64) - expected).max() <= tolerance * scale)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("top_k", [False, True])
@pytest.mark.parametrize("centre", ["zero", "one", "each"])
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_mode_is_what_numpy_says(mode: Mode, top_k: bool, centre: str, spelling: str) -> None:
    net = Net(spelling=spelling)
    model = dense_model(net)
    before = prepared(ir.from_proto(copy.deepcopy(model)))
    changed, outcome = after(model, plan_for(before, mode, top_k=top_k, centre=centre))
    assert outcome.rewritten == 4 and outcome.modified
    assert [refusal.reason for refusal in outcome.refusals] == []
    feeds = [rows(net, tokens, tokens) for tokens in (1, 2, 5, 40)]
    for level in (0, 30, 77):
        reached, error = check_layers(changed, LEVEL, level, feeds, kernels=False)
        assert reached == 4 and error < 2e-6
    for each in feeds:
        dense = run_model(before, each)[0]
        for optimized in (0, 99):
            at = {
                level: run_model(changed, each | {LEVEL: np.array(level)}, level=optimized)[0]
                for level in (0, 50)
            }
            assert close(dense, at[0], 1e-6), "at 0 nothing is skipped"
            assert not close(dense, at[50], 1e-2)
            assert np.array_equal(run_model(changed, each, level=optimized)[0], at[50]), (
                "the level it was made for"
            )


@pytest.mark.parametrize("mode", MODES)
def test_levels_out_of_range_are_the_nearest(mode: Mode) -> None:
    model = dense_model()
    changed, _ = after(model, plan_for(prepared(ir.from_proto(model)), mode))
    feeds = rows(Net(), 7, 0)
    for given, same in ((-5, 0), (101, 100), (2**62, 100)):
        results = [run_model(changed, feeds | {LEVEL: np.array(level)})[0] for level in (given, same)]
        assert np.array_equal(*results)


def test_no_tokens_and_what_is_no_number() -> None:
    model = dense_model()
    for mode in MODES:
        changed, _ = after(model, plan_for(prepared(ir.from_proto(copy.deepcopy(model))), mode))
        assert run_model(changed, rows(Net(), 0, 0))[0].shape == (0, 48)
        feeds = rows(Net(), 3, 0)
        feeds["x"][1, 5] = np.nan
        result = run_model(changed, feeds)[0]
        assert np.isnan(result[1]).all() and np.isfinite(result[[0, 2]]).all()


def test_a_bias_behind_a_layer_is_folded_and_weights_are_not_kept_twice() -> None:
    for spelling in SPELLINGS:
        model = dense_model(Net(spelling=spelling))
        before = prepared(ir.from_proto(copy.deepcopy(model)))
        changed, _ = after(model, plan_for(before, "native"))
        kinds = [node.op_type for node in changed.graph]
        assert kinds.count("ThresholdedLinear") == 4 and not {"MatMul", "Gemm", "Transpose"} & set(kinds)
        assert kinds.count("Add") == 2, "the residuals alone"
        matrices = [
            v for v in changed.graph.initializers.values() if v.shape is not None and len(v.shape) == 2
        ]
        shapes = sorted(tuple(value.shape.numpy()) for value in matrices if value.shape is not None)
        assert shapes == [(48, 96), (48, 96), (96, 48), (96, 48), (101, 4)]


@pytest.mark.parametrize("top_k", [False, True])
def test_the_same_bytes_each_time_and_a_second_time_is_refused(top_k: bool) -> None:
    model = dense_model()
    plan = plan_for(prepared(ir.from_proto(copy.deepcopy(model))), "native", top_k=top_k)
    first, second = (after(model, plan)[0] for _ in range(2))
    proto = ir.to_proto(first).SerializeToString(deterministic=True)
    assert proto == ir.to_proto(second).SerializeToString(deterministic=True)
    outcome = InsertThresholds(plan)(first)
    assert not outcome.modified and "already" in outcome.refusals[0].reason
    assert ir.to_proto(first).SerializeToString(deterministic=True) == proto


def test_graphs_that_have_optional_inputs_or_the_name() -> None:
    model = dense_model()
    extra = numpy_helper.from_array(np.asarray(0.0, np.float32), "shift")
    model.graph.initializer.append(extra)
    model.graph.input.append(helper.make_tensor_value_info("shift", TensorProto.FLOAT, []))
    model.graph.input.append(helper.make_tensor_value_info(LEVEL, TensorProto.FLOAT, []))
    last = model.graph.node[-1]
    last.op_type = "Sum"
    last.input.extend(["shift", LEVEL])
    changed, outcome = after(model, plan_for(prepared(ir.from_proto(copy.deepcopy(model))), "native"))
    record = thresholds_of(changed)
    assert outcome.rewritten == 4 and record is not None and record.level_input == f"{LEVEL}_1"
    feeds = rows(Net(), 4, 0) | {LEVEL: np.array(1, np.float32)}
    dense = run_model(ir.from_proto(model), feeds)[0]
    at = {f"{LEVEL}_1": np.array(0), "shift": np.array(2, np.float32)}
    assert close(dense + 2, run_model(changed, feeds | at)[0], 1e-6)


def test_weights_that_a_caller_may_override_stay() -> None:
    model = dense_model()
    kind = helper.make_tensor_value_info("layers.0.up.weight", TensorProto.FLOAT, [48, 96])
    model.graph.input.append(kind)
    changed, outcome = after(model, plan_for(prepared(ir.from_proto(copy.deepcopy(model))), "native"))
    assert outcome.rewritten == 3
    assert any("layers.0.up.weight" in [v.name for v in node.inputs if v] for node in changed.graph)


def test_sites_that_skip_too_little_stay_dense() -> None:
    model = dense_model()
    plan = plan_for(prepared(ir.from_proto(copy.deepcopy(model))), "native", least=0.4, level=30)
    few = {
        name: dataclasses.replace(site, sparsity=site.sparsity / (1 if name.endswith("down") else 2))
        for name, site in plan.sites.items()
    }
    changed, outcome = after(model, dataclasses.replace(plan, sites=few, level=50))
    assert outcome.rewritten == 2 and len(outcome.refusals) == 2
    assert all("25% of its inputs would be skipped" in refusal.reason for refusal in outcome.refusals)
    record = thresholds_of(changed)
    assert record is not None and record.left_dense == ("layers.0.up", "layers.1.up")


def test_float16(kernels: Path) -> None:
    net = Net(dtype="float16")
    model = dense_model(net)
    before = prepared(ir.from_proto(copy.deepcopy(model)))
    for mode in MODES:
        changed, outcome = after(model, plan_for(before, mode))
        assert outcome.rewritten == 4
        feeds = [rows(net, tokens, tokens) for tokens in (1, 9)]
        for kernels in (False, True) if mode == "native" else (False,):
            reached, _ = check_layers(changed, LEVEL, 40, feeds, kernels=kernels)
            assert reached == 4
        assert close(
            run_model(before, feeds[1])[0], run_model(changed, feeds[1] | {LEVEL: np.array(0)})[0], 5e-3
        )


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("top_k", [False, True])
@pytest.mark.parametrize(
    "lowering", [FuseGating(), BranchExperts(style="expert")], ids=lambda each: each.form
)
def test_experts(mode: Mode, top_k: bool, lowering: FuseGating | BranchExperts) -> None:
    shapes = [Shape(biases=True), Shape(separate=True, weight_layout=1)]
    shapes.append(Shape(experts=10, activation=3, gate_layout=0))
    for shape in shapes if mode == "native" and not top_k else shapes[:1]:
        before = layered_model(shape)
        model = layered_model(shape)
        assert InsertThresholds(plan_for(model, mode, top_k=top_k))(model).rewritten == 4
        outcome = lowering(model)
        assert outcome.rewritten == 2 and not outcome.refusals
        onnx.checker.check_model(ir.to_proto(model), full_check=True)
        matrices = 3 if shape.separate else 2
        assert len(acting(model)) == 2 * shape.experts * matrices
        feeds = [sized_inputs(before, 1, size, seed=size) for size in (1, 40)]
        if isinstance(lowering, FuseGating):
            reached, error = check_layers(model, LEVEL, 40, feeds, kernels=False)
            assert reached == 2 * shape.experts * matrices and error < 2e-6
        for each in feeds:
            dense = run_model(before, each)[0]
            assert close(dense, run_model(model, each | {LEVEL: np.array(0)})[0], 3e-6)
            assert not close(dense, run_model(model, each)[0], 1e-2)


def test_experts_in_one_operator_are_no_layers() -> None:
    model = layered_model(Shape())
    InsertThresholds(plan_for(model, "native"))(model)
    outcome = FuseMoEOp()(model)
    assert outcome.rewritten == 0
    assert all("experts' layers" in refusal.reason for refusal in outcome.refusals)
    outcome = BranchExperts(style="loop")(model)
    assert outcome.rewritten == 0 and "loops over experts" in outcome.refusals[0].reason


def test_routers_and_heads_are_never_touched() -> None:
    model = layered_model(Shape())
    outcome = InsertThresholds(plan_for(model, "native"))(model)
    assert [refusal.node for refusal in outcome.refusals] == ["layers.0.logits", "layers.1.logits"]
    assert all(
        "router" in refusal.reason and refusal.by == "insert_thresholds" for refusal in outcome.refusals
    )


def test_nothing_without_a_calibration() -> None:
    model = prepared(ir.from_proto(dense_model()))
    outcome = InsertThresholds()(model)
    assert not outcome.modified and "no calibration" in outcome.refusals[0].reason
    with pytest.raises(UsageError, match="is not Plan"):
        parse_options(InsertThresholds, {"plan": "CALIB.json"})


def test_a_plan_of_another_width_is_refused() -> None:
    model = dense_model()
    plan = plan_for(prepared(ir.from_proto(copy.deepcopy(model))), "native", centre="each")
    wrong = {
        name: dataclasses.replace(site, centre=np.zeros(7, np.float32)) for name, site in plan.sites.items()
    }
    _, outcome = after(model, dataclasses.replace(plan, sites=wrong))
    assert outcome.rewritten == 0 and not outcome.modified
    assert all("the centre has 7 elements" in refusal.reason for refusal in outcome.refusals)


def test_layers_in_bodies() -> None:
    """An If whose branches hold layers on weights of the graph around them."""
    net = Net()
    model = dense_model(net)
    nodes = list(model.graph.node)
    body = helper.make_graph(
        nodes[:-1], "then", [], [helper.make_tensor_value_info("layers.1.out", TensorProto.FLOAT, ["T", 48])]
    )
    other = helper.make_graph(
        [helper.make_node("Identity", ["x"], ["same"], name="same")],
        "else",
        [],
        [helper.make_tensor_value_info("same", TensorProto.FLOAT, ["T", 48])],
    )
    del model.graph.node[:], model.graph.value_info[:]
    model.graph.input.append(helper.make_tensor_value_info("c", TensorProto.BOOL, []))
    model.graph.node.append(
        helper.make_node("If", ["c"], ["y"], name="if", then_branch=body, else_branch=other)
    )
    before = prepared(ir.from_proto(copy.deepcopy(model)))
    for mode in MODES:
        changed, outcome = after(model, plan_for(before, mode))
        assert outcome.rewritten == 4 and all(item.inner for item in acting(changed))
        for condition in (False, True):
            feeds = rows(net, 5, 1) | {"c": np.array(condition)}
            dense = run_model(before, feeds)[0]
            assert close(dense, run_model(changed, feeds | {LEVEL: np.array(0)})[0], 1e-6)
            assert close(dense, run_model(changed, feeds)[0], 1e-2) != condition


def test_what_a_file_says_of_thresholds_that_are_not_there_is_forgotten() -> None:
    model = dense_model()
    before = prepared(ir.from_proto(copy.deepcopy(model)))
    for node in model.graph.node:
        for key, value in (
            ("sparse_onnx.threshold", '{"site": "a", "input": "b", "bound": "c", "centre": "d", "nbytes": 1, '
             '"weight": "", "folded": ""}'),
            ("sparse_onnx.expert_thresholds", '{"fc1": {"site": 3}, "x": []}'),
        ):  # fmt: skip
            entry = node.metadata_props.add()
            entry.key, entry.value = key, value
    model.metadata_props.add(key="sparse_onnx.thresholds", value="[1, {")
    changed, outcome = after(model, plan_for(before, "native"))
    assert outcome.rewritten == 4
    assert [item.site for item in acting(changed)] == [site.name for site in sites(before)]
