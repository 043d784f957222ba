"""The function bodies in ORT against the reference."""

from __future__ import annotations

import dataclasses

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from moe_cases import LEVELS, Case, close, label, routings, session, specs
from onnx import helper
from onnx.reference import ReferenceEvaluator

from sparse_onnx.blocks import (
    Activation,
    ExpertSpec,
    GateLayout,
    WeightLayout,
    reference,
)

ALL = list(specs())
GPT_OSS = ExpertSpec(Activation.SILU, GateLayout.INTERLEAVED, WeightLayout.IN_OUT, 7.0, 1.702, 1.0)
SWIGLU = ExpertSpec(Activation.SILU, GateLayout.CONCATENATED, WeightLayout.OUT_IN)
SEPARATE = dataclasses.replace(SWIGLU, gate_layout=GateLayout.SEPARATE)
PLAIN = ExpertSpec(Activation.RELU, GateLayout.NONE, WeightLayout.OUT_IN)


def check(case: Case, runner, seed: int = 0, biases: bool = True) -> None:
    rng = np.random.default_rng(seed)
    weights = case.weights(rng, biases)
    for name, index in routings(case.experts, case.top_k, rng).items():
        feeds = case.routing(rng, index)
        expected = reference(case.spec, **rename(feeds), **weights)
        actual = runner(None, feeds | weights)[0]
        assert close(actual, expected, case.dtype), (name, actual, expected)


