"""Every expert is compared: by inputs that reach it, else alone; else the comparison does not pass."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from builders import Shape, layered_model, routed_model
from verify.variants import change, clone, in_a_branch, lowered, with_ids

import sparse_onnx
from sparse_onnx.core.report import VerifyRecord
from sparse_onnx.verify.inputs import cases
from sparse_onnx.verify.whole import compare_whole


def compared(first: ir.Model, second: ir.Model) -> VerifyRecord:
    return compare_whole(first, second, cases(first, large=False), threads=1)


def ties(model: ir.Model) -> ir.Model:
    """All scores tie: experts 0 and 1 get every token, the others none."""

    def edit(router: np.ndarray) -> None:
        router[:] = 0

    return change(model, "layers.0.router", edit)


def zero(expert: int):
    def edit(weights: np.ndarray) -> None:
        weights[expert] = 0

    return edit


@pytest.mark.parametrize("expert", range(4))
def test_an_index_that_is_an_input_reaches_every_expert(expert: int) -> None:
    model = routed_model(Shape())
    assert compared(model, lowered(model)).passed
    assert compared(model, lowered(change(model, "fc2", zero(expert)))).passed is False


def test_a_single_expert_is_not_always_dropped() -> None:
    model = routed_model(Shape(experts=1, top_k=1))
    assert compared(model, lowered(change(model, "fc2", zero(0)))).passed is False


def test_dropped_slots_are_among_the_indices_where_nothing_excludes_them() -> None:
    drawn = np.concatenate([case.feeds["index"].reshape(-1) for case in cases(routed_model(Shape()))])
    assert drawn.min() == 0 and drawn.max() == 4 and 0.02 < (drawn == 4).mean() < 0.3
    after = cases(lowered(routed_model(Shape())))
    assert set(np.unique(after[0].feeds["index"])) == {0, 1, 2, 3, 4}


@pytest.mark.parametrize("spelling", ["plain", "clip", "where", "concat", "dequantized"])
def test_ids_are_spread_over_the_table(spelling: str) -> None:
    drawn = [case.feeds["ids"] for case in cases(with_ids(spelling))]
    assert len(np.unique(drawn[0])) > 8
    every = np.concatenate(drawn)
    assert every.min() >= 0 and 40 < every.max() < 50


@pytest.mark.parametrize("expert", [0, 3])
def test_an_expert_that_no_input_reaches_is_compared_alone(expert: int) -> None:
    model = ties(layered_model(Shape(), layers=1))
    right = compared(model, lowered(model))
    assert right.passed and right.inputs[-1].startswith("1 blocks alone")
    wrong = compared(model, lowered(change(model, "layers.0.fc1", zero(expert))))
    assert wrong.passed is False and wrong.failure


def test_neutral_on_both_sides_compares_weights() -> None:
    model = ties(layered_model(Shape(), layers=1))
    assert compared(model, clone(model)).passed
    wrong = compared(model, change(model, "layers.0.fc1", zero(3)))
    assert wrong.passed is False and "other weights" in (wrong.failure or "")


def test_without_a_counterpart_it_does_not_pass(tmp_path: Path) -> None:
    """The original's own spelling (here: without metadata) says nothing of its experts."""
    model = ties(layered_model(Shape(), layers=1))
    plain = lowered(model)
    plain.metadata_props.clear()
    record = compared(plain, lowered(model))
    assert record.passed is None and "no input reached 2 experts" in (record.failure or "")
    ir.save(plain, tmp_path / "a.onnx")
    ir.save(lowered(model), tmp_path / "b.onnx")
    report = sparse_onnx.verify(tmp_path / "a.onnx", tmp_path / "b.onnx")
    assert report.verify is not None and report.verify.passed is None


def test_blocks_in_branches_are_compared_alone_too() -> None:
    model = in_a_branch()
    record = compared(model, lowered(model))
    assert record.passed and any("flags off" in name for name in record.inputs)
    assert compared(model, lowered(change(model, "fc2", zero(2)))).passed is False
