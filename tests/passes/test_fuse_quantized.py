"""Blocks whose weights are dequantized, lowered: by MatMulNBits where it fits, else one DequantizeLinear an expert."""

from __future__ import annotations

import dataclasses

import numpy as np
import onnx_ir as ir
import pytest
from builders import Shape, expert_weights, finish, neutral_node
from contrib_models import packed
from harness import check_rewrite
from onnx import TensorProto, helper, numpy_helper

from sparse_onnx.blocks import blocks
from sparse_onnx.blocks.quantized import Quantized
from sparse_onnx.passes.fuse_gating import FuseGating

BITS = {
    TensorProto.UINT4: 4, TensorProto.INT4: 4, TensorProto.UINT8: 8, TensorProto.INT8: 8, TensorProto.UINT2: 2,
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Storage:
    """How a weight is quantized. `block` 0: one scale an index of `axis`; axis None: one scale."""

    kind: int = TensorProto.UINT4
    block: int = 16
    axis: int | None = 2
    points: bool = True
    middle: bool = False
    opset: int = 21


def quantized_model(shape: Shape, storage: Storage, seed: int = 0, scale_input: bool = False) -> ir.Model:
    """tokens, index, weight -> y, the matrices behind DequantizeLinear."""
    rng = np.random.default_rng(seed)
    held = expert_weights(shape, rng)
    nodes, initializers, bits = [], [], BITS[storage.kind]
    for name, array in held.items():
        if name.endswith("_bias"):
            initializers.append(numpy_helper.from_array(array, name))
            continue
        dims = array.shape
        signed = storage.kind in (TensorProto.INT4, TensorProto.INT8)
        numbers = rng.integers(0, 1 << bits, dims).astype(np.uint8)
        grid = _grid(dims, storage)
        points = rng.integers(0, 1 << bits, grid).astype(np.uint8)
        if storage.middle:
            points[...] = 1 << (bits - 1)
        scale = (rng.uniform(0.5, 1.5, grid) / (1 << bits) / np.sqrt(dims[1])).astype(array.dtype)
        if signed and not storage.points:
            scale *= 2
        inputs = [f"{name}.data", f"{name}.scale"]
        initializers.append(_integers(inputs[0], storage.kind, dims, numbers))
        if not (scale_input and name == "fc1"):
            initializers.append(numpy_helper.from_array(scale, inputs[1]))
        if storage.points:
            inputs.append(f"{name}.points")
            initializers.append(_integers(inputs[2], storage.kind, grid, points))
        attributes = {} if storage.axis is None else {"axis": storage.axis}
        if storage.block:
            attributes["block_size"] = storage.block
        nodes.append(helper.make_node("DequantizeLinear", inputs, [name], name=f"{name}.node", **attributes))
    nodes.append(neutral_node(shape, "block", ["tokens", "index", "weight", *held], "y"))
    inputs = [
        helper.make_tensor_value_info("tokens", TensorProto.FLOAT, ["T", shape.hidden]),
        helper.make_tensor_value_info("index", TensorProto.INT64, ["T", shape.top_k]),
        helper.make_tensor_value_info("weight", TensorProto.FLOAT, ["T", shape.top_k]),
    ]
    if scale_input:
        inputs.append(
            helper.make_tensor_value_info("fc1.scale", TensorProto.FLOAT, _grid(held["fc1"].shape, storage))
        )
    known = [
        helper.make_tensor_value_info(n, TensorProto.FLOAT, a.shape)
        for n, a in held.items()
        if "_bias" not in n
    ]
    out = [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["T", shape.hidden])]
    graph = helper.make_graph(nodes, "quantized", inputs, out, initializers, value_info=known)
    model = finish(graph, storage.opset)
    if storage.opset >= 25:
        model.ir_version = 13
    return model


