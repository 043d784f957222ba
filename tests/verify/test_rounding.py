"""Blocks whose kernels round activations: compared exactly without rounding, then as deployed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from builders import Shape, layered_model
from ort.graphs import since
from verify.variants import change, clone

from sparse_onnx.core.passes import Pass
from sparse_onnx.core.report import VerifyRecord
from sparse_onnx.graph import io
from sparse_onnx.passes.branch_experts import BranchExperts
from sparse_onnx.passes.fuse_gating import FuseGating
from sparse_onnx.passes.fuse_moe_op import FuseMoEOp
from sparse_onnx.passes.quantize_experts import QuantizeExperts
from sparse_onnx.verify import blocks as comparison
from sparse_onnx.verify import sides, verify
from sparse_onnx.verify.blocks import compare_blocks
from sparse_onnx.verify.compare import ROUNDED, TOLERANCES
from sparse_onnx.verify.lowering import verify_lowering
from sparse_onnx.verify.sides import Blocks

SHAPE = Shape(experts=6, hidden=64, inner=96)
FIRST = "layers.0.experts"
FORMS = {
    "nbits": FuseGating(),
    "dynamic": FuseGating(product="dynamic"),
    "branched": BranchExperts(),
    "fused": FuseMoEOp(),
}
every_form = pytest.mark.parametrize(
    "form", ["nbits", "dynamic", "branched", pytest.param("fused", marks=since(1, 31))]
)


def quantized(bits: int = 8, **options: object) -> ir.Model:
    model = layered_model(SHAPE, opset=21)
    QuantizeExperts(bits=bits, **options)(model)
    return clone(model)


def lowered(model: ir.Model, form: Pass) -> ir.Model:
    result = clone(model)
    assert form(result).rewritten == 2
    return clone(result)


def compared(first: ir.Model, second: ir.Model, **options: object) -> VerifyRecord:
    return compare_blocks(first, second, memory=1 << 20, threads=2, **options)


@every_form
def test_every_form_passes_and_rounds(form: str) -> None:
    model = quantized(8 if form == "dynamic" else 4)
    record = compared(model, lowered(model, FORMS[form]))
    assert record.passed, record.failure
    assert (
        record.max_rel_error is not None
        and TOLERANCES["float32"] < record.max_rel_error < ROUNDED["int8_batch"]
    )
    assert "2 blocks once more as deployed, activations rounded to 8 bits" in record.inputs


@pytest.mark.parametrize("pair", [("nbits", "dynamic"), ("dynamic", "branched"), ("nbits", "nbits")])
def test_both_sides_may_round(pair: tuple[str, str]) -> None:
    model = quantized()
    first, second = (lowered(model, FORMS[name]) for name in pair)
    assert compared(first, second).passed and compared(first, model).passed
    wrong = lowered(change(model, "layers.1.fc2.codes", swap), FORMS[pair[1]])
    assert compared(first, wrong).passed is False


def swap(experts: np.ndarray) -> None:
    experts[[1, 4]] = experts[[4, 1]]


def double_one(scales: np.ndarray) -> None:
    scales[3, 17, 0] *= 2


def shift_one(codes: np.ndarray) -> None:
    codes[5, 7, 9] ^= 16


MUTATIONS = [
    ("codes", swap),
    ("scale", swap),
    ("scale", double_one),
    ("codes", shift_one),
]


@every_form
@pytest.mark.parametrize(("what", "edit"), MUTATIONS)
def test_one_wrong_number_is_seen(form: str, what: str, edit) -> None:
    """Even one weight of 36,000: without rounding the comparison is as strict as any other."""
    model = quantized()
    wrong = lowered(change(model, f"layers.1.fc1.{what}", edit), FORMS[form])
    record = compared(model, wrong)
    assert record.passed is False and "layers.1.experts" in (record.failure or "")


@pytest.mark.parametrize("name", ["nbits", "dynamic"])
def test_a_wrong_expert_is_seen_as_deployed_too(name: str) -> None:
    model = quantized()
    for edit, within in ((None, True), (swap, False)):
        source = model if edit is None else change(model, "layers.0.fc2.codes", edit)
        ours, theirs = Blocks(model), Blocks(lowered(source, FORMS[name]))
        left = ours.side(FIRST, 2, "CPUExecutionProvider", theirs)
        right = theirs.side(FIRST, 2, "CPUExecutionProvider", ours)
        _, deployed = comparison._comparisons(left, right, None)
        found = deployed.run(1 << 20, large=True)
        assert found.within is within and found.max_rel > 1e-3


@since(1, 31)
def test_a_wrong_expert_is_seen_where_there_is_no_exact_kernel() -> None:
    model, form = quantized(block=32), FORMS["fused"]
    assert compared(model, lowered(model, form)).passed
    wrong = lowered(change(model, "layers.0.fc2.codes", swap), form)
    assert compared(model, wrong).passed is False


def test_outside_the_blocks_nothing_may_differ() -> None:
    model = quantized()

    def nudge(router: np.ndarray) -> None:
        router[0, 0] *= 1.0001

    other = lowered(change(model, "layers.1.router", nudge), FORMS["nbits"])
    record = compared(model, other)
    assert record.passed is False and "differ outside the sparse blocks" in (record.failure or "")


def test_large_blocks_are_mapped_and_not_packed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights that are computed go into a temporary file, and a block too large to be packed is told of."""
    model = layered_model(SHAPE, opset=21)
    QuantizeExperts()(model)
    result = model.clone()
    FuseGating()(result)
    monkeypatch.setattr(sides, "_COMPUTED", 0)
    folders: list[str] = []
    real = sides.tempfile.TemporaryDirectory

    def watched(**options: str):
        made = real(**options)
        folders.append(made.name)
        return made

    monkeypatch.setattr(sides.tempfile, "TemporaryDirectory", watched)
    record = compared(model, result)
    assert record.passed and "2 blocks once more as deployed" in record.inputs[-1]
    assert len(folders) == 2 and not any(map(Path.exists, map(Path, folders)))
    monkeypatch.setattr(comparison, "PACKED_BYTES", 0)
    record = compared(model, result)
    assert record.passed and "2 blocks not as deployed" in record.inputs[-1]


