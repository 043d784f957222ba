"""Kernels that round activations, found and replaced."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from builders import Shape, layered_model
from harness import assert_close, run_model
from ort.graphs import since

from sparse_onnx.blocks.rounding import INT8, INT8_BATCH, rounding, without_rounding
from sparse_onnx.core.passes import Pass
from sparse_onnx.passes.branch_experts import BranchExperts
from sparse_onnx.passes.fuse_gating import FuseGating
from sparse_onnx.passes.fuse_moe_op import FuseMoEOp
from sparse_onnx.passes.quantize_experts import QuantizeExperts

SHAPE = Shape(experts=6, hidden=64, inner=96, biases=True)
X = {"x": np.random.default_rng(0).standard_normal((19, 64)).astype(np.float32)}


def quantized(**options: object) -> ir.Model:
    model = layered_model(SHAPE, layers=1, opset=21)
    QuantizeExperts(**options)(model)
    return model


CASES = [
    (FuseGating(), 4, INT8),
    (FuseGating(), 8, INT8),
    (FuseGating(product="dynamic"), 8, INT8_BATCH),
    (BranchExperts(style="expert"), 4, INT8),
    (BranchExperts(group=3), 8, INT8),
    (BranchExperts(style="loop"), 4, INT8),
    pytest.param(FuseMoEOp(), 4, INT8, marks=since(1, 31)),
    pytest.param(FuseMoEOp(), 8, INT8, marks=since(1, 31)),
]


@pytest.mark.parametrize(("lowering", "bits", "kind"), CASES)
def test_the_same_graph_without_rounding(lowering: Pass, bits: int, kind: str) -> None:
    model = quantized(bits=bits)
    lowered = model.clone()
    assert rounding(lowered.graph) is None
    lowering(lowered)
    assert rounding(lowered.graph) == kind
    expected, deployed = run_model(model, X)[0], run_model(lowered, X)[0]
    assert 1e-3 < np.abs(expected - deployed).max() / np.abs(expected).max() < 0.1
    before = ir.to_proto(lowered).SerializeToString()
    copy = lowered.clone()
    assert without_rounding(copy) is None and rounding(copy.graph) is None
    assert_close(expected, run_model(copy, X, threads=2)[0], 2e-6)
    one = {"x": X["x"][:1]}  # most experts have no tokens
    assert_close(run_model(model, one)[0], run_model(copy, one)[0], 2e-6)
    assert ir.to_proto(lowered).SerializeToString() == before, "only the copy was changed"


def test_the_coarsest_counts() -> None:
    model = quantized(bits=8)
    other = model.clone()
    FuseGating()(model)
    FuseGating(product="dynamic")(other)
    assert rounding([*model.graph, *other.graph]) == INT8_BATCH


def test_experts_of_float_do_not_round() -> None:
    model = layered_model(SHAPE, layers=1)
    FuseGating()(model)
    assert rounding(model.graph) is None and without_rounding(model) is None


def test_what_has_no_other_kernel_stays() -> None:
    """QMoE with 8-bit weights in blocks."""
    model = quantized(bits=8, block=32)
    assert FuseMoEOp()(model).rewritten == 1
    assert rounding(model.graph) == INT8 and without_rounding(model) == INT8
