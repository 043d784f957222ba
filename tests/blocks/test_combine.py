"""`sparse_onnx::Combine`: body and reference against a plain loop, the view, and the tools that meet such blocks."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from any_body import Graph, dense_model, outlined, routing
from bodies_of_experts import BODIES, linear
from harness import assert_close, run_model
from onnx import TensorProto, helper

from sparse_onnx import optimize
from sparse_onnx.blocks import (
    CombineBlock,
    attach_functions,
    combine_blocks,
    combine_reference,
    make_combine,
    make_function,
    neutral_blocks,
)
from sparse_onnx.core.errors import ModelError
from sparse_onnx.graph import io
from sparse_onnx.inspect import inspect
from sparse_onnx.passes.name_blocks import NameBlocks
from sparse_onnx.verify import lowering
from sparse_onnx.verify.blocks import compare_blocks

FLOATS = {"float32": TensorProto.FLOAT, "float16": TensorProto.FLOAT16}


def bare_model(dtype: str, weight_dtype: str, opset: int) -> ir.Model:
    value = helper.make_tensor_value_info
    node = helper.make_node("Combine", ["index", "weight", "experts"], ["y"], "block", domain="sparse_onnx")
    inputs = [
        value("index", TensorProto.INT64, ["T", "K"]),
        value("weight", FLOATS[weight_dtype], ["T", "K"]),
        value("experts", FLOATS[dtype], ["E", "T", "D"]),
    ]
    graph = helper.make_graph([node], "g", inputs, [value("y", FLOATS[dtype], ["T", "D"])])
    imports = [helper.make_opsetid("", opset), helper.make_opsetid("sparse_onnx", 1)]
    model = ir.from_proto(helper.make_model(graph, opset_imports=imports, ir_version=10))
    assert attach_functions(model) and not attach_functions(model)
    onnx.checker.check_model(ir.to_proto(model), full_check=True)
    return model


def draw(
    tokens: int, top_k: int, experts: int, kind: str, dtype: str, weight_dtype: str
) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(tokens)
    values = rng.standard_normal((experts, tokens, 5)).astype(dtype)
    weight = rng.uniform(-1, 1, (tokens, top_k)).astype(weight_dtype)
    index = rng.integers(0, experts, (tokens, top_k))
    if kind == "dropped":
        index[rng.random(index.shape) < 0.5] = experts
        weight[index == experts] = np.inf  # must not matter
        values[0, (index == experts).any(axis=1) & (index != 0).all(axis=1)] = np.nan  # nor this
    elif kind == "one":
        index[:] = experts - 1
    elif kind == "all dropped":
        index[:] = experts
    return {"index": index, "weight": weight, "experts": values}


def plainly(index: np.ndarray, weight: np.ndarray, experts: np.ndarray) -> np.ndarray:
    result = np.zeros(experts.shape[1:], np.float64)
    for token in range(index.shape[0]):
        for slot in range(index.shape[1]):
            if index[token, slot] < len(experts):
                row = experts[index[token, slot], token].astype(np.float64)
                result[token] = result[token] + float(weight[token, slot]) * row
    return result.astype(experts.dtype)


@pytest.mark.parametrize("opset", [18, 23])
@pytest.mark.parametrize("kind", ["random", "one", "dropped", "all dropped"])
@pytest.mark.parametrize(
    ("dtype", "weight_dtype", "tolerance"),
    [("float32", "float32", 1e-6), ("float16", "float32", 1e-3), ("float16", "float16", 4e-3)],
)
def test_body_and_reference(opset: int, kind: str, dtype: str, weight_dtype: str, tolerance: float) -> None:
    model = bare_model(dtype, weight_dtype, opset)
    for tokens, top_k, experts in ((0, 2, 3), (1, 1, 1), (6, 3, 4), (9, 4, 2)):
        feeds = draw(tokens, top_k, experts, kind, dtype, weight_dtype)
        expected = plainly(**feeds)
        known = combine_reference(feeds["index"], feeds["weight"], feeds["experts"])
        np.testing.assert_array_equal(known, expected)
        for level in (0, 99):
            assert_close(expected, run_model(model, feeds, level=level)[0], tolerance)


def test_the_sum_is_taken_in_the_type_of_the_weight() -> None:
    """1 and a thousand parts of 2^-12: lost one by one in float16, not in float32."""
    feeds = {
        "index": np.zeros((1, 1025), np.int64),
        "weight": np.asarray([[1.0] + [2.0**-12] * 1024], np.float32),
        "experts": np.ones((1, 1, 1), np.float16),
    }
    assert run_model(bare_model("float16", "float32", 20), feeds)[0] == np.float16(1.25)


def test_an_index_outside_is_refused_by_the_reference() -> None:
    with pytest.raises(ValueError, match=r"outside \[0, 2\]"):
        combine_reference(np.asarray([[3]]), np.ones((1, 1)), np.ones((2, 1, 4)))


def test_an_old_opset_has_no_function() -> None:
    with pytest.raises(ModelError, match="opset 17 is too old"):
        make_function("Combine", 17)


def test_the_schema_checks_and_infers() -> None:
    """In a process of its own: registering is for good."""
    code = f"""