def test_a_tolerance_that_is_given_counts() -> None:
    model = quantized()
    assert compared(model, lowered(model, FORMS["nbits"]), tolerance=1e-4).passed is False


def test_lowerings_are_compared_block_by_block() -> None:
    model = quantized()
    record, note = verify_lowering(model, model, lowered(model, FORMS["nbits"]))
    assert record.passed and record.method == "blocks" and "round activations" in note
    exact = quantized(activations="float")
    record, note = verify_lowering(exact, exact, lowered(exact, FORMS["nbits"]))
    assert record.passed and record.method == "whole" and not note


def test_files(tmp_path: Path) -> None:
    """`sparse-onnx verify A B` of the model before and behind the lowering; of another one; and of the float model."""
    model = quantized()
    paths = {name: tmp_path / f"{name}.onnx" for name in ("neutral", "lowered", "wrong", "float")}
    io.save(model, paths["neutral"])
    io.save(lowered(model, FORMS["dynamic"]), paths["lowered"])
    io.save(lowered(change(model, "layers.1.fc2.codes", shift_one), FORMS["dynamic"]), paths["wrong"])
    io.save(layered_model(SHAPE, opset=21), paths["float"])
    for first, second in (("neutral", "lowered"), ("lowered", "neutral"), ("lowered", "lowered")):
        report = verify(paths[first], paths[second])
        assert report.verify.passed and report.verify.method == "blocks", report.verify.failure
        assert "block by block" in report.notes[-1]
    assert verify(paths["neutral"], paths["wrong"]).verify.passed is False
    assert verify(paths["float"], paths["lowered"]).verify.passed is False
