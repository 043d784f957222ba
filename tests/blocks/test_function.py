"""Definitions attached to models, and blocks inside other graphs and functions."""

from __future__ import annotations

import dataclasses

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from moe_cases import LEVELS, Case, close, session

from sparse_onnx.blocks import (
    Activation,
    ExpertSpec,
    GateLayout,
    WeightLayout,
    attach_functions,
    make_function,
    reference,
)
from sparse_onnx.core.errors import ModelError

CASE = Case(
    ExpertSpec(Activation.GELU, GateLayout.INTERLEAVED, WeightLayout.OUT_IN, 0.5, 1.0, 0.25), outputs=7
)
APART = Case(ExpertSpec(Activation.SILU, GateLayout.SEPARATE, WeightLayout.IN_OUT), outputs=7)


def call(case: Case, tokens: str, output: str) -> str:
    attributes = ", ".join(f"{name} = {value}" for name, value in case.spec.attributes().items())
    inputs = ", ".join([tokens, "expert_index", "expert_weight", *case.shapes])
    return f"{output} = sparse_onnx.{case.spec.op} <{attributes}> ({inputs})"


def weight_inputs(case: Case) -> str:
    return ", ".join(f"float[{','.join(map(str, shape))}] {name}" for name, shape in case.shapes.items())


def model(case: Case, nodes: str, extra: str = "", opset: int = 20, functions: str = "") -> ir.Model:
    inputs = ["float[T,7] tokens", "int64[T,2] expert_index", "float[T,2] expert_weight", weight_inputs(case)]
    text = f"""<ir_version: 10, opset_import: ["" : {opset}, "test" : 1, "sparse_onnx" : 1]>
        nested ({", ".join(inputs)}{extra}) => (float[T,7] y) {{ {nodes} }} {functions}"""
    return ir.from_proto(onnx.parser.parse_model(text))


def check(case: Case, made: ir.Model, expected, **extra) -> None:
    proto = ir.to_proto(made)
    onnx.checker.check_model(proto, full_check=True)
    rng = np.random.default_rng(0)
    weights = case.weights(rng)
    for tokens in (0, 1, 5):
        feeds = case.routing(rng, rng.integers(0, case.experts + 1, (tokens, case.top_k)))

        def block(x: np.ndarray, spec=case.spec, own=weights, feeds=feeds) -> np.ndarray:
            return reference(spec, x, feeds["expert_index"], feeds["expert_weight"], **own)

        for level in LEVELS:
            actual = session(proto.SerializeToString(), level).run(None, feeds | weights | extra)[0]
            assert close(actual, expected(feeds["tokens"], block), "float32")


IN_IF = """y = If (use) <
    then_branch = yes () => (a) { CALL },
    else_branch = no () => (b) { b = Neg (tokens) }>"""
IN_LOOP = """
    limit = Constant <value_int = 3> ()
    yes = Constant <value = bool {1}> ()
    y = Loop (limit, yes, tokens) <body = again (i, go, x) => (on, z) {
        on = Identity (go)
        CALL
        z = Add (x, m)
    }>"""


@pytest.mark.parametrize("case", [CASE, APART], ids=lambda case: case.spec.op)
class TestNested:
    def test_in_if(self, case: Case) -> None:
        made = model(case, IN_IF.replace("CALL", call(case, "tokens", "a")), ", bool use")
        assert attach_functions(made)
        check(case, made, lambda x, block: block(x), use=np.array(True))
        check(case, made, lambda x, block: -x, use=np.array(False))

    def test_in_loop(self, case: Case) -> None:
        made = model(case, IN_LOOP.replace("CALL", call(case, "x", "m")))
        (loop,) = (node for node in made.graph if node.op_type == "Loop")
        types = (ir.DataType.INT64, ir.DataType.BOOL)
        for value, dtype in zip(loop.attributes["body"].as_graph().inputs, types, strict=False):
            value.shape, value.type = ir.Shape(()), ir.TensorType(dtype)
        assert attach_functions(made)

        def three_times(x: np.ndarray, block) -> np.ndarray:
            for _ in range(3):
                x = x + block(x)
            return x

        check(case, made, three_times)

    def test_in_another_function(self, case: Case) -> None:
        """Called twice, once inside an If; the calling function did not import the domain."""
        names = ", ".join(["tokens", "expert_index", "expert_weight", *case.shapes])
        layer = f"""
            <domain: "test", opset_import: ["" : 20]>
            Layer ({names}) => (out) {{ {call(case, "tokens", "moe")} out = Sub (tokens, moe) }}"""
        nodes = f"""
            x = test.Layer ({names})
            y = If (use) <
              then_branch = yes () => (a) {{ a = test.Layer ({names.replace("tokens", "x", 1)}) }},
              else_branch = no () => (b) {{ b = Identity (x) }}>"""
        made = model(case, nodes, ", bool use", functions=layer)
        assert attach_functions(made)
        assert made.functions[("test", "Layer", "")].opset_imports["sparse_onnx"] == 1

        def twice(x: np.ndarray, block) -> np.ndarray:
            x = x - block(x)
            return x - block(x)

        check(case, made, twice, use=np.array(True))
        check(case, made, lambda x, block: x - block(x), use=np.array(False))


