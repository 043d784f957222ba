"""The dataclass view of neutral nodes."""

from __future__ import annotations

import math

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from moe_cases import Case, label, specs
from onnx import helper, numpy_helper

from sparse_onnx.blocks import (
    Activation,
    ExpertSpec,
    GateLayout,
    MoEBlock,
    WeightLayout,
    attach_functions,
    blocks,
    is_zero,
    make_node,
)
from sparse_onnx.core.errors import ModelError

ALL = list(specs())
SWIGLU = ExpertSpec(Activation.SILU, GateLayout.CONCATENATED, WeightLayout.OUT_IN)


def value(name: str, shape: list | None, dtype: ir.DataType = ir.DataType.FLOAT) -> ir.Value:
    return ir.Value(name=name, shape=None if shape is None else ir.Shape(shape), type=ir.TensorType(dtype))


def parts(case: Case, rng: np.random.Generator | None = None, biases: bool = True) -> dict:
    """Arguments of make_node, with constant weights."""
    arrays = case.weights(rng or np.random.default_rng(0), biases)
    weights = {
        name: ir.Value(name=name, const_value=ir.tensor(array, name=name)) for name, array in arrays.items()
    }
    for name, weight in weights.items():
        weight.shape, weight.type = ir.Shape(arrays[name].shape), ir.TensorType(ir.DataType.FLOAT)
    return {
        "tokens": value("tokens", ["T", case.hidden]),
        "expert_index": value("index", ["T", case.top_k], ir.DataType.INT64),
        "expert_weight": value("weight", ["T", case.top_k], ir.DataType.FLOAT16),
        "weights": weights,
    }


def view(case: Case, **changes) -> MoEBlock:
    arguments = parts(case) | changes
    block = MoEBlock.of(make_node(case.spec, **arguments, name="layers.3.mlp"))
    assert block is not None
    return block


@pytest.mark.parametrize("spec", ALL, ids=label)
def test_fields(spec: ExpertSpec) -> None:
    case = Case(spec)
    block = view(case)
    assert (block.op, block.spec, block.gated, block.name) == (spec.op, spec, spec.gated, "layers.3.mlp")
    sizes = (block.experts, block.hidden, block.inner, block.hidden_out, block.top_k)
    assert sizes == (case.experts, case.hidden, case.inner, case.outputs, case.top_k)
    assert (block.tokens.name, block.expert_index.name, block.expert_weight.name) == (
        "tokens",
        "index",
        "weight",
    )
    assert list(block.weights) == list(case.shapes)
    assert block.dtype == ir.DataType.FLOAT and block.output is block.node.outputs[0]
    assert block.output.name == "layers.3.mlp/output" and block.output.dtype == ir.DataType.FLOAT
    assert block.output.shape == ir.Shape(["T", case.outputs])


@pytest.mark.parametrize("spec", ALL, ids=label)
def test_parameters(spec: ExpertSpec) -> None:
    case = Case(spec)
    total = sum(math.prod(shape) for shape in case.shapes.values())
    matrices = sum(math.prod(shape) for shape in case.shapes.values() if len(shape) == 3)
    block = view(case)
    assert block.parameters == total and block.weight_bytes == 4 * total
    assert block.active_parameters == total // case.experts * case.top_k
    without = view(case, **parts(case, biases=False))
    assert without.parameters == matrices and without.weight_bytes == 4 * total
    one_token_hits_all = view(Case(spec, top_k=9))
    assert one_token_hits_all.active_parameters == total


def test_sizes_that_are_unknown() -> None:
    case = Case(SWIGLU)
    loose = {name: value(name, None) for name in case.shapes}
    block = view(case, weights=loose, expert_index=value("index", None), expert_weight=value("w", None))
    assert (block.experts, block.top_k, block.inner, block.hidden_out) == (None, None, None, None)
    assert block.hidden == case.hidden
    assert (block.parameters, block.active_parameters, block.weight_bytes) == (None, None, 0)


def test_quantized_weights_count_in_their_own_width() -> None:
    case = Case(SWIGLU)
    arguments = parts(case)
    packed = ir.Value(name="fc1_q", const_value=ir.tensor(np.zeros(case.shapes["fc1"], np.int8)))
    scale = ir.Value(name="fc1_s", const_value=ir.tensor(np.ones(case.experts, np.float32)))
    dequantized = ir.Node("", "DequantizeLinear", [packed, scale], [ir.AttrInt64("axis", 0)])
    before = view(case).weight_bytes
    arguments["weights"]["fc1"] = dequantized.outputs[0]
    dequantized.outputs[0].shape = ir.Shape(case.shapes["fc1"])
    elements = math.prod(case.shapes["fc1"])
    block = view(case, **arguments)
    assert block.weight_bytes == before - 3 * elements + 4 * case.experts
    assert block.parameters == view(case).parameters


