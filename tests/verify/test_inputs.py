from __future__ import annotations

import numpy as np
import onnx.parser
import onnx_ir as ir
import pytest
from builders import Shape, layered_model
from onnx import TensorProto, helper, numpy_helper
from verify.variants import in_a_branch

from sparse_onnx.core.errors import ModelError
from sparse_onnx.verify.inputs import cases, sized_inputs


def _decoder(static: bool = False) -> ir.Model:
    batch, sequence = (2, 6) if static else ("batch", "sequence")
    total = 6 if static else "total_sequence"
    ids = helper.make_tensor_value_info("input_ids", TensorProto.INT64, [batch, sequence])
    mask = helper.make_tensor_value_info("attention_mask", TensorProto.INT64, [batch, total])
    position = helper.make_tensor_value_info("position_ids", TensorProto.INT64, [batch, sequence])
    past = helper.make_tensor_value_info(
        "past_key_values.0.key", TensorProto.FLOAT, [batch, 4, "past_sequence", 8]
    )
    nodes = [
        helper.make_node("Cast", ["input_ids"], ["narrow"], to=TensorProto.INT32),
        helper.make_node("Gather", ["table", "narrow"], ["y"]),
    ]
    table = numpy_helper.from_array(np.zeros((11, 3), np.float32), "table")
    out = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    graph = helper.make_graph(nodes, "g", [ids, mask, position, past], [out], [table])
    return ir.from_proto(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)]))


def test_ids_stay_inside_the_table() -> None:
    feeds = sized_inputs(_decoder(), 5, 300)
    assert (
        feeds["input_ids"].shape == (5, 300)
        and feeds["input_ids"].max() == 10
        and feeds["input_ids"].min() == 0
    )


def test_cached_tokens_widen_the_mask_and_move_positions() -> None:
    feeds = sized_inputs(_decoder(), 2, 3, past=4)
    assert feeds["attention_mask"].shape == (2, 7) and (feeds["attention_mask"] == 1).all()
    assert feeds["past_key_values.0.key"].shape == (2, 4, 4, 8)
    np.testing.assert_array_equal(feeds["position_ids"], [[4, 5, 6]] * 2)


def test_one_kind_sends_all_tokens_the_same_way() -> None:
    feeds = sized_inputs(_decoder(), 2, 3, kind="one")
    assert len(np.unique(feeds["input_ids"])) == 1
    rows = sized_inputs(layered_model(), 2, 3, kind="one")["x"]
    assert rows.shape == (6, 16) and (rows == rows[0]).all()


def test_rows_take_batch_times_sequence() -> None:
    assert sized_inputs(layered_model(Shape(hidden=16)), 3, 11)["x"].shape == (33, 16)


def test_the_standard_set() -> None:
    names = [case.name for case in cases(_decoder())]
    assert {"2x7", "1x1", "4x1 one expert", "1x256"} <= set(names) and len(names) >= 8
    assert any(case.repeats > 1 for case in cases(_decoder()))
    assert any("ties" in case.name for case in cases(layered_model()))


def test_static_axes_are_kept() -> None:
    feeds = sized_inputs(_decoder(static=True), 5, 300)
    assert feeds["input_ids"].shape == (2, 6)


def test_inputs_without_a_rank_are_refused() -> None:
    model = _decoder()
    model.graph.inputs[0].shape = None
    with pytest.raises(ModelError, match="neither shape nor type"):
        sized_inputs(model, 1, 1)


def test_static_models_keep_the_repeated_case_and_their_own_labels() -> None:
    drawn = cases(_decoder(static=True))
    assert {case.name for case in drawn} >= {"2x6", "2x6 one expert"} and "1x256" not in {
        c.name for c in drawn
    }
    assert any(case.repeats > 1 for case in drawn)
    assert not any(case.name.startswith("0") for case in drawn)


def test_flags_go_both_ways_and_masks_do_not() -> None:
    drawn = cases(in_a_branch())
    assert {bool(case.feeds["use"]) for case in drawn} == {True, False}
    assert all(case.optional for case in drawn if not case.feeds["use"])
    masked = _decoder()
    masked.graph.inputs[1].dtype = ir.DataType.BOOL
    assert all(case.feeds["attention_mask"].all() for case in cases(masked))


def test_no_token_and_cached_tokens_are_optional_cases() -> None:
    drawn = {case.name: case for case in cases(_decoder())}
    assert drawn["2x3 after 4"].feeds["past_key_values.0.key"].shape == (2, 4, 4, 8)
    assert drawn["2x3 after 4"].optional and drawn["1x0"].optional
    assert drawn["1x256"].optional, "positions may end before"
    assert drawn["1x0"].feeds["input_ids"].shape == (1, 0)
    assert not any("after" in case.name for case in cases(layered_model()))


def test_integers_without_a_table_are_not_all_the_same() -> None:
    nodes = [
        helper.make_node("Cast", ["kinds"], ["as_float"], to=TensorProto.FLOAT),
        helper.make_node("CumSum", ["kinds", "zero"], ["sum"]),
        helper.make_node("Where", ["use_mask", "one", "one"], ["seen"]),
        helper.make_node("Cast", ["seen_tokens"], ["use_mask"], to=TensorProto.BOOL),
    ]
    kinds = helper.make_tensor_value_info("kinds", TensorProto.INT64, ["T"])
    seen = helper.make_tensor_value_info("seen_tokens", TensorProto.INT64, ["T"])
    outputs = [helper.make_tensor_value_info(name, TensorProto.INT64, ["T"]) for name in ("sum", "seen")]
    constants = [numpy_helper.from_array(np.asarray(n), name) for n, name in ((0, "zero"), (1, "one"))]
    graph = helper.make_graph(
        [nodes[0], nodes[1], nodes[3], nodes[2]], "g", [kinds, seen], outputs, constants
    )
    model = ir.from_proto(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)]))
    feeds = sized_inputs(model, 2, 20)
    assert set(feeds["kinds"]) == {0, 1} and set(feeds["seen_tokens"]) == {1}


def test_positions_stay_inside_their_table() -> None:
    model = _decoder()
    for node in model.graph:
        if node.op_type == "Cast":
            node.replace_input_with(0, model.graph.inputs[2])
    assert sized_inputs(model, 1, 40)["position_ids"].max() == 10


def test_open_image_sizes_hold_a_convolution_and_are_never_empty() -> None:
    text = """<ir_version: 9, opset_import: ["": 18]>
    g (float[B, 3, H, W] x) => (float[B, 3, H, W] y) { y = Relu (x) }"""
    shapes = [case.feeds["x"].shape for case in cases(ir.from_proto(onnx.parser.parse_model(text)))]
    assert all(min(shape[2:]) >= 16 for shape in shapes)
    assert len({shape[2:] for shape in shapes}) > 2
