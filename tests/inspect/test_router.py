"""Routers are named where they are plain, and not named where they are not."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir
import pytest
from onnx import NodeProto, TensorProto, helper, numpy_helper

from sparse_onnx.inspect.router import router_name

node = helper.make_node
CONSTANTS = {
    "k": np.asarray([2]),
    "last": np.asarray([-1]),
    "bias": np.ones(8, np.float32),
    "scale": np.asarray(2.5, np.float32),
    "tiny": np.asarray(1e-20, np.float32),
    "rows": np.asarray([-1, 2]),
}
SOFTMAX = node("Softmax", ["logits"], ["scores"], axis=-1)
SIGMOID = node("Sigmoid", ["logits"], ["scores"])
TOPK = node("TopK", ["scores", "k"], ["top", "index"], axis=-1)
TOPK_LOGITS = node("TopK", ["logits", "k"], ["top", "index"], axis=-1)
BIASED = [
    SIGMOID,
    node("Add", ["bias", "scores"], ["choice"]),
    node("TopK", ["choice", "k"], ["_", "index"], axis=-1),
]
GATHERED = node("GatherElements", ["scores", "index"], ["top"], axis=1)
SUM = node("ReduceSum", ["top", "last"], ["sum"], keepdims=1)
SAFE_SUM = [SUM, node("Add", ["sum", "tiny"], ["total"])]


def name_of(nodes: Sequence[NodeProto], index: str = "index", weight: str = "weight") -> str | None:
    graph = helper.make_graph(
        nodes,
        "g",
        [
            helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["T", 8]),
            helper.make_tensor_value_info("other", TensorProto.FLOAT, ["T", 8]),
        ],
        [
            helper.make_tensor_value_info(index, TensorProto.INT64, None),
            helper.make_tensor_value_info(weight, 1, None),
        ],
        [numpy_helper.from_array(array, name) for name, array in CONSTANTS.items()],
    )
    model = ir.from_proto(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    )
    return router_name(*model.graph.outputs)


@pytest.mark.parametrize(
    ("nodes", "name"),
    [
        ([SOFTMAX, TOPK, node("Identity", ["top"], ["weight"])], "softmax_topk"),
        ([SOFTMAX, TOPK, SUM, node("Div", ["top", "sum"], ["weight"])], "softmax_topk_renormalised"),
        (
            [SOFTMAX, TOPK, GATHERED_AS := node("GatherElements", ["scores", "index"], ["weight"], axis=-1)],
            "softmax_topk",
        ),
        ([TOPK_LOGITS, node("Softmax", ["top"], ["weight"], axis=-1)], "topk_softmax"),
        ([SIGMOID, TOPK, node("Mul", ["top", "scale"], ["weight"])], "sigmoid_topk"),
        ([*BIASED, GATHERED_AS], "sigmoid_bias_topk"),
        (
            [
                *BIASED,
                GATHERED,
                *SAFE_SUM,
                node("Div", ["top", "total"], ["w"]),
                node("Mul", ["w", "scale"], ["weight"]),
            ],
            "sigmoid_bias_topk_renormalised",
        ),
    ],
)
def test_plain_routers(nodes: list[NodeProto], name: str) -> None:
    assert name_of(nodes) == name


def test_casts_and_reshapes_do_not_matter() -> None:
    nodes = [
        node("Cast", ["logits"], ["wide"], to=TensorProto.DOUBLE),
        node("Softmax", ["wide"], ["scores"], axis=-1),
        TOPK,
        SUM,
        node("Div", ["top", "sum"], ["ratio"]),
        node("Cast", ["ratio"], ["narrow"], to=TensorProto.FLOAT),
        node("Reshape", ["narrow", "rows"], ["weight"]),
        node("Reshape", ["index", "rows"], ["chosen"]),
    ]
    assert name_of(nodes, index="chosen") == "softmax_topk_renormalised"


@pytest.mark.parametrize(
    "nodes",
    [
        [node("Softmax", ["logits"], ["scores"], axis=0), TOPK, node("Identity", ["top"], ["weight"])],
        [
            SOFTMAX,
            node("Where", ["mask", "scores", "other"], ["kept"]),
            node("TopK", ["kept", "k"], ["weight", "index"]),
        ],
        [SOFTMAX, TOPK, node("Softmax", ["other"], ["weight"], axis=-1)],
        [
            SOFTMAX,
            TOPK,
            node("ReduceSum", ["other", "last"], ["sum"]),
            node("Div", ["top", "sum"], ["weight"]),
        ],
        [SOFTMAX, TOPK, node("GatherElements", ["other", "index"], ["weight"], axis=1)],
        [SIGMOID, node("Add", ["bias", "scores"], ["b"]), node("TopK", ["b", "k"], ["weight", "index"])],
        [TOPK_LOGITS, node("Identity", ["top"], ["weight"])],
        [node("ArgMax", ["logits"], ["index"], axis=-1), node("ReduceMax", ["logits", "last"], ["weight"])],
    ],
)
def test_what_is_not_plain_has_no_name(nodes: list[NodeProto]) -> None:
    if any("mask" in item.input for item in nodes):
        nodes = [node("Greater", ["logits", "other"], ["mask"]), *nodes]
    assert name_of(nodes) is None
