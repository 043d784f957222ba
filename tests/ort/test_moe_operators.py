"""Traps of `com.microsoft::MoE` and `QMoE` on CPU: what `recognise_contrib` and `fuse_moe_op` rest on."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from contrib_models import Case, feeds, model, weights
from harness import assert_close
from onnx import TensorProto, helper, numpy_helper
from ort.graphs import operators, optimized, run, session, since

from sparse_onnx.blocks import Activation, ExpertSpec, GateLayout, WeightLayout, reference

FLOATS, FOUR_BITS = Case(), Case(bits=4, block=16)
BOTH = pytest.mark.parametrize("case", [FLOATS, FOUR_BITS], ids=["MoE", "QMoE"])
SWIGLU = ExpertSpec(Activation.SILU, GateLayout.INTERLEAVED, WeightLayout.OUT_IN)
node, info = helper.make_node, helper.make_tensor_value_info


def proto(case: Case, **replaced: np.ndarray) -> onnx.ModelProto:
    return ir.to_proto(model(case, **replaced))


def shares(case: Case, logits: Any, **given: Any) -> np.ndarray:
    """The weight ``[T, E]`` that each expert has in the result; 0 where it was not run.

    Expert e gives 1 at place e and 0 elsewhere, whatever its input.
    """
    held = weights(case, np.random.default_rng(0))
    constant = {name: np.zeros_like(held[name]) for name in ("fc2", "fc2_scales") if name in held}
    if case.bits:
        del constant["fc2"]  # integers that a scale of 0 makes 0
    constant["fc2_bias"] = np.eye(case.experts, case.hidden, dtype=case.dtype)
    inputs = {
        "input": np.ones((len(logits), case.hidden), case.dtype),
        "logits": np.asarray(logits, case.dtype),
    }
    inputs |= {name: np.asarray(value, case.dtype) for name, value in given.items()}
    return run(proto(case, **constant), inputs)[0][:, : case.experts]


@pytest.mark.parametrize("bits", [pytest.param(0, id="MoE"), pytest.param(4, id="QMoE", marks=since(1, 27))])
@pytest.mark.parametrize(("fusion", "fc3"), [(0, False), (0, True), (2, False)])
def test_swiglu_is_taken_interleaved_only(fusion: int, fc3: bool, bits: int) -> None:
    """`fuse_moe_op` interleaves gate and up; `Contrib.on_cpu` tells the other layouts from those that run here."""
    case = Case(bits=bits, block=16, fusion=fusion, fc3=fc3)
    with pytest.raises(Exception, match="only supports interleaved SwiGLU"):
        session(proto(case))


def test_a_gate_of_its_own_fails_at_the_first_run_only() -> None:
    """So a session that was made proves nothing about fc3: `verify` runs what it compares."""
    case = Case(kind="silu", fc3=True)
    made = session(proto(case))
    with pytest.raises(Exception, match="FC3 is not implemented"):
        made.run(None, feeds(case, 3))


def test_moe_takes_no_router_weights() -> None:
    """Why any routing but softmax goes into `MoE` as logarithms; from the day that it takes weights, as weights."""
    made = proto(dataclasses.replace(FLOATS, router_weights=True))
    operator = made.graph.node[0]
    assert "router_weights" not in operator.input
    operator.input.extend([""] * (8 - len(operator.input)) + ["router_weights"])
    with pytest.raises(Exception, match="INVALID_GRAPH"):
        session(made)


@since(1, 27)
def test_qmoe_takes_router_weights() -> None:
    """From ORT 1.27 on. Logits choose, weights weigh; divided by their sum where normalize_routing_weights, and no
    division where they cancel. A weight below 0 drops its slot, but counts in the sum: neither this way nor that by
    logarithms takes a router whose weights may be negative, and `fuse_moe_op` refuses it."""
    case = dataclasses.replace(FOUR_BITS, router_weights=True)
    logits = [[0, 0, 3, 2, 0, 0]] * 3
    given = [[9, 0, 0.5, 0.25, 0, 0], [9, 0, 0, 0, 0, 0], [9, 0, -0.5, 0.25, 0, 0]]
    as_they_are = [[0, 0, 0.5, 0.25, 0, 0], [0] * 6, [0, 0, 0, 0.25, 0, 0]]
    divided = [[0, 0, 2 / 3, 1 / 3, 0, 0], [0] * 6, [0, 0, 2, 0, 0, 0]]
    for normalize, expected in ((0, as_they_are), (1, divided)):
        actual = shares(dataclasses.replace(case, normalize=normalize), logits, router_weights=given)
        np.testing.assert_allclose(actual, expected, atol=1e-6, err_msg=f"normalize {normalize}")


def test_qmoe_normalizes_whatever_it_is_told() -> None:
    """Without router_weights its softmax is over the chosen experts alone. `recognise_contrib` refuses the attribute's
    0, which means another thing on CUDA; `MoE` heeds it."""
    logits = [[2, 1, 0, 0, 0, 0]]
    for case, whole in ((FLOATS, False), (FOUR_BITS, True)):
        [given] = shares(dataclasses.replace(case, normalize=0), logits)
        assert (abs(given.sum() - 1) < 1e-6) == whole, (
            f"bits {case.bits}: weights {given}. If QMoE heeds normalize_routing_weights now, recognise_contrib can "
            "read it with 0 as well"
        )


@BOTH
def test_of_equal_scores_the_higher_expert_is_taken(case: Case) -> None:
    """TopK takes the lower: `recognise_contrib` turns the scores round, and in `fuse_moe_op` no tie decides between
    experts that have weight."""
    actual = shares(case, [[0] * 6, [0, 0, 1, 0, 0, 0], [1, 1, 1, 0, 0, 0]]) > 0
    assert [np.nonzero(row)[0].tolist() for row in actual] == [[4, 5], [2, 5], [1, 2]], (
        "ties go to other experts: with TopK's order the Slice and Sub of recognise_contrib's router can go"
    )


@BOTH
def test_slots_of_no_weight_are_not_run(case: Case) -> None:
    """An expert that would give infinity: `MoE` leaves it out at a weight of exactly 0, `QMoE` up to 1e-8. What
    dropped slots in `fuse_moe_op` rest on, and `recognise_contrib` writes out."""
    bias = np.zeros((6, case.hidden), np.float32)
    bias[1] = np.inf
    made = session(proto(case, fc2_bias=bias))

    def runs(weight: float) -> bool:
        logits = np.full((1, 6), -np.inf, np.float32)
        logits[0, :2] = 0, np.log(weight) if weight else -np.inf
        inputs = {"input": np.ones((1, case.hidden), np.float32), "logits": logits}
        return not np.isfinite(made.run(None, inputs)[0]).all()

    least = 1e-8 if case.bits else 0.0
    assert not runs(0.0), "a slot of weight 0 is run: dropped slots need another way into the operator"
    assert runs(2e-8) and runs(1.1e-8)
    for weight in (0.9e-8, 1e-20, 1e-37):
        assert runs(weight) == (weight > least), f"the least weight that is run has moved: {weight}"


@BOTH
def test_scores_that_are_no_numbers_drop_the_token(case: Case) -> None:
    """0, not NaN: a broken router is told by the grouped form and hidden by the operator. `contrib_router.py` counts on
    it: logits of a token whose slots are all dropped are log(0 / 0), and those of no weight log(0)."""
    logits = np.full((3, 6), np.nan)
    logits[1], logits[2] = -np.inf, 1.0
    actual = shares(case, logits)
    assert not actual[:2].any() and actual[2].sum() > 0.9, actual


@BOTH
def test_no_tokens(case: Case) -> None:
    """Both take a batch of none, in both ranks; `fuse_moe_op` needs no guard."""
    for rank, shape in ((2, (0, 32)), (3, (1, 0, 32))):
        of_rank = dataclasses.replace(case, rank=rank)
        [actual] = run(proto(of_rank), feeds(of_rank, 0))
        assert actual.shape == shape


def test_float16_moe_runs_in_float32(tmp_path) -> None:
    """`MoE` has a kernel for float32 only: ORT puts casts around it, and keeps float32 copies of all experts.
    `QMoE` runs float16 as it is."""
    half = optimized(proto(Case(dtype=np.float16)), tmp_path)
    widened = {each.name: each.data_type for each in half.initializer}
    assert operators(half).count("Cast") == 3 and set(widened.values()) == {TensorProto.FLOAT}, (
        "MoE runs in float16 now: fuse_moe_op may take float16 models, and keep their memory"
    )
    quantized = optimized(proto(Case(bits=4, block=16, dtype=np.float16)), tmp_path)
    assert operators(quantized) == ["QMoE"]


ROUTINGS = {
    "any": lambda rng, shape: rng.uniform(0, 1, shape),
    "some zero": lambda rng, shape: rng.uniform(0, 1, shape) * (rng.random(shape) < 0.4),
    "tokens without weight": lambda rng, shape: rng.uniform(0, 1, shape) * (rng.random((shape[0], 1)) < 0.5),
    "nothing but zeros": lambda rng, shape: np.zeros(shape),
    "equal": lambda rng, shape: np.full(shape, 0.25),
    "far apart": lambda rng, shape: 10.0 ** rng.uniform(-30, 3, shape),
    "large": lambda rng, shape: rng.uniform(0, 1e4, shape),
}


@BOTH
@pytest.mark.parametrize("repeated", [False, True], ids=["distinct", "repeated"])
@pytest.mark.parametrize("fill", [-1e30, -np.inf])
@pytest.mark.parametrize("routing", ROUTINGS)
def test_weights_as_logarithms(routing: str, fill: float, repeated: bool, case: Case) -> None:
    """How `fuse_moe_op` passes any weights that are not negative: ``y = MoE(x, log(w) scattered) * sum(w)``."""
    case = dataclasses.replace(case, top_k=3)
    rng = np.random.default_rng(0)
    shape = (64, case.top_k)
    weight = ROUTINGS[routing](rng, shape).astype(np.float32)
    index = rng.integers(0, case.experts, shape)
    if not repeated:
        index = np.stack([rng.permutation(case.experts)[: case.top_k] for _ in range(len(index))])
    tokens = rng.standard_normal((len(index), case.hidden)).astype(np.float32)
    expected = reference(SWIGLU, tokens, index, weight, **matrices(case))
    actual = run(by_logarithms(case, fill), {"input": tokens, "index": index, "weight": weight}, threads=2)
    assert_close(expected, actual[0], 1e-6)


@BOTH
def test_a_finite_logarithm_of_zero_spoils_dropped_tokens(case: Case) -> None:
    """A token without weight has k experts run on it where all its logits are -1e30: 0 times what they give, which is
    not 0 if the token holds an infinity. With the logarithm as it is, minus infinity, no expert runs: so does
    `contrib_router.py` leave it."""
    tokens = np.ones((2, case.hidden), np.float32)
    tokens[0] = np.inf
    given = {
        "input": tokens,
        "index": np.asarray([[0, 1], [0, 1]]),
        "weight": np.asarray([[0, 0], [0.5, 0]], np.float32),
    }
    [right] = run(by_logarithms(case, -np.inf), given)
    [finite] = run(by_logarithms(case, -1e30), given)
    assert not right[0].any() and np.isfinite(right).all()
    assert np.isnan(finite[0]).all(), "a finite fill is as good as minus infinity now"
    np.testing.assert_array_equal(finite[1], right[1])


def by_logarithms(case: Case, fill: float) -> onnx.ModelProto:
    """input `[T, D]`, index `[T, K]`, weight `[T, K]` -> y."""
    inner = proto(case)
    [operator] = inner.graph.node
    operator.output[0] = "averaged"
    constants = {
        "nothing": np.zeros(1, np.float32),
        "fill": np.asarray(fill, np.float32),
        "experts": np.asarray([case.experts]),
        "last": np.asarray([-1]),
    }
    graph = [
        node("Shape", ["index"], ["tokens"], end=1),
        node("Concat", ["tokens", "experts"], ["shape"], axis=0),
        node("Expand", ["nothing", "shape"], ["none"]),
        node("ScatterElements", ["none", "index", "weight"], ["all"], axis=1, reduction="add"),
        node("Greater", ["all", "nothing"], ["chosen"]),
        node("Log", ["all"], ["logarithm"]),
        node("Where", ["chosen", "logarithm", "fill"], ["logits"]),
        operator,
        node("ReduceSum", ["weight", "last"], ["sum"]),
        node("Mul", ["averaged", "sum"], ["y"]),
    ]
    inputs = [
        info("input", TensorProto.FLOAT, ["T", case.hidden]),
        info("index", TensorProto.INT64, ["T", case.top_k]),
        info("weight", TensorProto.FLOAT, ["T", case.top_k]),
    ]
    initializers = [*inner.graph.initializer, *(numpy_helper.from_array(a, n) for n, a in constants.items())]
    made = helper.make_graph(
        graph, "g", inputs, [info("y", TensorProto.FLOAT, ["T", case.hidden])], initializers
    )
    return helper.make_model(made, opset_imports=inner.opset_import, ir_version=10)


def matrices(case: Case) -> dict[str, np.ndarray]:
    """The case's weights as numbers, by neutral role."""
    held = weights(case, np.random.default_rng(0))
    for name in ("fc1", "fc2"):
        if case.bits:
            scales = np.repeat(held.pop(f"{name}_scales"), case.block, -1)
            each = 8 // case.bits
            shifts = np.arange(each, dtype=np.uint8) * case.bits
            points = (held[name][..., None] >> shifts & (1 << case.bits) - 1).astype(np.float32)
            held[name] = (points.reshape(scales.shape) - (1 << case.bits - 1)) * scales
    return held