import sys
sys.path[:0] = {[str(Path(__file__).parent), str(Path(__file__).parents[1])]!r}
import onnx
import onnx_ir as ir
from test_combine import bare_model
from sparse_onnx.blocks import register_schemas
register_schemas()
model = ir.to_proto(bare_model("float16", "float32", 20))
del model.functions[:]
model.graph.node[0].output[0] = "sum"
model.graph.node.append(onnx.helper.make_node("Identity", ["sum"], ["y"]))
onnx.checker.check_model(model, full_check=True)
inferred = onnx.shape_inference.infer_shapes(model, strict_mode=True)
print([dim.dim_param for dim in inferred.graph.value_info[0].type.tensor_type.shape.dim])
assert "dropped" in onnx.defs.get_schema("Combine", 1, "sparse_onnx").doc
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "['T', 'D']"


def value(name: str, shape: list[int | str], dtype: ir.DataType = ir.DataType.FLOAT) -> ir.Value:
    return ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(dtype))


def test_view() -> None:
    index, weight = value("i", ["T", 2], ir.DataType.INT64), value("w", ["T", 2])
    node = make_combine(index, weight, value("Y", [4, "T", 16]), name="layers.3.moe", spelling="dense")
    block = CombineBlock.of(node)
    assert block is not None and block.name == "layers.3.moe" and block.spelling == "dense"
    assert (block.experts, block.top_k, block.hidden_out, block.hidden) == (4, 2, 16, None)
    assert block.calls == () and block.tokens is None and block.parameters is None
    assert block.output.shape == ir.Shape(["T", 16]) and block.output.dtype == ir.DataType.FLOAT
    assert CombineBlock.of(ir.Node("", "Combine", [index])) is None


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        (([7, 2], [7, 3], [4, 7, 16]), "sizes that contradict"),
        (([7, 2], [7, 2], [4, 16]), "with 3 axes"),
        (([7, 2], [7, 2], [4, 9, 16]), "sizes that contradict"),
    ],
)
def test_malformed(shapes: tuple[list[int], ...], message: str) -> None:
    index = value("i", shapes[0], ir.DataType.INT64)
    node = make_combine(index, value("w", shapes[1]), value("Y", shapes[2]), name="n")
    node.outputs[0].shape = None
    with pytest.raises(ModelError, match=message):
        CombineBlock.of(node)
    with pytest.raises(ModelError, match="needs the inputs"):
        CombineBlock.of(ir.Node("sparse_onnx", "Combine", [index]))


def tanh_expert(graph: Graph, x: str, expert: int) -> str:
    return graph.op("Tanh", linear(graph, x, 16, 16))


def saved(tmp_path: Path, name: str = "") -> Path:
    body = BODIES[name] if name else None
    write, row, out = (tanh_expert, (16,), None) if body is None else (body.write, body.row, body.out)
    model, shop = outlined(dense_model(write, row, out))
    assert shop.rewritten == 1
    path = tmp_path / "neutral.onnx"
    io.save(model, path)
    return path


def test_names_are_told_apart() -> None:
    def two(graph: Graph, x: str, expert: int) -> tuple[str, str]:
        hidden = linear(graph, x, 16, 16)
        return graph.op("Tanh", hidden), graph.op("Relu", hidden)

    model, _ = outlined(dense_model(two))
    for block in combine_blocks(model):
        block.node.metadata_props["sparse_onnx.block"] = "experts"
    NameBlocks()(model)
    assert [block.name for block in neutral_blocks(model)] == ["experts", "experts_1"]


def test_inspect(tmp_path: Path) -> None:
    [block] = inspect(saved(tmp_path)).blocks
    assert (block.kind, block.spelling, block.activation, block.gated) == ("moe", "test", None, False)
    assert (block.experts, block.top_k, block.hidden, block.inner) == (4, 2, 16, None)
    assert block.parameters == 4 * (256 + 16) and block.active_parameters == 2 * (256 + 16)


@pytest.mark.parametrize("by_blocks", [False, True])
@pytest.mark.parametrize("name", ["", "conv", "einsum", "group norm written out", "sequence"])
def test_optimize_and_verify(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, by_blocks: bool
) -> None:
    if name == "sequence":
        body = BODIES[name]
        model, _ = outlined(dense_model(body.write, body.row, lead=body.lead))
        source = tmp_path / "neutral.onnx"
        io.save(model, source)
    else:
        source = saved(tmp_path, name)
    if by_blocks:
        monkeypatch.setattr(lowering, "WHOLE_BYTES", 0)
    report = optimize(source, tmp_path / "out.onnx")
    assert report.verify is not None and report.verify.passed
    assert report.verify.method == ("blocks" if by_blocks else "whole")
    [block] = inspect(tmp_path / "out.onnx").blocks
    assert block.form == "grouped" and block.spelling == "test"
    assert not io.load(tmp_path / "out.onnx").functions


def test_verify_sees_a_swapped_expert(tmp_path: Path) -> None:
    source = saved(tmp_path, "conv")
    optimize(source, tmp_path / "out.onnx")
    before, after = io.load(source), io.load(tmp_path / "out.onnx")
    assert compare_blocks(before, after, memory=1 << 30, threads=1).passed
    weights = [v for v in after.graph.initializers.values() if v.shape == ir.Shape([8, 4, 3, 3])]
    first, second = weights[:2]
    first.const_value, second.const_value = second.const_value, first.const_value
    record = compare_blocks(before, after, memory=1 << 30, threads=1)
    assert record.passed is False and "block" in (record.failure or "")


def test_routing_of_the_models_input_is_known() -> None:
    """What `verify` draws for the index of a Combine must be experts."""
    from sparse_onnx.verify.meaning import meaning

    model, _ = outlined(dense_model(tanh_expert))
    assert meaning(model.graph.inputs[1], {}).experts == 4
    assert routing(dense_model(tanh_expert), 3)["index"].max() < 4
