"""What is proved to be distinct is distinct, and what may repeat is not proved."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import NodeProto, TensorProto, helper, numpy_helper

from sparse_onnx.inspect.hazards import hazards
from sparse_onnx.matching.unique import indices_unique
from sparse_onnx.passes.repair_scatter_add import RepairScatterAdd

node = helper.make_node
FLOAT, INT64 = TensorProto.FLOAT, TensorProto.INT64

CONSTANTS = {
    "zero": np.asarray(0),
    "one": np.asarray(1),
    "two": np.asarray(2),
    "minus": np.asarray(-1),
    "k": np.asarray([2]),
    "all": np.asarray([4]),
    "v0": np.asarray([0]),
    "v1": np.asarray([1]),
    "v2": np.asarray([2]),
    "last": np.asarray([-1]),
    "column": np.asarray([-1, 1]),
    "expert": np.asarray(3),
    "depth": np.asarray(4),
    "bits": np.asarray([0, 1]),
    "half": np.asarray(0.5, np.float32),
    "repeats": np.asarray([2, 1]),
    "distinct": np.asarray([5, 0, 3]),
    "mixed": np.asarray([5, 0, -3]),
    "backwards": np.asarray([-1, -3]),
    "twice": np.asarray([1, 1]),
    "pairs": np.asarray([[0, 1], [1, 0]]),
    "same_pairs": np.asarray([[0, 1], [0, 1]]),
    "pairs_of_both_signs": np.asarray([[0, 1], [0, -1]]),
}


def graph(nodes: Sequence[NodeProto]) -> ir.Model:
    """scores [T, 4] and mask [T, 3], vector [N] -> indices, and with them a sum over `data`."""
    inputs = [
        helper.make_tensor_value_info("scores", FLOAT, ["T", 4]),
        helper.make_tensor_value_info("mask", FLOAT, ["T", 3]),
        helper.make_tensor_value_info("vector", FLOAT, ["N"]),
        helper.make_tensor_value_info("given", INT64, ["N"]),
        helper.make_tensor_value_info("limit", INT64, []),
        helper.make_tensor_value_info("data", FLOAT, None),
        helper.make_tensor_value_info("updates", FLOAT, None),
    ]
    body = helper.make_graph(
        [*nodes, node("ScatterND", ["data", "indices", "updates"], ["y"], name="scatter", reduction="add")],
        "g",
        inputs,
        [helper.make_tensor_value_info("y", FLOAT, None)],
        [numpy_helper.from_array(array, name) for name, array in CONSTANTS.items()],
    )
    proto = helper.make_model(body, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    return ir.from_proto(onnx.shape_inference.infer_shapes(proto, data_prop=True))


def column(name: str) -> list[NodeProto]:
    return [node("Unsqueeze", [name, "last"], ["indices"])]


ROUTED = [node("TopK", ["scores", "k"], ["top", "chosen"], axis=-1)]
OF_EXPERT = [*ROUTED, node("Equal", ["chosen", "expert"], ["hit"]), node("NonZero", ["hit"], ["places"])]
ONE_HOT = [
    *ROUTED,
    node("OneHot", ["chosen", "depth", "bits"], ["hot"], axis=-1),
    node("Transpose", ["hot"], ["by_expert"], perm=[2, 1, 0]),
    node("Gather", ["by_expert", "expert"], ["hit"], axis=0),
    node("NonZero", ["hit"], ["places"]),
]
MASKED = [node("Greater", ["mask", "half"], ["true"]), node("NonZero", ["true"], ["places"])]
COLUMNS = [
    node("Split", ["places"], ["rows", "columns"], axis=0, num_outputs=2),
    node("Transpose", ["rows"], ["r"], perm=[1, 0]),
    node("Transpose", ["columns"], ["c"], perm=[1, 0]),
]
SORTED = [
    node("Shape", ["vector"], ["n"]),
    node("TopK", ["vector", "n"], ["sorted", "order"], axis=0),
]
RANGE = [node("Range", ["zero", "limit", "one"], ["r"])]


def constant(name: str) -> list[NodeProto]:
    return [node("Reshape", [name, "column"], ["indices"])]


UNIQUE = {
    "constants": constant("distinct"),
    "constants from the end": constant("backwards"),
    "pairs": [node("Identity", ["pairs"], ["indices"])],
    "range": [*RANGE, *column("r")],
    "range by a reshape and a cast": [
        *RANGE,
        node("Cast", ["r"], ["r32"], to=TensorProto.INT32),
        node("Cast", ["r32"], ["r64"], to=INT64),
        node("Reshape", ["r64", "column"], ["indices"]),
    ],
    "a permutation": [*SORTED, *column("order")],
    "part of a permutation": [*SORTED, node("Slice", ["order", "v1", "all"], ["some"]), *column("some")],
    "a permutation of a permutation": [*SORTED, node("Gather", ["order", "order"], ["o"]), *column("o")],
    "places of a mask": [*MASKED, node("Transpose", ["places"], ["indices"], perm=[1, 0])],
    "places of a mask, by columns": [*MASKED, *COLUMNS, node("Concat", ["r", "c"], ["indices"], axis=1)],
    "places of a mask, columns swapped": [
        *MASKED,
        *COLUMNS,
        node("Concat", ["c", "r"], ["indices"], axis=-1),
    ],
    "a distinct column": [
        *SORTED,
        node("Unsqueeze", ["order", "last"], ["o"]),
        node("Unsqueeze", ["given", "last"], ["g"]),
        node("Concat", ["g", "o"], ["indices"], axis=-1),
    ],
    "places of a vector": [
        node("Greater", ["vector", "half"], ["true"]),
        node("NonZero", ["true"], ["places"]),
        node("Squeeze", ["places", "v0"], ["p"]),
        *column("p"),
    ],
    "tokens of an expert": [*OF_EXPERT, node("Gather", ["places", "zero"], ["t"], axis=0), *column("t")],
    "tokens of an expert, by a slice": [
        *OF_EXPERT,
        node("Slice", ["places", "v0", "v1", "v0"], ["t"]),
        node("Reshape", ["t", "column"], ["indices"]),
    ],
    "tokens of an expert, of one-hot": [
        *ONE_HOT,
        node("Gather", ["places", "one"], ["t"], axis=0),
        *column("t"),
    ],
    "tokens of an expert, from the transposed places": [
        *OF_EXPERT,
        node("Transpose", ["places"], ["turned"], perm=[1, 0]),
        node("Gather", ["turned", "zero"], ["t"], axis=1),
        *column("t"),
    ],
}

UNPROVED = {
    "given": column("given"),
    "repeated constants": constant("twice"),
    "constants of both signs": constant("mixed"),
    "repeated pairs": [node("Identity", ["same_pairs"], ["indices"])],
    "pairs of both signs": [node("Identity", ["pairs_of_both_signs"], ["indices"])],
    "a range from -1": [node("Range", ["minus", "limit", "one"], ["r"]), *column("r")],
    "a range downwards": [node("Range", ["two", "limit", "minus"], ["r"]), *column("r")],
    "a range taken twice": [*RANGE, node("Tile", ["r", "k"], ["rr"]), *column("rr")],
    "positions in rows": [*ROUTED, node("Reshape", ["chosen", "column"], ["indices"])],
    "values of TopK": [
        *SORTED,
        node("Cast", ["sorted"], ["s"], to=INT64),
        *column("s"),
    ],
    "tokens of all experts": [*SORTED, node("Div", ["order", "two"], ["t"]), *column("t")],
    "slots of an expert": [*OF_EXPERT, node("Gather", ["places", "one"], ["s"], axis=0), *column("s")],
    "slots of an expert, of one-hot": [
        *ONE_HOT,
        node("Gather", ["places", "zero"], ["s"], axis=0),
        *column("s"),
    ],
    "rows of any mask": [*MASKED, node("Gather", ["places", "zero"], ["t"], axis=0), *column("t")],
    "one column twice": [*MASKED, *COLUMNS, node("Concat", ["r", "r"], ["indices"], axis=1)],
    "columns one below the other": [*MASKED, *COLUMNS, node("Concat", ["r", "c"], ["indices"], axis=0)],
    "places not turned": [*MASKED, node("Transpose", ["places"], ["indices"], perm=[0, 1])],
    "places taken apart": [
        *MASKED,
        node("Transpose", ["places"], ["turned"], perm=[1, 0]),
        node("Reshape", ["turned", "column"], ["indices"]),
    ],
    "a narrowing cast": [
        *RANGE,
        node("Cast", ["r"], ["r8"], to=TensorProto.INT8),
        node("Cast", ["r8"], ["r64"], to=INT64),
        *column("r64"),
    ],
    "a distinct vector taken at repeated places": [
        *SORTED,
        node("Gather", ["order", "given"], ["o"]),
        *column("o"),
    ],
}


def proved(model: ir.Model) -> bool:
    return indices_unique(model.graph.node("scatter").inputs[1])


@pytest.mark.parametrize("name", UNIQUE)
def test_distinct(name: str) -> None:
    model = graph(UNIQUE[name])
    assert proved(model)
    assert hazards(model) == []
    assert RepairScatterAdd()(model).matched == 0


@pytest.mark.parametrize("name", UNPROVED)
def test_may_repeat(name: str) -> None:
    model = graph(UNPROVED[name])
    assert not proved(model)
    assert len(hazards(model)) == 1
    assert RepairScatterAdd()(model).matched == 1


def test_large_constants_are_not_read() -> None:
    class Unread(ir.LazyTensor):
        def numpy(self) -> np.ndarray:
            raise AssertionError("read")

    shape = ir.Shape([2 << 20, 1])
    lazy = Unread(lambda: ir.tensor([0]), ir.DataType.INT64, shape, name="big")
    value = ir.Value(name="big", shape=shape, type=ir.TensorType(ir.DataType.INT64), const_value=lazy)
    ir.Graph([], [], nodes=[], initializers=[value])
    assert not indices_unique(value)
