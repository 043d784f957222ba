"""Thresholds in experts by one operator for all of them, which the form `gathered` is written with."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import gated_after
import numpy as np
import onnx
import onnx_ir as ir
import pytest
from builders import Shape, layered_model, routed_model, save_external
from dense_layers import plan_for, prepared
from harness import run_model
from in_bodies import in_body
from quantized_blocks import Storage, quantized_model

from sparse_onnx.blocks.lowering import Lowering
from sparse_onnx.core.errors import VerificationError
from sparse_onnx.core.passes import Outcome
from sparse_onnx.graph import io
from sparse_onnx.graph.stacked import Stacked
from sparse_onnx.optimize.watched import Dialled, check_layers
from sparse_onnx.passes.fuse_gating import FuseGating
from sparse_onnx.passes.gather_experts import GatherExperts
from sparse_onnx.passes.insert_thresholds import InsertThresholds
from sparse_onnx.sparsify.plan import Plan
from sparse_onnx.sparsify.record import acting
from sparse_onnx.verify.inputs import sized_inputs

LEVEL = "sparsity_level"
GATHERED = GatherExperts()
SHAPES = [
    Shape(biases=True),
    Shape(separate=True, weight_layout=1),
    Shape(experts=10, activation=3, gate_layout=0),
    Shape(gate_layout=2, top_k=1, limit=2.0, alpha=1.7, beta=1.0),
]


def lowered(model: ir.Model, plan: Plan, step: Lowering = GATHERED) -> ir.Model:
    InsertThresholds(plan)(model)
    outcome = step(model)
    assert isinstance(outcome, Outcome) and outcome.rewritten and not outcome.refusals
    onnx.checker.check_model(ir.to_proto(model), full_check=True)
    return model


def feeds_of(shape: Shape, tokens: int, dropped: bool = True) -> dict[str, np.ndarray]:
    rng, dtype = np.random.default_rng(tokens), np.dtype(shape.dtype)
    return {
        "tokens": rng.standard_normal((tokens, shape.hidden)).astype(dtype),
        "index": rng.integers(0, shape.experts + dropped, (tokens, shape.top_k)),
        "weight": rng.random((tokens, shape.top_k)).astype(shape.weight_dtype),
    }


def close(expected: np.ndarray, actual: np.ndarray, tolerance: float) -> bool:
    scale = np.abs(expected.astype(np.float64)).max(initial=1e-9)
    return bool(np.abs(actual.astype(np.float64) - expected).max(initial=0) <= tolerance * scale)


@pytest.mark.parametrize("top_k", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_every_layer_is_what_numpy_says_and_grouped_gives(shape: Shape, top_k: bool, kernels: Path) -> None:
    before = layered_model(shape)
    plan = plan_for(before, "native", top_k=top_k, centre="each")
    model, other = (lowered(layered_model(shape), plan, step) for step in (GATHERED, FuseGating()))
    kinds = [node.op_type for node in model.graph]
    layers = 2 * (3 if shape.separate else 2)
    assert kinds.count("ThresholdedExpertLinear") == layers == len(acting(model))
    assert "Gather" not in [node.op_type for node in model.graph if "experts" in (node.name or "")]
    feeds = [sized_inputs(before, 1, size, seed=size) for size in (1, 40)]
    for native in (False, True):
        reached, error = check_layers(model, LEVEL, 40, feeds, kernels=native)
        assert reached == layers and error < 2e-6
        for each in feeds:
            dense = run_model(before, each)[0]
            run = Dialled(model, LEVEL, kernels=native)
            assert close(dense, run(each, 0)[0], 3e-6), "at 0 nothing is skipped"
            assert not close(dense, run(each, 50)[0], 1e-2)
            assert close(Dialled(other, LEVEL)(each, 50)[0], run(each, 50)[0], 3e-6)
    sizes = {
        name: sum(item.nbytes for item in acting(each)) for name, each in (("all", model), ("own", other))
    }
    assert sizes["all"] == sizes["own"], "bytes of all experts"


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_slots_that_are_dropped_or_the_same_twice(dtype: str, kernels: Path) -> None:
    shape = Shape(biases=True, dtype=dtype, weight_dtype=dtype)
    model = lowered(routed_model(shape), plan_for(routed_model(shape), "native"))
    tolerance = 3e-6 if dtype == "float32" else 5e-3
    for tokens in (0, 1, 3, 40):
        feeds = feeds_of(shape, tokens)
        if tokens == 3:
            feeds["index"] = np.array([[1, 1], [4, 4], [4, 0]])
        for native in (False, True):
            run = Dialled(model, LEVEL, kernels=native)
            assert close(run_model(routed_model(shape), feeds)[0], run(feeds, 0)[0], tolerance)
            if tokens:
                assert check_layers(model, LEVEL, 50, [feeds], kernels=native)[0] == 2


STORAGES = [
    Storage("int8", 0, 0, "none", 18),
    Storage("int8", None, 0, "any", 21),
    Storage("uint8", 1, 16, "any", 21),
    Storage("int4", 1, 16, "zeros", 21),
    Storage("uint4", 2, 16, "any", 21),
    Storage("int4", 2, 32, "none", 21),
]


@pytest.mark.parametrize("weight_layout", [0, 1])
@pytest.mark.parametrize("storage", STORAGES, ids=lambda each: f"{each.kind}-{each.axis}-{each.block}")
def test_integers_stay_integers(storage: Storage, weight_layout: int, kernels: Path) -> None:
    shape = Shape(hidden=32, inner=64, separate=True, weight_layout=weight_layout)

    def made() -> ir.Model:
        return prepared(quantized_model(shape, storage))

    model = lowered(made(), plan_for(made(), "native", centre="each"))
    kinds = [node.op_type for node in model.graph]
    assert kinds.count("ThresholdedExpertLinearNBits") == 3 and "DequantizeLinear" not in kinds
    dense = made()
    for tokens in (1, 20):
        feeds = feeds_of(shape, tokens)
        for native in (False, True):
            assert check_layers(model, LEVEL, 50, [feeds], kernels=native)[0] == 3
            assert close(run_model(dense, feeds)[0], Dialled(model, LEVEL, kernels=native)(feeds, 0)[0], 1e-5)


def test_zero_points_that_do_not_end_on_whole_bytes(kernels: Path) -> None:
    shape, storage = Shape(hidden=24, inner=31, gate_layout=0), Storage("uint4", 1, 0, "any", 21)
    model = lowered(
        *(lambda each: (each, plan_for(each, "native")))(prepared(quantized_model(shape, storage)))
    )
    for native in (False, True):
        assert check_layers(model, LEVEL, 50, [feeds_of(shape, 9)], kernels=native)[0] == 2


def test_a_layer_that_stays_dense_gathers_no_weights_either(kernels: Path) -> None:
    shape = Shape(separate=True, biases=True)
    plan = plan_for(routed_model(shape), "native", least=0.4)
    few = {
        name: dataclasses.replace(site, sparsity=site.sparsity / (1 if name.endswith("down") else 2))
        for name, site in plan.sites.items()
    }
    model = lowered(routed_model(shape), dataclasses.replace(plan, sites=few))
    kinds = [node.op_type for node in model.graph if node.metadata_props.get("sparse_onnx.block")]
    assert kinds.count("ThresholdedExpertLinear") == 3 and "Gather" not in kinds
    assert [item.site for item in acting(model)] == ["block.down"]
    feeds = feeds_of(shape, 9)
    for native in (False, True):
        run = Dialled(model, LEVEL, kernels=native)
        assert close(run_model(routed_model(shape), feeds)[0], run(feeds, 0)[0], 3e-6)


@pytest.mark.parametrize("weight_layout", [0, 1])
def test_weights_are_turned_one_expert_at_a_time_or_stay_where_they_lie(
    tmp_path: Path, weight_layout: int
) -> None:
    shape = Shape(weight_layout=weight_layout, hidden=64, inner=64)
    source = io.load(save_external(routed_model(shape), tmp_path / "in.onnx"))
    packed = source.graph.initializers["fc1"].const_value
    model = source
    for step in (InsertThresholds(plan_for(model, "native")), GatherExperts()):
        assert step(model).modified
    node = next(node for node in model.graph if node.op_type == "ThresholdedExpertLinear")
    assert node.inputs[2] is not None
    held = node.inputs[2].const_value
    if weight_layout:
        assert held is packed
    else:
        assert isinstance(held, Stacked) and len(held.parts) == shape.experts
        assert not {"fc1", "fc2"} & set(model.graph.initializers), "kept once"


@pytest.mark.parametrize("integers", [False, True])
def test_in_the_body_of_an_if(integers: bool, kernels: Path) -> None:
    shape = Shape(hidden=32, inner=64)
    proto = ir.to_proto(quantized_model(shape, Storage("int8", 0, 0, "none", 21)))
    if not integers:
        proto = ir.to_proto(routed_model(shape))
    before = in_body(onnx.ModelProto.FromString(proto.SerializeToString()), "inside", "tokens")
    changed = prepared(in_body(proto, "inside", "tokens"))
    model = lowered(changed, plan_for(changed, "native"))
    assert all(item.inner for item in acting(model)) and len(acting(model)) == 2
    feeds = feeds_of(shape, 5, dropped=False) | {"c": np.array(True)}
    for native in (False, True):
        run = Dialled(model, LEVEL, kernels=native)
        assert close(run_model(before, feeds)[0], run(feeds, 0)[0], 1e-5)
        assert not close(run_model(before, feeds)[0], run(feeds, 50)[0], 1e-2)


def test_what_it_does_not_take() -> None:
    for mode in ("simulate", "gather"):
        model = layered_model(Shape())
        InsertThresholds(plan_for(model, mode))(model)
        outcome = GatherExperts()(model)
        assert outcome.rewritten == 0 and all(mode in refusal.reason for refusal in outcome.refusals)
    model = layered_model(Shape(separate=True))
    InsertThresholds(gated_after.plan_for(model, "native"))(model)
    outcome = GatherExperts()(model)
    assert outcome.rewritten == 0 and "behind a gate" in outcome.refusals[0].reason
    model = layered_model(Shape())
    InsertThresholds(plan_for(model, "native"))(model)
    outcome = GatherExperts(index="int32")(model)
    assert outcome.rewritten == 0 and "int64" in outcome.refusals[0].reason


def test_a_row_by_another_expert_is_found() -> None:
    """Of the check itself: the body adds every row the bias of expert 0."""
    shape = Shape(biases=True)
    model = lowered(routed_model(shape), plan_for(routed_model(shape), "native"))
    feeds = feeds_of(shape, 9, dropped=False)
    check_layers(model, LEVEL, 50, [feeds], kernels=False)
    function = model.functions["sparse_onnx", "ThresholdedExpertLinear", ""]
    [loop] = [node for node in function if node.op_type == "Loop"]
    body = loop.attributes["body"].as_graph()
    [zero] = {node.inputs[1] for node in body if node.op_type == "Squeeze"}
    [bias] = [node for node in body if node.op_type == "Gather" and node.inputs[0].name == "folded_bias"]
    bias.replace_input_with(1, zero)
    with pytest.raises(VerificationError, match="differs from numpy"):
        check_layers(model, LEVEL, 50, [feeds], kernels=False)


def test_rows_by_another_expert_are_found_beside_one_of_huge_activations() -> None:
    """Of the check itself: the body multiplies every row by the matrix of expert 0."""
    shape = Shape(biases=True)
    model = lowered(routed_model(shape), plan_for(routed_model(shape), "native"))
    feeds = feeds_of(shape, 9, dropped=False)
    feeds["index"][0] = 0
    feeds["tokens"][0] *= 3e4
    check_layers(model, LEVEL, 50, [feeds], kernels=False)
    function = model.functions["sparse_onnx", "ThresholdedExpertLinear", ""]
    [loop] = [node for node in function if node.op_type == "Loop"]
    body = loop.attributes["body"].as_graph()
    [zero] = {node.inputs[1] for node in body if node.op_type == "Squeeze"}
    [matrix] = [node for node in body if node.op_type == "Gather" and node.inputs[0].name == "W"]
    matrix.replace_input_with(1, zero)
    with pytest.raises(VerificationError, match="differs from numpy"):
        check_layers(model, LEVEL, 50, [feeds], kernels=False)
