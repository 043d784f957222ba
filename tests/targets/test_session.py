from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from builders import Shape, layered_model, save_external
from onnx import TensorProto, helper

from sparse_onnx.core.errors import ImpossibleError, ModelError, OutsideError
from sparse_onnx.graph import io
from sparse_onnx.targets import session


def _model(op: str, dtype: int = TensorProto.FLOAT, domain: str = "") -> onnx.ModelProto:
    graph = helper.make_graph(
        [helper.make_node(op, ["x", "x"], ["y"], domain=domain)],
        "g",
        [helper.make_tensor_value_info("x", dtype, [2, 2])],
        [helper.make_tensor_value_info("y", dtype, [2, 2])],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def test_external_weights_of_a_model_in_memory(tmp_path) -> None:
    path = save_external(layered_model(Shape()), tmp_path / "m.onnx")
    feeds = {"x": np.ones((3, 16), np.float32)}
    from_file = session.run(session.create_session(path), feeds)
    from_memory = session.run(session.create_session(io.load(path)), feeds)
    np.testing.assert_array_equal(from_file[0], from_memory[0])


def test_a_model_that_ort_cannot_load(tmp_path) -> None:
    path = tmp_path / "m.onnx"
    path.write_bytes(_model("NoSuchOperator").SerializeToString())
    with pytest.raises(ModelError, match="onnxruntime cannot load") as caught:
        session.create_session(path)
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)


def test_a_type_without_a_kernel() -> None:
    with pytest.raises(ImpossibleError, match="no kernel"):
        session.create_session(ir.from_proto(_model("MatMul", TensorProto.BFLOAT16)), name="m")


def test_a_failing_run() -> None:
    ready = session.create_session(ir.from_proto(_model("MatMul")))
    with pytest.raises(OutsideError, match="failed while running"):
        session.run(ready, {"x": np.ones((3, 2), np.float32)})