def test_a_spec_survives_the_file() -> None:
    spec = ExpertSpec(Activation.SILU, GateLayout.INTERLEAVED, WeightLayout.IN_OUT, 7.0, 1.702, 0.1)
    model = ir.from_proto(onnx.ModelProto.FromString(Case(spec).model().SerializeToString()))
    (block,) = blocks(model)
    assert block.spec == spec
    assert block.name == "block" and block.parameters is not None


def test_other_nodes_are_none() -> None:
    assert MoEBlock.of(ir.Node("", "Identity", [value("x", [1])])) is None
    assert MoEBlock.of(ir.Node("sparse_onnx", "ThresholdedLinear", [value("x", [1])])) is None
    assert MoEBlock.of(ir.Node("com.microsoft", "MoE", [value("x", [1])])) is None


def test_name_without_metadata() -> None:
    node = view(Case(SWIGLU)).node
    node.metadata_props.clear()
    node.name = "n"
    assert MoEBlock.of(node).name == "n"
    node.name = None
    assert MoEBlock.of(node).name == "layers.3.mlp/output"


class TestMalformed:
    @pytest.fixture
    def node(self) -> ir.Node:
        return view(Case(SWIGLU)).node

    def refused(self, node: ir.Node, match: str) -> None:
        with pytest.raises(ModelError, match=match) as error:
            MoEBlock.of(node)
        assert error.value.where == "node 'layers.3.mlp'"
        assert error.value.exit_code == 3

    def test_an_input_too_few(self, node: ir.Node) -> None:
        node.resize_inputs(6)
        self.refused(node, "needs the inputs tokens, .*fc2_bias")

    def test_an_input_too_many(self, node: ir.Node) -> None:
        node.resize_inputs(8)
        self.refused(node, "needs the inputs")

    def test_an_input_left_out(self, node: ir.Node) -> None:
        node.replace_input_with(4, None)
        self.refused(node, "needs the inputs")

    @pytest.mark.parametrize("name", SWIGLU.attributes())
    def test_an_attribute_missing(self, node: ir.Node, name: str) -> None:
        del node.attributes[name]
        self.refused(node, f"lacks the attribute '{name}'")

    @pytest.mark.parametrize("name", SWIGLU.attributes())
    def test_an_attribute_of_another_type(self, node: ir.Node, name: str) -> None:
        node.attributes[name] = ir.AttrString(name, "silu")
        self.refused(node, f"attribute '{name}' that is STRING")

    @pytest.mark.parametrize(
        ("name", "number"), [("activation", 6), ("gate_layout", 4), ("weight_layout", -1)]
    )
    def test_a_number_out_of_range(self, node: ir.Node, name: str, number: int) -> None:
        node.attributes[name] = ir.AttrInt64(name, number)
        self.refused(node, "out of range")

    def test_the_layout_of_another_operator(self, node: ir.Node) -> None:
        node.attributes["gate_layout"] = ir.AttrInt64("gate_layout", int(GateLayout.SEPARATE))
        self.refused(node, "gate_layout")

    @pytest.mark.parametrize("position", range(7))
    def test_an_axis_too_many(self, node: ir.Node, position: int) -> None:
        node.inputs[position].shape = ir.Shape([*node.inputs[position].shape, 1])
        self.refused(node, "axes")

    @pytest.mark.parametrize(
        ("position", "axis"), [(0, 1), (2, 1), (3, 0), (3, 1), (3, 2), (4, 0), (4, 1), (5, 1), (5, 2), (6, 1)]
    )
    def test_a_size_that_contradicts_another(self, node: ir.Node, position: int, axis: int) -> None:
        shape = list(node.inputs[position].shape)
        shape[axis] += 2
        node.inputs[position].shape = ir.Shape(shape)
        self.refused(node, "contradict")

    def test_an_odd_width_has_no_halves(self, node: ir.Node) -> None:
        for position in (3, 4):
            shape = list(node.inputs[position].shape)
            node.inputs[position].shape = ir.Shape([shape[0], 11, *shape[2:]])
        self.refused(node, "odd number")

    def test_a_type_that_nothing_tells(self, node: ir.Node) -> None:
        node.inputs[0].type = node.inputs[3].type = node.inputs[3].const_value = None
        self.refused(node, "unknown type")


