"""`optimize(quantize=...)`: what is lost is told, and what comes behind is verified."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from builders import Shape, layered_model, save_external
from onnx import TensorProto, helper
from ort.graphs import since
from verify.variants import edited

from sparse_onnx.core.errors import VerificationError
from sparse_onnx.optimize import optimize
from sparse_onnx.passes.fuse_gating import FuseGating
from sparse_onnx.targets.session import create_session

SHAPE = Shape(experts=6, hidden=64, inner=96)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return save_external(layered_model(SHAPE), tmp_path / "in.onnx")


@pytest.mark.parametrize("width", ["int4", "int8"])
@pytest.mark.parametrize(
    "form", ["grouped", "branched", "gathered", "dense", pytest.param("fused", marks=since(1, 31))]
)
def test_every_form(source: Path, tmp_path: Path, width: str, form: str) -> None:
    out = tmp_path / "out.onnx"
    report = optimize(source, out, quantize=width, form=form)
    assert report.verify is not None and report.verify.passed
    [note] = [note for note in report.notes if "root mean square error" in note]
    assert "'layers.0.experts'" in note and "'layers.1.experts'" in note and f"{width[3]} bits" in note
    assert report.output is not None and report.model is not None
    assert report.output.weight_bytes < 0.4 * report.model.weight_bytes
    x = {"x": np.random.default_rng(0).standard_normal((30, 64)).astype(np.float32)}
    before, after = (create_session(path, threads=1).run(None, x)[0] for path in (source, out))
    error = np.median(np.linalg.norm(before - after, axis=1) / np.linalg.norm(before, axis=1))
    assert 1e-4 < error < (0.2 if width == "int4" else 0.02)


@pytest.mark.parametrize("verify", ["each", "final", "none"])
@pytest.mark.parametrize(("activations", "method"), [("int8", "blocks"), ("float", "whole")])
def test_how_it_is_verified(source: Path, tmp_path: Path, verify: str, activations: str, method: str) -> None:
    passes = {"quantize_experts": {"activations": activations}}
    report = optimize(source, tmp_path / "out.onnx", form="grouped", passes=passes, verify=verify)
    assert report.verify is not None
    assert report.verify.method == ("none" if verify == "none" else method)


@pytest.mark.parametrize("activations", ["int8", "float"])
def test_a_wrong_lowering_is_not_taken_for_what_quantizing_loses(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, activations: str
) -> None:
    real = FuseGating.rewrite

    def swapped(self, block, emit, opset):
        domains = real(self, block, emit, opset)
        held = emit.graph.initializers
        first, second = (held[f"{block.name.removesuffix('experts')}fc2.int4.{expert}"] for expert in (1, 4))
        first.const_value, second.const_value = second.const_value, first.const_value
        return domains

    monkeypatch.setattr(FuseGating, "rewrite", swapped)
    out = tmp_path / "out.onnx"
    with pytest.raises(VerificationError, match="differs from its original"):
        optimize(source, out, form="grouped", passes={"quantize_experts": {"activations": activations}})
    assert not out.exists()


def test_sums_that_are_repaired_outside_do_not_count(tmp_path: Path) -> None:
    """ScatterND with repeated indices is repaired behind the copy that the result is compared with."""

    def edit(proto) -> None:
        graph = proto.graph
        graph.initializer.append(helper.make_tensor("rows", TensorProto.INT64, [4, 1], [0, 1, 1, 0]))
        graph.initializer.append(helper.make_tensor("some", TensorProto.FLOAT, [4, 64], [1.0] * 256))
        graph.node.append(
            helper.make_node("ScatterND", ["y", "rows", "some"], ["z"], name="sum", reduction="add")
        )
        graph.output[0].name = "z"

    model = edited(layered_model(SHAPE), edit)
    path = save_external(model, tmp_path / "in.onnx")
    report = optimize(path, tmp_path / "out.onnx", form="grouped", quantize="int8")
    assert report.verify is not None and report.verify.passed and report.verify.method == "blocks"
    assert next(each.rewritten for each in report.passes if each.name == "repair_scatter_add") == 1
