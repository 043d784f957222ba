from __future__ import annotations

import json

import numpy as np
import onnx_ir as ir
import pytest
from builders import Shape, layered_model, routed_model
from verify.variants import change, clone, in_a_branch, lowered

from sparse_onnx.blocks.lowered import BLOCKS_KEY
from sparse_onnx.core.report import VerifyRecord
from sparse_onnx.verify import blocks
from sparse_onnx.verify.blocks import compare_blocks
from sparse_onnx.verify.metadata import discard_unsound, sound_blocks


def compared(first: ir.Model, second: ir.Model) -> VerifyRecord:
    return compare_blocks(first, second, memory=20_000, threads=1)


def middle(weights: np.ndarray) -> None:
    """Neither the first nor the last bytes, nor those in the middle."""
    flat = weights.reshape(-1)
    flat[len(flat) // 3] += 5


SHAPE = Shape(hidden=64, inner=96)


@pytest.mark.parametrize("first", ["neutral", "lowered"])
@pytest.mark.parametrize("second", ["neutral", "lowered"])
def test_every_pair_of_forms(first: str, second: str) -> None:
    model = layered_model(SHAPE)
    forms = {"neutral": clone, "lowered": lowered}
    record = compared(forms[first](model), forms[second](model))
    assert record.passed and record.inputs, record.failure
    wrong = change(model, "layers.1.fc1", middle)
    assert compared(forms[first](model), forms[second](wrong)).passed is False


def test_a_simulated_device_has_no_races(monkeypatch: pytest.MonkeyPatch) -> None:
    model = layered_model(SHAPE, layers=1)
    record = compared(model, lowered(model))
    monkeypatch.setattr(blocks, "simulated", lambda provider: True)
    once = compared(model, lowered(model))
    assert "256 tokens x3 runs" in record.inputs and "256 tokens" in once.inputs
    assert once.passed and once.runs == record.runs - 2


def test_a_block_in_a_branch() -> None:
    model = in_a_branch()
    record = compared(model, lowered(model))
    assert record.passed and record.runs, record.failure
    assert compared(model, lowered(change(model, "fc1", middle))).passed is False


def test_no_blocks_is_no_pass() -> None:
    plain = lowered(layered_model(SHAPE))
    plain.metadata_props.clear()
    record = compared(plain, clone(plain))
    assert record.passed is None and record.runs == 0 and record.failure


@pytest.mark.parametrize(
    "entry", [{"tokens": ["x"]}, {"experts": "many"}, {"top_k": True}, {"output": "renamed"}, {"name": None}]
)
def test_stale_metadata_is_passed_over(entry: dict) -> None:
    model = lowered(routed_model())
    entries = json.loads(model.metadata_props[BLOCKS_KEY])
    assert len(sound_blocks(model)) == 1
    model.metadata_props[BLOCKS_KEY] = json.dumps([entries[0] | entry])
    assert sound_blocks(model) == []
    assert compared(routed_model(), model).passed is False
    discard_unsound(model)
    assert json.loads(model.metadata_props[BLOCKS_KEY]) == []


def test_extraction_reads_the_graph_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from sparse_onnx.verify import sides

    calls = []
    real = sides.named_values
    monkeypatch.setattr(sides, "named_values", lambda model: calls.append(model) or real(model))
    model = layered_model(Shape(), layers=4)
    assert compared(model, lowered(model)).passed and len(calls) == 2