def _grid(dims: tuple[int, ...], storage: Storage) -> tuple[int, ...]:
    if storage.axis is None:
        return ()
    if not storage.block:
        return (dims[storage.axis],)
    return tuple(
        -(-size // storage.block) if at == storage.axis % 3 else size for at, size in enumerate(dims)
    )


def _integers(name: str, kind: int, dims: tuple[int, ...], numbers: np.ndarray) -> TensorProto:
    data = packed(numbers.reshape(1, -1), BITS[kind]).tobytes()
    return helper.make_tensor(name, kind, dims, data, raw=True)


def feeds(shape: Shape, tokens: int = 9) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(1)
    return {
        "tokens": rng.standard_normal((tokens, shape.hidden)).astype(np.float32),
        "index": rng.integers(0, shape.experts + 1, (tokens, shape.top_k)),
        "weight": rng.uniform(0.2, 1, (tokens, shape.top_k)).astype(np.float32),
    }


SHAPE = Shape(experts=5, hidden=32, inner=48, biases=True)
WIDE = dataclasses.replace(SHAPE, experts=9, separate=True, biases=False)
FITS = [
    (SHAPE, Storage()),
    (WIDE, Storage(middle=True)),
    (SHAPE, Storage(points=False, block=32)),  # no zero point is zero: not the operator's own
    (SHAPE, Storage(TensorProto.UINT8, axis=-1)),
    (SHAPE, Storage(TensorProto.UINT2, opset=25)),
    (SHAPE, Storage(block=64)),  # more than a row: one scale each
    (dataclasses.replace(SHAPE, inner=80), Storage(block=80)),  # as many as divide both 80 and 32
]
FALLS_BACK = [
    (SHAPE, Storage(TensorProto.INT8)),
    (SHAPE, Storage(TensorProto.INT4, points=False)),
    (SHAPE, Storage(axis=1)),
    (SHAPE, Storage(TensorProto.INT8, block=0, axis=0)),
    (SHAPE, Storage(TensorProto.INT8, block=0, axis=1)),
    (SHAPE, Storage(TensorProto.UINT8, block=0, axis=2)),
    (SHAPE, Storage(TensorProto.INT8, block=0, axis=None)),
    (dataclasses.replace(SHAPE, weight_layout=1), Storage()),
    (dataclasses.replace(SHAPE, hidden=24), Storage(block=8)),
]


@pytest.mark.parametrize(("shape", "storage"), FITS)
def test_multiplies_by_what_is_stored(shape: Shape, storage: Storage) -> None:
    inputs = [feeds(shape), feeds(shape, 1), feeds(shape, 0)]
    after, _ = check_rewrite(quantized_model(shape, storage), FuseGating(), rewritten=1, feeds=inputs)
    kinds = [node.op_type for node in after.graph]
    matrices = shape.experts * (3 if shape.separate else 2)
    assert kinds.count("MatMulNBits") == matrices and "DequantizeLinear" not in kinds
    points = [
        node.inputs[3] for node in after.graph if node.op_type == "MatMulNBits" and len(node.inputs) > 3
    ]
    assert any(point is not None for point in points) != storage.middle
    assert after.opset_imports["com.microsoft"] == 1


@pytest.mark.parametrize(("shape", "storage"), FALLS_BACK)
def test_dequantizes_each_expert_apart(shape: Shape, storage: Storage) -> None:
    after, _ = check_rewrite(quantized_model(shape, storage), FuseGating(), rewritten=1, feeds=[feeds(shape)])
    kinds = [node.op_type for node in after.graph]
    assert kinds.count("DequantizeLinear") == kinds.count("Gemm") == 2 * shape.experts
    assert "MatMulNBits" not in kinds


def test_without_operators_of_onnx_runtime() -> None:
    after, _ = check_rewrite(
        quantized_model(SHAPE, Storage()), FuseGating(contrib=False), rewritten=1, feeds=[feeds(SHAPE)]
    )
    assert {node.domain for node in after.graph} == {""} and "com.microsoft" not in after.opset_imports


def test_packed_weights_and_their_nodes_are_gone() -> None:
    after, _ = check_rewrite(quantized_model(SHAPE, Storage()), FuseGating(), rewritten=1)
    packed_names = {f"{role}.{part}" for role in ("fc1", "fc2") for part in ("data", "scale", "points")}
    assert not packed_names & set(after.graph.initializers)
    assert not [node for node in after.graph if node.name.endswith(".node")]


@pytest.mark.parametrize(
    ("storage", "computed", "reason"),
    [
        (Storage(block=5, axis=0), False, "blocks of 'fc1.data' run across experts"),
        (Storage(), True, "fc1 is computed or passed in at run time"),
    ],
)
def test_refused(storage: Storage, computed: bool, reason: str) -> None:
    model = quantized_model(SHAPE, storage, scale_input=computed)
    check_rewrite(model, FuseGating(), rewritten=0, refused=[reason])


@pytest.mark.parametrize(("shape", "storage"), FITS + FALLS_BACK)
def test_parts_hold_what_the_node_gives(shape: Shape, storage: Storage) -> None:
    """`dequantized` against onnx's reference evaluator, expert by expert."""
    from onnx.reference import ReferenceEvaluator

    model = quantized_model(shape, storage)
    [block] = blocks(model)
    for role in block.spec.roles:
        weight = Quantized.of(block.weights[role])
        assert weight is not None
        node = ir.to_proto(block.weights[role].producer())
        constants = {value.name: value.const_value.numpy() for value in weight.values}
        inputs = [
            helper.make_tensor_value_info(value.name, int(value.dtype), None) for value in weight.values
        ]
        out = helper.make_tensor_value_info(role, TensorProto.FLOAT, None)
        alone = helper.make_model(
            helper.make_graph([node], "one", inputs, [out]), opset_imports=[helper.make_opsetid("", 21)]
        )
        [expected] = ReferenceEvaluator(alone).run(None, constants)
        for expert in range(shape.experts):
            np.testing.assert_allclose(weight.part(expert, "x").dequantized(), expected[expert], rtol=1e-6)
