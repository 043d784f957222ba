"""Sizes of cache axes that a model only names."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from harness import run_model
from onnx import TensorProto, helper, numpy_helper

from sparse_onnx.verify.inputs import cases, sized_inputs

HEADS, GROUPS, HEAD = 4, 2, 24


def _info(name: str, *shape: int | str, dtype: int = TensorProto.FLOAT) -> object:
    return helper.make_tensor_value_info(name, dtype, shape)


def _grouped(packed: bool, known: bool = True) -> ir.Model:
    """q, k, v (or all in q) of GroupQueryAttention with a cache ``[batch, heads, past, size]`` of names only."""
    query = (HEADS + 2 * GROUPS if packed else HEADS) * HEAD
    width: int | str = query if known else "width"
    past = ["batch", "cache_heads", "past_sequence_length", "cache_size"]
    total = ["batch", "cache_heads", "total_sequence_length", "cache_size"]
    projection = numpy_helper.from_array(
        np.random.default_rng(0).standard_normal((8, query)).astype(np.float32), "projection"
    )
    own = numpy_helper.from_array(np.ones((8, GROUPS * HEAD), np.float32) / 8, "own")
    nodes = [helper.make_node("MatMul", ["x", "projection"], ["query"])]
    names = ["query", "", "", "past_k", "past_v", "lengths", "total"]
    if not packed:
        nodes.append(helper.make_node("MatMul", ["x", "own"], ["key"]))
        names[1:3] = ["key", "key"]
    nodes += [
        helper.make_node("Shape", ["mask"], ["shape"], start=1, end=2),
        helper.make_node("Cast", ["shape"], ["total_1"], to=TensorProto.INT32),
        helper.make_node("Squeeze", ["total_1"], ["total"]),
        helper.make_node("ReduceSum", ["mask", "one"], ["summed"], keepdims=0),
        helper.make_node("Sub", ["summed", "one"], ["last"]),
        helper.make_node("Cast", ["last"], ["lengths"], to=TensorProto.INT32),
        helper.make_node(
            "GroupQueryAttention", names, ["y", "present_k", "present_v"], domain="com.microsoft",
            num_heads=HEADS, kv_num_heads=GROUPS,
        ),
    ]  # fmt: skip
    infos = [_info("query", "batch", "sequence", width)] if known else []
    if known and not packed:
        infos.append(_info("key", "batch", "sequence", GROUPS * HEAD))
    graph = helper.make_graph(
        nodes,
        "cached",
        [
            _info("x", "batch", "sequence", 8),
            _info("mask", "batch", "total_sequence_length", dtype=TensorProto.INT64),
            _info("past_k", *past),
            _info("past_v", *past),
        ],
        [
            _info("y", "batch", "sequence", HEADS * HEAD),
            _info("present_k", *total),
            _info("present_v", *total),
        ],
        [projection, own, numpy_helper.from_array(np.asarray([1]), "one")],
        value_info=infos,
    )
    imports = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    return ir.from_proto(helper.make_model(graph, opset_imports=imports, ir_version=10))


def _check(model: ir.Model) -> None:
    for case in cases(model):
        assert case.feeds["past_k"].shape[1::2] == (GROUPS, HEAD)
        assert case.feeds["past_v"].shape[2] == case.size.past
    run_model(model, sized_inputs(model, 1, 3, past=4))


def test_read_from_the_attention_that_takes_the_cache() -> None:
    _check(_grouped(packed=False))
    _check(_grouped(packed=True))


def test_tried_where_no_width_is_known() -> None:
    _check(_grouped(packed=False, known=False))


def test_read_from_what_the_cache_is_joined_with() -> None:
    nodes = [helper.make_node("Concat", ["past", "new"], ["present"], axis=2)]
    graph = helper.make_graph(
        nodes,
        "joined",
        [_info("past", "batch", "heads", "past_length", "dim"), _info("new", "batch", 3, "sequence", 20)],
        [_info("present", "batch", "heads", "total_length", "dim")],
    )
    model = ir.from_proto(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)]))
    assert sized_inputs(model, 2, 5, past=4)["past"].shape == (2, 3, 4, 20)


def test_other_inputs_keep_their_open_axes() -> None:
    nodes = [helper.make_node("Relu", ["image"], ["y"])]
    axes = ["batch", "channels", "height", "width"]
    graph = helper.make_graph(nodes, "image", [_info("image", *axes)], [_info("y", *axes)])
    model = ir.from_proto(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)]))
    assert len({case.feeds["image"].shape[3] for case in cases(model)}) > 3
