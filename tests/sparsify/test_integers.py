"""Weights that are integers already: MatMulNBits and DequantizeLinear become what the kernel reads, input by input."""

from __future__ import annotations

import copy
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import pytest
from dense_layers import prepared
from harness import run_model
from onnx import TensorProto, helper, numpy_helper

from sparse_onnx.core.passes import Outcome
from sparse_onnx.matching.sites import sites
from sparse_onnx.optimize.watched import check_layers
from sparse_onnx.passes.insert_thresholds import InsertThresholds
from sparse_onnx.sparsify.plan import Plan, SitePlan

K, N = 64, 40
LEVEL = "sparsity_level"
DTYPES = {"int4": ml_dtypes.int4, "uint4": ml_dtypes.uint4, "int8": np.int8, "uint8": np.uint8}


def graph(nodes: list[onnx.NodeProto], stored: list[onnx.TensorProto], opset: int = 21) -> onnx.ModelProto:
    """h = x W, y = h V, so that neither is a head."""
    rng = np.random.default_rng(9)
    last = (rng.standard_normal((N, K)) / np.sqrt(N)).astype(np.float32)
    nodes = [
        *nodes,
        helper.make_node("Tanh", ["h"], ["t"]),
        helper.make_node("MatMul", ["t", "V"], ["y"], name="V"),
    ]
    body = helper.make_graph(
        nodes,
        "integers",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["T", K])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["T", K])],
        [*stored, numpy_helper.from_array(last, "V")],
    )
    opsets = [helper.make_opsetid("", opset), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(body, opset_imports=opsets, ir_version=10)


def dequantized(kind: str, layout: str, grid: str) -> onnx.ModelProto:
    """`layout`: kn, nk (Gemm transB) or turned (Transpose); `grid`: blocks0, blocks1, rows, columns or one."""
    rng = np.random.default_rng(1)
    shape = (K, N) if layout == "kn" else (N, K)
    info = ml_dtypes.iinfo(DTYPES[kind])
    data = rng.integers(int(info.min), int(info.max), shape, endpoint=True).astype(DTYPES[kind])
    sizes, attributes = {
        "blocks0": ((shape[0] // 8, shape[1]), {"axis": 0, "block_size": 8}),
        "blocks1": ((shape[0], shape[1] // 8), {"axis": 1, "block_size": 8}),
        "rows": ((shape[0],), {"axis": 0}),
        "columns": ((shape[1],), {"axis": 1}),
        "one": ((), {}),
    }[grid]
    scale = (rng.uniform(1, 2, sizes) / 2.0**info.bits).astype(np.float32)
    point = rng.integers(int(info.min), int(info.max), sizes, endpoint=True)
    stored = [
        numpy_helper.from_array(np.asarray(array), name)
        for name, array in (("q", data), ("s", scale), ("z", np.asarray(point).astype(DTYPES[kind])))
    ]
    nodes = [helper.make_node("DequantizeLinear", ["q", "s", "z"], ["w"], name="dq", **attributes)]
    if layout == "turned":
        nodes.append(helper.make_node("Transpose", ["w"], ["v"], name="turn", perm=[1, 0]))
    if layout == "nk":
        nodes.append(helper.make_node("Gemm", ["x", "w"], ["h"], name="product", transB=1))
    else:
        second = "v" if layout == "turned" else "w"
        nodes.append(helper.make_node("MatMul", ["x", second], ["h"], name="product"))
    return graph(nodes, stored)


def nbits(bits: int, points: bool, bias: bool, accuracy: int = 0) -> onnx.ModelProto:
    rng = np.random.default_rng(2)
    blocks, block = K // 16, 16
    arrays = {
        "B": rng.integers(0, 256, (N, blocks, block * bits // 8)).astype(np.uint8),
        "s": (rng.uniform(1, 2, (N, blocks)) / 2.0**bits).astype(np.float32),
        "z": rng.integers(0, 256, (N, -(-blocks * bits // 8))).astype(np.uint8),
        "b": rng.standard_normal(N).astype(np.float32),
    }
    inputs = ["x", "B", "s", "z" if points else "", "", "b" if bias else ""]
    while not inputs[-1]:
        inputs.pop()
    attributes = {"accuracy_level": accuracy} if accuracy else {}
    node = helper.make_node(
        "MatMulNBits", inputs, ["h"], name="product", domain="com.microsoft",
        K=K, N=N, bits=bits, block_size=block, **attributes,
    )  # fmt: skip
    stored = [numpy_helper.from_array(array, name) for name, array in arrays.items() if name in inputs]
    return graph([node], stored, 20)


def check(model: onnx.ModelProto, kernels: bool, rewritten: int = 2) -> ir.Model:
    before = prepared(ir.from_proto(copy.deepcopy(model)))
    share = np.linspace(0, 1, 101)
    table = np.concatenate([[-1.0], np.linspace(0, 2, 100)])
    centre = np.array([0.15], np.float32)
    plan = Plan({site.name: SitePlan(site.name, centre, table, share) for site in sites(before)}, 40)
    after = prepared(ir.from_proto(copy.deepcopy(model)))
    outcome = InsertThresholds(plan)(after)
    assert isinstance(outcome, Outcome)
    assert outcome.rewritten == rewritten, outcome.refusals
    onnx.checker.check_model(ir.to_proto(after), full_check=True)
    rng = np.random.default_rng(3)
    feeds = [{"x": rng.standard_normal((tokens, K)).astype(np.float32)} for tokens in (1, 6)]
    for native in (False, True) if kernels else (False,):
        reached, error = check_layers(after, LEVEL, 40, feeds, kernels=native)
        assert reached == rewritten and error < 5e-6
    for each in feeds:
        dense = run_model(before, each, level=0)[0]
        scale = np.abs(dense).max()
        same = run_model(after, each | {LEVEL: np.array(0)}, level=0)[0]
        assert np.abs(dense - same).max() < 3e-6 * scale
        assert np.abs(dense - run_model(after, each, level=0)[0]).max() > 1e-2 * scale
    return after


@pytest.mark.parametrize("kind", list(DTYPES))
@pytest.mark.parametrize("layout", ["kn", "nk", "turned"])
def test_dequantized(kind: str, layout: str, kernels: Path) -> None:
    for grid in ("blocks0", "blocks1", "rows", "columns", "one"):
        after = check(dequantized(kind, layout, grid), True)
        kinds = [node.op_type for node in after.graph]
        assert kinds.count("ThresholdedLinearNBits") == 1 and "DequantizeLinear" not in kinds
        stored = [
            value.const_value for value in after.graph.initializers.values() if value.const_value is not None
        ]
        large = [held for held in stored if held.size == K * N and held.dtype != ir.DataType.FLOAT]
        assert [held.dtype.name.lower() for held in large] == [kind], "integers stay integers, and once"


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("points", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_matmul_nbits(bits: int, points: bool, bias: bool, kernels: Path) -> None:
    after = check(nbits(bits, points, bias), True)
    assert after.opset_imports[""] == 21, "blocks of DequantizeLinear"
    assert sum(node.op_type == "ThresholdedLinearNBits" for node in after.graph) == 1


def test_two_bits_are_simulated_alone() -> None:
    model = nbits(2, True, False)
    after = check(model, False, rewritten=1)
    assert sum(node.op_type == "MatMulNBits" for node in after.graph) == 1