def rename(feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {key: feeds[key] for key in ("tokens", "expert_index", "expert_weight")}


@pytest.mark.parametrize("spec", ALL, ids=label)
def test_every_expert_in_both_precisions(spec: ExpertSpec) -> None:
    for dtype in ("float32", "float16"):
        case = Case(spec, dtype=dtype)
        check(case, session(case.model()).run)
    check(case, session(case.model()).run, biases=False)


@pytest.mark.parametrize("level", LEVELS, ids=lambda level: level.name)
@pytest.mark.parametrize("spec", [GPT_OSS, SEPARATE, PLAIN], ids=label)
def test_every_optimization_level(spec: ExpertSpec, level) -> None:
    for dtype, weight_dtype in (("float32", "float32"), ("float16", "float32"), ("float16", "float16")):
        case = Case(spec, dtype=dtype, weight_dtype=weight_dtype)
        check(case, session(case.model(), level).run)


@pytest.mark.parametrize("opset", range(18, onnx.defs.onnx_opset_version() + 1))
@pytest.mark.parametrize("spec", [GPT_OSS, SEPARATE], ids=label)
def test_every_opset(spec: ExpertSpec, opset: int) -> None:
    case = Case(spec)
    model = case.model(opset)
    if not loads(opset):
        pytest.skip(f"this ORT knows no opset {opset}")
    onnx.checker.check_model(model, full_check=True)
    check(case, session(model, LEVELS[0]).run)
    check(case, session(model).run)


@pytest.mark.parametrize("spec", [GPT_OSS, SWIGLU, SEPARATE, PLAIN], ids=label)
def test_without_ort(spec: ExpertSpec) -> None:
    """onnx's own evaluator; ORT's CPU provider has no bfloat16 arithmetic."""
    for dtype in ("float32", "bfloat16"):
        case = Case(spec, dtype=dtype)
        model = case.model()
        onnx.checker.check_model(model, full_check=True)
        check(case, ReferenceEvaluator(model).run)


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_any_size_and_routing(data: st.DataObject) -> None:
    """Odd widths matter: the branches that ORT folds away must survive its shape inference first."""
    size = st.integers(1, 9)
    spec = data.draw(st.sampled_from(ALL))
    dtype, weight_dtype = (data.draw(st.sampled_from(["float32", "float16"])) for _ in range(2))
    case = Case(spec, *(data.draw(size) for _ in range(4)), data.draw(st.integers(1, 4)), dtype, weight_dtype)
    run = session(case.model(), data.draw(st.sampled_from(LEVELS))).run
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    weights = case.weights(rng)
    for tokens in data.draw(st.lists(st.integers(0, 12), min_size=2, max_size=3)):
        feeds = case.routing(rng, rng.integers(0, case.experts + 1, (tokens, case.top_k)))
        expected = reference(spec, **rename(feeds), **weights)
        narrow = "float16" if "float16" in (dtype, weight_dtype) else dtype
        assert close(run(None, feeds | weights)[0], expected, narrow)


@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("spec", [GPT_OSS, SEPARATE, PLAIN], ids=label)
def test_dropped_slots_add_nothing_whatever_they_hold(spec: ExpertSpec, poison: float) -> None:
    case = Case(spec)
    rng = np.random.default_rng(0)
    index = np.array([[0, 1], [2, 5], [5, 5], [3, 4]])
    feeds, weights = case.routing(rng, index), case.weights(rng)
    clean = reference(spec, **rename(feeds), **weights)
    feeds["tokens"][2] = poison
    feeds["expert_weight"][index == case.experts] = poison
    for level in (LEVELS[0], LEVELS[-1]):
        actual = session(case.model(), level).run(None, feeds | weights)[0]
        assert close(actual, clean, case.dtype)
        assert not actual[2].any()
    assert close(reference(spec, **rename(feeds), **weights), clean, case.dtype)


def test_a_bad_token_spoils_its_own_row_only() -> None:
    case = Case(SWIGLU)
    rng = np.random.default_rng(0)
    feeds, weights = case.routing(rng, np.array([[0, 1], [0, 1], [0, 1]])), case.weights(rng)
    feeds["tokens"][1] = np.nan
    actual = session(case.model()).run(None, feeds | weights)[0]
    assert np.isnan(actual[1]).all() and np.isfinite(actual[[0, 2]]).all()


@pytest.mark.parametrize("spec", ALL, ids=label)
def test_swapped_experts_are_seen(spec: ExpertSpec) -> None:
    """The measure of all tests here: what they compare must tell one expert from another."""
    for dtype in ("float32", "float16"):
        case = Case(spec, dtype=dtype)
        rng = np.random.default_rng(0)
        weights = case.weights(rng)
        order = np.array([1, 0, 2, 3, 4])
        swapped = {name: value[order] for name, value in weights.items()}
        feeds = case.routing(rng, rng.integers(0, case.experts, (8, case.top_k)))
        run = session(case.model()).run
        assert close(run(None, feeds | weights)[0], reference(spec, **rename(feeds), **weights), dtype)
        assert not close(run(None, feeds | swapped)[0], reference(spec, **rename(feeds), **weights), dtype)


def test_many_tokens_on_several_threads() -> None:
    """Racing writes do not show at small sizes: ORT's ScatterND(add) loses updates from about this one on."""
    case = Case(SWIGLU, experts=8, hidden=1024, inner=16, outputs=1024, top_k=8)
    rng = np.random.default_rng(0)
    weights = case.weights(rng)
    feeds = case.routing(rng, rng.integers(0, case.experts + 1, (256, case.top_k)))
    run = session(case.model(), threads=2).run
    first = run(None, feeds | weights)[0]
    assert close(first, reference(case.spec, **rename(feeds), **weights), case.dtype)
    for _ in range(20):
        np.testing.assert_array_equal(run(None, feeds | weights)[0], first)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("spec", ALL, ids=label)
def test_what_ort_makes_of_it(spec: ExpertSpec, dtype: str, tmp_path, capfd) -> None:
    """Choices are folded away, nothing scatters with a reduction, no packed weight is converted whole."""
    case = Case(spec, dtype=dtype)
    path = tmp_path / "optimized.onnx"
    session(case.model(), LEVELS[2], optimized=str(path))
    assert capfd.readouterr().err == ""
    nodes = list(walk(onnx.load(path).graph))
    types = [node.op_type for node in nodes]
    assert "If" not in types and types.count("Loop") == 1
    (scatter,) = (node for node in nodes if node.op_type.startswith("Scatter"))
    reductions = {attribute.s for attribute in scatter.attribute if attribute.name == "reduction"}
    assert scatter.op_type == "ScatterND" and reductions <= {b"none"}
    assert not [node for node in nodes if node.op_type == "Cast" and set(node.input) & set(case.shapes)]


def loads(opset: int) -> bool:
    value = helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [1])
    output = helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [1])
    graph = helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], "identity", [value], [output])
    imports = [helper.make_opsetid("", opset)]
    try:
        session(helper.make_model(graph, opset_imports=imports, ir_version=10))
    except Exception:
        return False
    return True


def walk(graph: onnx.GraphProto):
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                yield from walk(attribute.g)
