"""Every form x activation x gate x bias x element type against the numpy reference, at the routings that break things.

One table says what a form refuses; everything else must be lowered, and give the reference's numbers within
`moe_cases.TOLERANCE`, where tolerances by element type are stated.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from builders import DTYPES, Shape, expert_weights, finish, neutral_node
from harness import run_model
from moe_cases import TOLERANCE
from onnx import TensorProto, helper, numpy_helper

from sparse_onnx import targets
from sparse_onnx.blocks import Activation, ExpertSpec, GateLayout, WeightLayout, blocks, reference
from sparse_onnx.blocks.lowering import Form, want
from sparse_onnx.optimize.runner import plan

FORMS = [
    "grouped",
    "branched:style=expert",
    "branched:style=group,group=2",
    "branched:style=loop",
    "gathered",
    "gathered:index=int32",
    "dense",
    "dense:index=int32",
    "fused",
]
EXPERTS, TOP_K, HIDDEN, INNER = 5, 2, 12, 10


def shapes() -> Iterator[Shape]:
    sloped = (Activation.SILU, Activation.SILU_SOFTCAP)
    gates = [(0, False), (1, False), (2, False), (3, True)]
    for activation, (layout, separate), biases in itertools.product(Activation, gates, (False, True)):
        gated = layout != 0
        yield Shape(
            experts=EXPERTS,
            top_k=TOP_K,
            hidden=HIDDEN,
            inner=INNER,
            activation=int(activation),
            gate_layout=1 if separate else layout,
            weight_layout=int(biases),  # both orientations, without another factor of two
            biases=biases,
            separate=separate,
            limit=0.7 if gated and biases else 0.0,
            alpha=1.702 if activation in sloped and gated and biases else 1.0,
            beta=1.0 if gated and biases else 0.0,
        )


def spec(shape: Shape) -> ExpertSpec:
    layout = GateLayout.SEPARATE if shape.separate else GateLayout(shape.gate_layout)
    return ExpertSpec(
        Activation(shape.activation),
        layout,
        WeightLayout(shape.weight_layout),
        shape.limit,
        shape.alpha,
        shape.beta,
    )


def refuses(form: str, shape: Shape) -> bool:
    """What the operators of ONNX Runtime's CPU provider cannot express; every other form takes everything."""
    if form != "fused":
        return False
    activation, gated = Activation(shape.activation), shape.separate or shape.gate_layout != 0
    if shape.dtype != "float32":
        return True
    if gated:
        return activation != Activation.SILU
    return activation not in (Activation.SILU, Activation.GELU_TANH, Activation.RELU)


def model_of(shape: Shape, weights: dict[str, np.ndarray]) -> ir.Model:
    """tokens, index, raw weight -> |weight| -> block: a graph that proves its weights not negative."""
    number = helper.np_dtype_to_tensor_dtype(np.dtype(DTYPES[shape.dtype]))
    graph = helper.make_graph(
        [
            helper.make_node("Abs", ["raw"], ["weight"]),
            neutral_node(shape, "block", ["tokens", "index", "weight", *weights], "y"),
        ],
        "one",
        [
            helper.make_tensor_value_info("tokens", number, ["T", HIDDEN]),
            helper.make_tensor_value_info("index", TensorProto.INT64, ["T", TOP_K]),
            helper.make_tensor_value_info("raw", number, ["T", TOP_K]),
        ],
        [helper.make_tensor_value_info("y", number, ["T", HIDDEN])],
        [numpy_helper.from_array(array, name) for name, array in weights.items()],
        value_info=[helper.make_tensor_value_info("weight", number, ["T", TOP_K])],
    )
    return finish(graph)


def routings(rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Index by kind; E is a dropped slot."""
    mixed = rng.integers(0, EXPERTS + 1, (23, TOP_K))
    return {
        "no token": np.zeros((0, TOP_K), np.int64),
        "one token": rng.permutation(EXPERTS)[None, :TOP_K],
        "all to one expert": np.full((7, TOP_K), 3),
        "random": rng.integers(0, EXPERTS, (17, TOP_K)),
        "dropped": mixed,
        "all dropped": np.full((3, TOP_K), EXPERTS),
    }


def lower(model: ir.Model, form: str) -> list[str]:
    """Runs the lowerings of that form as the pipeline does; the reasons of refusals."""
    for block in blocks(model):
        want(block.node, [Form.parse(form)])
    reasons: list[str] = []
    for item in plan(targets.get("cpu").forms):
        if item.step.phase == "lower" and item.run is not None:
            reasons += [refusal.reason for refusal in item.run(model).refusals]
    return reasons


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("form", FORMS)
def test_exact(form: str, dtype: str) -> None:
    import dataclasses

    for number, plain in enumerate(shapes()):
        shape = dataclasses.replace(plain, dtype=dtype, weight_dtype=dtype)
        rng = np.random.default_rng(number)
        weights = expert_weights(shape, rng)
        model = model_of(shape, weights)
        reasons = lower(model, form)
        if refuses(form, shape):
            assert len(reasons) == 1 and len(blocks(model)) == 1, f"{shape} is not refused"
            continue
        assert not reasons and not blocks(model), f"{shape}: {reasons}"
        onnx.checker.check_model(ir.to_proto(model), full_check=True)
        for name, index in routings(rng).items():
            tokens = rng.standard_normal((len(index), HIDDEN)).astype(DTYPES[dtype])
            raw = rng.uniform(-1, 1, index.shape).astype(DTYPES[dtype])
            expected = reference(spec(shape), tokens, index, np.abs(raw), **weights)
            actual = run_model(model, {"tokens": tokens, "index": index, "raw": raw}, threads=2)[0]
            assert actual.shape == expected.shape and actual.dtype == expected.dtype
            scale = np.abs(expected.astype(np.float64)).max(initial=1.0)
            error = np.abs(actual.astype(np.float64) - expected).max(initial=0.0) / scale
            assert error <= TOLERANCE[dtype], f"{form}, {shape}, {name}: {error}"


@pytest.mark.parametrize("form", FORMS)
def test_ties_follow_the_router(form: str) -> None:
    """All scores of a token tie: the router's TopK decides, whatever the form would have chosen itself."""
    from builders import layered_model

    shape = Shape(experts=6, top_k=3)
    before, after = layered_model(shape), layered_model(shape)
    assert not lower(after, form) and not blocks(after)
    for x in (np.zeros((5, 16), np.float32), np.ones((7, 16), np.float32), np.zeros((1, 16), np.float32)):
        expected, actual = (run_model(model, {"x": x})[0] for model in (before, after))
        np.testing.assert_allclose(actual, expected, rtol=0, atol=5e-6 * np.abs(expected).max(initial=1.0))
