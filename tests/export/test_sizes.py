"""Sizes and values that an export is compared on: which ones, and what a trace that fails for some leads to."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
import toy_modules  # noqa: E402

import sparse_onnx  # noqa: E402
from sparse_onnx.core.errors import (  # noqa: E402
    ImpossibleError,
    OutsideError,
    SparseOnnxError,
    UsageError,
    VerificationError,
)
from sparse_onnx.core.report import Report  # noqa: E402
from sparse_onnx.export import guards, samples  # noqa: E402


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out.onnx"


def export(name: str, out: Path) -> Report:
    return sparse_onnx.export(getattr(toy_modules, name)(), out)


def refused(name: str, out: Path, error: type[SparseOnnxError]) -> str:
    with pytest.raises(error) as caught:
        export(name, out)
    assert type(caught.value) is error and list(out.parent.iterdir()) == []
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("name", "taken"),
    [("six", "batch 6"), ("prime", "batch 1777")],
)
def test_a_trace_that_is_wrong_for_some_size_is_refused(name: str, taken: str, out: Path) -> None:
    assert f"the model also takes {taken}" in refused(name, out, ImpossibleError)


def test_a_capacity_where_short_sequences_are_refused(out: Path) -> None:
    report = export("long_capacity", out)
    assert report.verify is not None and report.verify.passed
    assert all(int(name.split()[0].split("x")[1]) >= 5 for name in report.verify.inputs)


def test_sizes_that_the_model_refuses_give_way_to_others(out: Path) -> None:
    report = export("at_most_seven", out)
    assert any("sequence <= 7" in note for note in report.notes)
    assert report.verify is not None
    *untraced, sample = report.verify.inputs
    assert sample == "2x5 sample" and len(set(untraced)) >= 6
    assert all(int(name.split()[0].split("x")[1]) <= 7 and name != "2x7" for name in untraced)


def test_a_model_of_few_sizes_is_a_note(out: Path) -> None:
    report = export("at_most_three", out)
    assert any(
        "few sizes" in note and "batch 1; batch 3" in note.replace("3; batch 1", "1; batch 3")
        for note in report.notes
    )
    assert report.verify is not None and not any(name.split()[0] == "2" for name in report.verify.inputs[:-1])
    assert len(report.verify.inputs) == 7


def test_a_trace_for_one_size_is_refused() -> None:
    from sparse_onnx.export import planning, sources

    source = sources.of_objects((torch.nn.Linear(3, 3), torch.randn(2, 3)))
    refuses = dataclasses.replace(source, module=torch.nn.Linear(4, 4))
    guard = guards.Guard("batch == 2", lambda sizes: sizes["batch"] == 2)
    with pytest.raises(ImpossibleError, match="for batch 2 only"):
        planning.plan(refuses, [guard])


@pytest.mark.parametrize("axes", [{}, {0: "a"}, {0: "a", 1: "b"}, {0: "a", 1: "b", 2: "c"}])
def test_at_least_six_untraced_runs(axes: dict[int, str]) -> None:
    interface = samples.interface_of({"x": torch.randn(3, 4, 5, 6)}, {"x": axes})
    runs = [run for run in samples.untraced(interface) if not axes or run.sizes != interface.traced_sizes()]
    assert len({run.name for run in runs}) >= 6


def test_floats_stay_in_the_range_of_the_sample(out: Path) -> None:
    for sample in (torch.rand(4, 9), -torch.rand(4, 9), torch.randn(4, 9), torch.rand(4, 9) * 2 - 1):
        interface = samples.interface_of({"x": sample}, None)
        for run in samples.untraced(interface):
            assert sample.min() <= run.inputs["x"].min() and run.inputs["x"].max() <= sample.max()
            assert run.inputs["x"].std() > 0
    report = export("logarithm", out)
    assert report.verify is not None and report.verify.passed


def test_a_run_without_a_finite_answer_is_no_comparison(out: Path) -> None:
    assert "without any finite value" in refused("all_nan", out, VerificationError)


def test_booleans_are_drawn(out: Path) -> None:
    assert "differ" in refused("keeps_where", out, VerificationError)
    interface = samples.interface_of({"keep": torch.ones(2, 9, dtype=torch.bool)}, None)
    values = [run.inputs["keep"] for run in samples.untraced(interface)]
    assert any(value.all() for value in values) and any(not value.all() for value in values)


def test_ids_that_could_not_be_varied_are_a_note(out: Path) -> None:
    assert any(
        "'ids' was compared with one value only, the sample's 0" in note
        for note in export("zero_ids", out).notes
    )


def test_the_sample_is_compared_too(out: Path) -> None:
    assert "input 1 sample" in refused("only_the_sample", out, VerificationError)


def test_what_the_module_raises_in_a_comparison_is_its_own(out: Path) -> None:
    assert "the source raised IndexError" in refused("raises_on_some_sizes", out, OutsideError)


def test_one_name_for_two_lengths() -> None:
    with pytest.raises(UsageError, match="'n' is 4 long, and 8 in axis 1"):
        samples.interface_of({"x": torch.randn(4, 8)}, {"x": {0: "n", 1: "n"}})
