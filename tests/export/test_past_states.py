"""States whose past and present lie in one buffer, as onnxruntime-genai has them."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest
from onnx import TensorProto, helper

torch = pytest.importorskip("torch")

from sparse_onnx.export.past.slots import Slot  # noqa: E402
from sparse_onnx.export.past.source import PastInterface, PastSource  # noqa: E402
from sparse_onnx.export.past.states import bear_one_buffer  # noqa: E402
from sparse_onnx.export.samples import Spec  # noqa: E402

STATE = Slot(0, "recurrent_state", (1, 4), torch.float32)


def _model(path: Path, late: bool) -> None:
    """The state plus the largest id is the new state. `late` reads the old state when the new one may be there."""
    nodes = [
        helper.make_node("Cast", ["input_ids"], ["floats"], to=TensorProto.FLOAT),
        helper.make_node("ReduceMax", ["floats"], ["largest"], keepdims=1, axes=[1]),
        helper.make_node("Add", [STATE.past, STATE.past], ["doubled"]),
    ]
    if late:
        nodes.append(helper.make_node("Add", ["doubled", "largest"], [STATE.present]))
        nodes.append(helper.make_node("Sub", [STATE.present, STATE.past], ["flat"]))
    else:
        nodes.append(helper.make_node("Sub", ["doubled", STATE.past], ["old"]))
        nodes.append(helper.make_node("Add", ["old", "largest"], [STATE.present]))
        nodes.append(helper.make_node("Add", ["old", STATE.present], ["flat"]))
    nodes.append(helper.make_node("Unsqueeze", ["flat", "one"], ["logits"]))
    state = ["batch", 4]
    graph = helper.make_graph(
        nodes,
        "states",
        [
            helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["batch", "sequence"]),
            helper.make_tensor_value_info(STATE.past, TensorProto.FLOAT, state),
        ],
        [
            helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 1, 4]),
            helper.make_tensor_value_info(STATE.present, TensorProto.FLOAT, state),
        ],
        [helper.make_tensor("one", TensorProto.INT64, [1], [1])],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), path)


@pytest.mark.parametrize("late", [False, True])
def test_a_state_that_is_read_after_it_was_written(late: bool, tmp_path: Path) -> None:
    _model(tmp_path / "model.onnx", late)
    ids = torch.tensor([[0, 96], [96, 0]])
    interface = PastInterface(
        {
            "input_ids": Spec(ids, {0: "batch", 1: "sequence"}),
            STATE.past: Spec(torch.randn(2, 4), {0: "batch"}),
        }
    )
    source = PastSource("states", torch.nn.Identity(), interface, slots=(STATE,))
    assert bear_one_buffer(tmp_path / "model.onnx", source) is not late
