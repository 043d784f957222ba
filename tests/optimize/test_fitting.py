from __future__ import annotations

import dataclasses
from pathlib import Path

import onnx_ir as ir
import pytest
from builders import Shape, layered_model, save_external

import sparse_onnx
from sparse_onnx import targets
from sparse_onnx.blocks.lowering import Form
from sparse_onnx.core.errors import ImpossibleError, UsageError
from sparse_onnx.optimize import fitting
from sparse_onnx.optimize.runner import plan
from sparse_onnx.targets import places
from sparse_onnx.targets import profile as profiles
from sparse_onnx.targets.profile import FormResult, Operator, TargetProfile


@pytest.fixture
def unpinned(monkeypatch: pytest.MonkeyPatch, tmp_path):
    """Profiles that a test may change: `change(name, **fields)`; no runtime is installed."""
    monkeypatch.setenv("SPARSE_ONNX_RUNTIMES", str(tmp_path / "none"))
    known = dict(profiles._profiles())

    def change(name: str, **fields: object) -> TargetProfile:
        known[name] = dataclasses.replace(known[name], **fields)  # type: ignore[arg-type]
        return known[name]

    monkeypatch.setattr(profiles, "_profiles", lambda: known)
    return change


def fit(model: ir.Model, profile: TargetProfile, folder: Path, tokens: int | None = None):
    return fitting.fit(model, profile, plan(profile.form_names), tokens=tokens, folder=folder)


def test_by_the_profile_where_the_target_is_not_here(unpinned, tmp_path) -> None:
    (record,) = fit(layered_model(Shape()), targets.get("cuda"), tmp_path)
    assert (record.form, record.by, record.whole, record.blocks) == ("gathered", "profile", True, 2)


def test_another_result_of_a_probe_gives_another_form(unpinned, tmp_path) -> None:
    """The whole way: what is written follows the record."""
    path = save_external(layered_model(Shape()), tmp_path / "in.onnx")
    before = sparse_onnx.optimize(path, tmp_path / "a.onnx", target="webgpu")
    assert {block.form for block in before.blocks} == {"gathered:index=int32"}
    operators = dict(targets.get("webgpu").operators)
    operators["Gather"] = Operator((), "probe", "float32 on the CPU")
    unpinned("webgpu", operators=operators)
    after = sparse_onnx.optimize(path, tmp_path / "b.onnx", target="webgpu")
    assert {block.form for block in after.blocks} == {"dense:index=int32"}
    assert after.fitting is not None and "Gather" in after.fitting[0].rejected[0]
    assert any("by its profile" in note for note in after.notes)


def test_the_fewest_operators_are_left_to_others_where_no_form_is_whole(unpinned, tmp_path) -> None:
    operators = dict(targets.get("webgpu").operators)
    del operators["MatMul"], operators["Gather"]
    profile = unpinned("webgpu", operators=operators)
    (record,) = fit(layered_model(Shape()), profile, tmp_path)
    assert not record.whole and record.form == "dense:index=int32" and record.left == ["MatMul"]
    assert "on the CPU of it: MatMul" in fitting.described([record], profile)[0]


def test_a_form_that_is_wrong_on_the_target_is_not_taken(
    unpinned, tmp_path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a runtime at hand, what ran decides, not the profile."""
    tried = []

    def attempt(path, feeds, expected, target, where, outside=()):
        tried.append(len(feeds))
        right = len(tried) > 1
        return FormResult(True, right, True, note="" if right else "relative error 1e+00"), None

    monkeypatch.setattr(places, "place", lambda profile: places.CPU)
    monkeypatch.setattr(fitting, "attempt", attempt)
    (record,) = fit(layered_model(Shape()), targets.get("openvino"), tmp_path)
    assert tried == [2, 2] and record.form == "gathered" and record.by.startswith("onnxruntime ")
    assert record.rejected == ["grouped: wrong: relative error 1e+00"]
    assert fitting.chosen([record]) == {name: Form("gathered") for name in record.names}


def test_really_run(unpinned, tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the CPU provider, as a target that takes fixed sizes."""
    monkeypatch.setattr(places, "place", lambda profile: places.CPU)
    profile = unpinned("qnn-htp", provider=places.CPU)
    (record,) = fit(layered_model(Shape()), profile, tmp_path, tokens=5)
    assert record.whole and record.form == "gathered" and not list(tmp_path.iterdir())


def test_fallback_is_told_and_can_be_forbidden(unpinned, tmp_path) -> None:
    path = save_external(layered_model(Shape()), tmp_path / "in.onnx")
    report = sparse_onnx.optimize(path, tmp_path / "out.onnx", target="coreml", static=[{"T": 4}])
    assert report.placement is not None
    cpu = next(record for record in report.placement if record.provider == "CPUExecutionProvider")
    assert cpu.by == "profile" and cpu.operators is not None and cpu.operators["TopK"] == 2
    assert cpu.values and cpu.bytes and cpu.guilty and any("(TopK)" in name for name in cpu.guilty)
    with pytest.raises(
        ImpossibleError, match=r"CoreMLExecutionProvider does not run \d+ nodes: .*TopK"
    ) as caught:
        sparse_onnx.optimize(path, tmp_path / "no.onnx", target="coreml", static=[{"T": 4}], no_fallback=True)
    assert caught.value.exit_code == 5 and not (tmp_path / "no.onnx").exists()
    sparse_onnx.optimize(path, tmp_path / "cpu.onnx", target="cpu", no_fallback=True)


def test_a_target_that_is_not_the_cpu_is_not_tuned_here(tmp_path) -> None:
    path = save_external(layered_model(Shape()), tmp_path / "in.onnx")
    with pytest.raises(UsageError, match="target 'cuda' is CUDAExecutionProvider"):
        sparse_onnx.optimize(path, tmp_path / "out.onnx", target="cuda", tune=True)
