"""What stays dense, told by positions, mask or cache: on a graph with the inputs of a decoder alone."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from dense_layers import plan_for, prepared
from harness import run_model
from onnx import TensorProto, helper, numpy_helper

from sparse_onnx.core.errors import ImpossibleError
from sparse_onnx.passes.insert_thresholds import InsertThresholds
from sparse_onnx.sparsify.guard import Clock, keep_dense

LEVEL, FIRST = "sparsity_level", 4


def decoder(*sides: str) -> ir.Model:
    """y `[B, S, 16]` of input_ids `[B, S]`; `sides` of attention_mask, position_ids, past."""
    rng = np.random.default_rng(0)
    stored = {"table": (30, 16), "W": (16, 24), "V": (24, 16)}
    kinds = {
        "attention_mask": ("attention_mask", TensorProto.INT64, ["B", "total"]),
        "position_ids": ("position_ids", TensorProto.INT64, ["B", "S"]),
        "past": ("past_key_values.0.key", TensorProto.FLOAT, ["B", 2, "P", 4]),
    }
    inputs = [helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["B", "S"])]
    inputs += [helper.make_tensor_value_info(*kinds[side]) for side in sides]
    nodes = [
        helper.make_node("Gather", ["table", "input_ids"], ["e"], name="e"),
        helper.make_node("MatMul", ["e", "W"], ["h"], name="up"),
        helper.make_node("Gelu", ["h"], ["g"], name="g"),
        helper.make_node("MatMul", ["g", "V"], ["d"], name="down"),
        helper.make_node("Add", ["e", "d"], ["y"], name="y"),
    ]
    graph = helper.make_graph(
        nodes,
        "decoder",
        inputs,
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["B", "S", 16])],
        [
            numpy_helper.from_array((rng.standard_normal(shape) / 4).astype(np.float32) * 4, name)
            for name, shape in stored.items()
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    return prepared(ir.from_proto(onnx.shape_inference.infer_shapes(model)))


def thresholded(*sides: str, first: int = FIRST) -> ir.Model:
    model = decoder(*sides)
    assert InsertThresholds(plan_for(model, "native"))(model).rewritten == 2
    keep_dense(model, first)
    onnx.checker.check_model(ir.to_proto(model), full_check=True)
    return model


def fed(model: ir.Model, cached: list[int], tokens: int) -> dict[str, np.ndarray]:
    """A batch whose sequences have so many tokens before the new ones; the shorter ones are padded on the left."""
    batch, longest = len(cached), max(cached, default=0)
    feeds = {"input_ids": np.arange(batch * tokens).reshape(batch, tokens) % 30}
    names = {value.name for value in model.graph.inputs}
    if "attention_mask" in names:
        mask = np.ones((batch, longest + tokens), np.int64)
        for row, count in enumerate(cached):
            mask[row, : longest - count] = 0
        feeds["attention_mask"] = mask
    if "position_ids" in names:
        counted = np.array(cached, np.int64)[:, None] + np.arange(tokens)
        feeds["position_ids"] = counted.reshape(batch, tokens)
    if "past_key_values.0.key" in names:
        feeds["past_key_values.0.key"] = np.zeros((batch, 2, longest, 4), np.float32)
    return feeds


def is_dense(model: ir.Model, feeds: dict[str, np.ndarray]) -> bool:
    off, on = run_model(model, feeds | {LEVEL: np.array(0)})[0], run_model(model, feeds)[0]
    return np.array_equal(off, on)


@pytest.mark.parametrize("sides", [("position_ids", "past"), ("attention_mask", "past"), ("past",)])
def test_prefill_and_first_positions(sides: tuple[str, ...]) -> None:
    model = thresholded(*sides)
    for cached in range(7):
        assert is_dense(model, fed(model, [cached], 1)) == (cached < FIRST), f"{cached} before"
        assert is_dense(model, fed(model, [cached], 2)), "prefill"


@pytest.mark.parametrize("sides", [("position_ids", "past"), ("attention_mask", "past")])
def test_the_shortest_sequence_of_a_batch_decides(sides: tuple[str, ...]) -> None:
    model = thresholded(*sides)
    assert is_dense(model, fed(model, [9, 3], 1)) and not is_dense(model, fed(model, [9, 4], 1))
    assert run_model(model, fed(model, [], 1))[0].shape == (0, 1, 16), "no sequence at all"


def test_prefill_alone() -> None:
    model = thresholded("past", first=0)
    assert not is_dense(model, fed(model, [0], 1)) and is_dense(model, fed(model, [0], 2))


def test_a_buffer_of_the_cache_is_not_its_length() -> None:
    """With a mask, the past's own size says nothing."""
    model = thresholded("attention_mask", "past")
    feeds = fed(model, [1], 1) | {"past_key_values.0.key": np.zeros((1, 2, 100, 4), np.float32)}
    assert is_dense(model, feeds)


def test_models_that_cannot_tell() -> None:
    with pytest.raises(ImpossibleError, match="no key/value cache"):
        Clock.of(decoder("attention_mask", "position_ids"))
    model = decoder("past")
    model.graph.inputs[0].name = "words"
    with pytest.raises(ImpossibleError, match="no input 'input_ids'"):
        Clock.of(model)
    with pytest.raises(ImpossibleError, match="no thresholds"):
        keep_dense(decoder("past"), 2)