def test_make_node_wants_every_role() -> None:
    case = Case(SWIGLU)
    arguments = parts(case)
    del arguments["weights"]["fc1_bias"]
    with pytest.raises(ModelError, match="fc1_bias"):
        make_node(SWIGLU, **arguments, name="n")


def test_blocks_in_graph_order_with_subgraphs() -> None:
    case = Case(SWIGLU)

    def branch(name: str) -> onnx.GraphProto:
        output = helper.make_tensor_value_info(f"{name}_y", onnx.TensorProto.FLOAT, None)
        node = case.node(f"{name}_y")
        node.name = name
        return helper.make_graph([node], name, [], [output])

    first, last = case.node("a"), case.node("y")
    first.name, last.name = "first", "last"
    condition = numpy_helper.from_array(np.array(True), "condition")
    choice = helper.make_node(
        "If", ["condition"], ["b"], then_branch=branch("then"), else_branch=branch("else")
    )
    output = helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, None)
    graph = helper.make_graph([first, choice, last], "g", case.inputs(), [output], [condition])
    model = ir.from_proto(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    )
    names = [block.name for block in blocks(model)]
    assert (names[0], set(names[1:-1]), names[-1]) == ("first", {"then", "else"}, "last")
    attach_functions(model)
    assert len(blocks(model)) == 4


class TestIsZero:
    @pytest.mark.parametrize("dtype", [np.float32, np.float16])
    def test_constants(self, dtype: type) -> None:
        zeros, ones = np.zeros((3, 4), dtype), np.zeros((3, 4), dtype)
        ones[2, 3] = 1
        assert is_zero(ir.Value(name="z", const_value=ir.tensor(zeros)))
        assert not is_zero(ir.Value(name="o", const_value=ir.tensor(ones)))
        assert is_zero(ir.Node("", "Constant", [], [ir.AttrTensor("value", ir.tensor(zeros))]).outputs[0])
        assert not is_zero(ir.Node("", "Constant", [], [ir.AttrTensor("value", ir.tensor(ones))]).outputs[0])

    def test_bfloat16_and_negative_zero_and_nan(self) -> None:
        import ml_dtypes

        assert is_zero(ir.Value(name="z", const_value=ir.tensor(np.zeros(3, ml_dtypes.bfloat16))))
        assert is_zero(ir.Value(name="z", const_value=ir.tensor(np.array([-0.0], np.float32))))
        assert not is_zero(ir.Value(name="z", const_value=ir.tensor(np.array([np.nan], np.float32))))

    def test_constant_of_shape(self) -> None:
        shape = value("s", [2], ir.DataType.INT64)
        assert is_zero(ir.Node("", "ConstantOfShape", [shape]).outputs[0])
        for fill in (0.0, 1.0):
            attribute = ir.AttrTensor("value", ir.tensor(np.array([fill], np.float32)))
            assert is_zero(ir.Node("", "ConstantOfShape", [shape], [attribute]).outputs[0]) == (fill == 0)

    def test_what_a_caller_can_override_is_not(self) -> None:
        bias = ir.Value(name="b", const_value=ir.tensor(np.zeros(3, np.float32)))
        ir.Graph([bias], [], nodes=[], initializers=[bias], opset_imports={"": 20})
        assert not is_zero(bias)
        assert not is_zero(value("computed", [3]))

    def test_large_ones_are_not_read(self) -> None:
        def evaluate() -> ir.Tensor:
            raise AssertionError("was read")

        lazy = ir.LazyTensor(evaluate, ir.DataType.FLOAT, ir.Shape([1 << 25]))
        assert not is_zero(ir.Value(name="b", const_value=lazy))

    def test_external(self, tmp_path) -> None:
        np.concatenate([np.zeros(8, np.float32), np.ones(8, np.float32)]).tofile(tmp_path / "w")
        for offset, expected in ((0, True), (32, False)):
            tensor = ir.ExternalTensor(
                "w", offset, 32, ir.DataType.FLOAT, shape=ir.Shape([8]), name="b", base_dir=str(tmp_path)
            )
            assert is_zero(ir.Value(name="b", const_value=tensor)) == expected