def test_both_operators_in_one_model() -> None:
    """Two definitions, and two uses of one of them with other attributes."""
    other = dataclasses.replace(CASE.spec, activation=Activation.RELU, gate_layout=GateLayout.CONCATENATED)
    nodes = "\n".join(
        [
            call(CASE, "tokens", "a"),
            call(dataclasses.replace(CASE, spec=other), "tokens", "b"),
            call(APART, "tokens", "c"),
            "ab = Add (a, b)",
            "y = Add (ab, c)",
        ]
    )
    made = model(CASE, nodes, f", {weight_inputs(APART)}")
    attach_functions(made)
    assert sorted(name for _, name, _ in made.functions) == ["GatedMoE", "MoE"]
    weights = APART.weights(np.random.default_rng(1))

    def expected(x: np.ndarray, block) -> np.ndarray:
        return block(x) + block(x, other) + block(x, APART.spec, weights)

    check(CASE, made, expected, **weights)


def test_attaching_is_idempotent() -> None:
    made = model(CASE, call(CASE, "tokens", "y"))
    assert attach_functions(made)
    once = ir.to_proto(made).SerializeToString(deterministic=True)
    assert not attach_functions(made)
    assert ir.to_proto(made).SerializeToString(deterministic=True) == once
    again = ir.from_proto(onnx.ModelProto.FromString(once))
    assert not attach_functions(again)


def test_the_opset_is_the_models() -> None:
    for opset in (18, 21, 24):
        made = model(CASE, call(CASE, "tokens", "y"), opset=opset)
        attach_functions(made)
        assert made.functions[("sparse_onnx", "MoE", "")].opset_imports == {"": opset}


def test_the_domain_is_imported() -> None:
    made = model(CASE, call(CASE, "tokens", "y"))
    del made.opset_imports["sparse_onnx"]
    assert attach_functions(made)
    assert made.opset_imports["sparse_onnx"] == 1


def test_a_model_without_blocks_is_left_alone() -> None:
    for opset in (11, 20):
        made = model(CASE, "y = Neg (tokens)", opset=opset)
        before = ir.to_proto(made).SerializeToString(deterministic=True)
        assert not attach_functions(made)
        assert ir.to_proto(made).SerializeToString(deterministic=True) == before


def test_a_definition_that_is_there_is_kept() -> None:
    made = model(CASE, call(CASE, "tokens", "y"))
    attach_functions(made)
    own = made.functions[("sparse_onnx", "MoE", "")]
    attach_functions(made)
    assert made.functions[("sparse_onnx", "MoE", "")] is own


def test_old_opsets_are_refused_and_nothing_changes() -> None:
    made = model(CASE, call(CASE, "tokens", "y"), opset=17)
    before = ir.to_proto(made).SerializeToString(deterministic=True)
    with pytest.raises(ModelError, match="opset 17 is too old") as error:
        attach_functions(made)
    assert error.value.hint and error.value.exit_code == 3
    assert ir.to_proto(made).SerializeToString(deterministic=True) == before


@pytest.mark.parametrize("op", ["MoE", "GatedMoE"])
def test_one_definition_serves_every_attribute(op: str) -> None:
    """Equal for all specs, and of names that no scope inside it uses twice."""
    function = make_function(op, 18)
    text = ir.serde.serialize_function(function).SerializeToString(deterministic=True)
    assert ir.serde.serialize_function(make_function(op, 18)).SerializeToString(deterministic=True) == text
    names = [v.name for node in function.all_nodes() for v in node.outputs]
    assert len(names) == len(set(names))
    domains = {node.domain for node in function.all_nodes()}
    assert domains == {""}
