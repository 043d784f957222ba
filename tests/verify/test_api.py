from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from builders import Shape, layered_model, routed_model, save_external
from onnx import helper
from verify.variants import edited

import sparse_onnx
from sparse_onnx.core.errors import UsageError, VerificationError
from sparse_onnx.graph import io
from sparse_onnx.verify import api

SHAPE = Shape(experts=6, hidden=32, inner=48)


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    source, out = save_external(layered_model(SHAPE), tmp_path / "in.onnx"), tmp_path / "out.onnx"
    sparse_onnx.optimize(source, out, verify="none")
    return source, out


def test_same_answers(pair: tuple[Path, Path]) -> None:
    report = sparse_onnx.verify(*pair)
    assert report.verify is not None and report.verify.passed and report.verify.method == "whole"
    assert report.verify.router_margin is not None and report.verify.tokens_left_out == 0
    assert any("x3 runs" in text for text in report.verify.inputs)


@pytest.mark.parametrize("fits", [True, False])
def test_swapped_experts_fail(pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, fits: bool) -> None:
    source, out = pair
    model = io.load(out)
    a, b = (model.graph.initializers[f"layers.0.fc2.{expert}"] for expert in (0, 5))
    a.const_value, b.const_value = b.const_value, a.const_value
    swapped = out.with_name("swapped.onnx")
    io.save(model, swapped)
    monkeypatch.setattr(api, "_fits", lambda needed, free: fits)
    report = sparse_onnx.verify(source, swapped)
    assert report.verify is not None and report.verify.passed is False and report.verify.failure
    assert report.verify.method == ("whole" if fits else "blocks")


def test_by_blocks(pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api, "_fits", lambda needed, free: False)
    report = sparse_onnx.verify(*pair)
    assert report.verify is not None and report.verify.passed and report.verify.method == "blocks"


def test_near_ties_are_left_out_and_counted(tmp_path: Path) -> None:
    """Two experts whose scores differ by less than rounding; the other model rounds the other way."""
    shape = Shape(experts=2, top_k=1, hidden=8, inner=8)
    one, other = layered_model(shape, layers=1), layered_model(shape, layers=1)
    for model, sign in ((one, 1), (other, -1)):
        router = model.graph.initializers["layers.0.router"]
        columns = router.const_value.numpy().copy()
        columns[:, 1] = columns[:, 0]
        columns[0, 1] += sign * 1e-7  # only tokens whose other scores tie feel it
        router.const_value = ir.Tensor(columns, name=router.name)
    a, b = tmp_path / "a.onnx", tmp_path / "b.onnx"
    ir.save(one, a)
    ir.save(other, b)
    report = sparse_onnx.verify(a, b)
    assert report.verify is not None
    assert report.verify.router_margin is not None and report.verify.router_margin < 1e-5
    assert report.verify.tokens_left_out > 0 and report.verify.passed, report.verify.failure


def test_other_interfaces_cannot_be_compared(tmp_path: Path) -> None:
    a, b = tmp_path / "a.onnx", tmp_path / "b.onnx"
    ir.save(layered_model(SHAPE), a)
    ir.save(routed_model(SHAPE), b)
    with pytest.raises(VerificationError, match="3 inputs"):
        sparse_onnx.verify(a, b)


def test_unknown_target(pair: tuple[Path, Path]) -> None:
    with pytest.raises(UsageError):
        sparse_onnx.verify(*pair, target="abacus")


def test_tolerance_is_the_users(pair: tuple[Path, Path]) -> None:
    report = sparse_onnx.verify(*pair, tolerance=1e-12)
    assert report.verify is not None and report.verify.passed is False
    assert np.isfinite(report.verify.max_rel_error)


def test_inputs_are_matched_by_name(tmp_path: Path) -> None:
    model = routed_model(SHAPE)
    turned = edited(model, lambda proto: _reverse(proto.graph.input))
    ir.save(model, tmp_path / "a.onnx")
    ir.save(turned, tmp_path / "b.onnx")
    report = sparse_onnx.verify(tmp_path / "a.onnx", tmp_path / "b.onnx")
    assert report.verify is not None and report.verify.passed


def _reverse(values) -> None:
    reversed_values = list(values)[::-1]
    del values[:]
    values.extend(reversed_values)


def test_outputs_that_are_no_tensors_are_refused(tmp_path: Path) -> None:
    def edit(proto) -> None:
        proto.graph.node.append(helper.make_node("SequenceConstruct", ["y"], ["s"], name="s"))
        del proto.graph.output[:]
        proto.graph.output.append(helper.make_tensor_sequence_value_info("s", 1, None))

    path = tmp_path / "a.onnx"
    ir.save(edited(layered_model(SHAPE), edit), path)
    with pytest.raises(VerificationError, match=r"output 's' of .* is no tensor"):
        sparse_onnx.verify(path, path)


def test_too_large_and_nothing_in_common_says_so(
    pair: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(api, "available_memory", lambda: 1000)
    assert sparse_onnx.verify(*pair).verify.method == "blocks"
    plain = io.load(pair[1])
    plain.metadata_props.clear()
    io.save(plain, tmp_path / "plain.onnx")
    report = sparse_onnx.verify(pair[0], tmp_path / "plain.onnx")
    assert report.verify.method == "none" and report.verify.passed is None
    assert "of memory" in report.verify.failure and report.notes


def test_available_memory_counts_caches() -> None:
    free = api.available_memory()
    assert free is None or free > 1 << 20


@pytest.mark.parametrize("entry", [{"tokens": ["x"]}, {"experts": "many"}, {"expert_index": "renamed"}])
def test_stale_metadata_does_not_disturb(pair: tuple[Path, Path], entry: dict) -> None:
    model = io.load(pair[1])
    entries = json.loads(model.metadata_props["sparse_onnx.blocks"])
    model.metadata_props["sparse_onnx.blocks"] = json.dumps([entries[0] | entry, entries[1]])
    stale = pair[1].with_name("stale.onnx")
    io.save(model, stale)
    report = sparse_onnx.verify(pair[0], stale)
    assert report.verify is not None and report.verify.passed and len(report.blocks) == 1
