"""Models of which ONNX Runtime's optimizer dies are loaded, and answer as they should."""

from __future__ import annotations

import platform
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper

from sparse_onnx.inspect.hazards import hazards
from sparse_onnx.optimize import optimize
from sparse_onnx.passes.repair_cast_transpose import RepairCastTranspose
from sparse_onnx.targets.session import create_session, run

node = helper.make_node


def model(
    order: list[int], *, casts: tuple[int, ...] = (TensorProto.FLOAT,), shared: bool = False
) -> onnx.ModelProto:
    """y = MatMul(Cast(Transpose(x)), w); `shared`: the transposed and the cast value are outputs too."""
    nodes = [node("Transpose", ["x"], ["moved"], name="moved", perm=order)]
    value = "moved"
    for index, kind in enumerate(casts):
        nodes.append(node("Cast", [value], [f"cast{index}"], name=f"cast{index}", to=kind))
        value = f"cast{index}"
    nodes.append(node("MatMul", [value, "w"], ["y"], name="product"))
    outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, [None] * len(order))]
    if shared:
        outputs += [
            helper.make_tensor_value_info("moved", TensorProto.DOUBLE, [None] * len(order)),
            helper.make_tensor_value_info(value, TensorProto.FLOAT, [None] * len(order)),
        ]
    sizes = ["tokens", 8, "slots"][: len(order)]
    inputs = [
        helper.make_tensor_value_info("x", TensorProto.DOUBLE, sizes),
        helper.make_tensor_value_info("w", TensorProto.FLOAT, [sizes[order[-1]], 4]),
    ]
    graph = helper.make_graph(nodes, "g", inputs, outputs)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def feeds(order: list[int]) -> dict[str, np.ndarray]:
    rng, sizes = np.random.default_rng(0), (5, 8, 3)[: len(order)]
    return {
        "x": rng.standard_normal(sizes),
        "w": rng.standard_normal((sizes[order[-1]], 4)).astype(np.float32),
    }


def test_ort_still_dies_of_it(tmp_path: Path) -> None:
    """Fails where ONNX Runtime is mended: then the pass can go."""
    if platform.machine() != "x86_64":
        pytest.skip("microsoft/onnxruntime#28392 is about x86-64")
    onnx.save(model([1, 2, 0]), tmp_path / "dies.onnx")
    code = "import onnxruntime, sys; onnxruntime.InferenceSession(sys.argv[1], providers=['CPUExecutionProvider'])"
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "dies.onnx")], capture_output=True)
    assert done.returncode < 0


@pytest.mark.parametrize("order", [[1, 2, 0], [2, 0, 1], [0, 2, 1], [2, 1, 0]], ids=str)
@pytest.mark.parametrize("shared", [False, True], ids=["alone", "shared"])
@pytest.mark.parametrize(
    "casts", [(TensorProto.FLOAT,), (TensorProto.INT64, TensorProto.FLOAT)], ids=["one", "two"]
)
def test_right(order: list[int], shared: bool, casts: tuple[int, ...]) -> None:
    repaired = ir.from_proto(model(order, casts=casts, shared=shared))
    outcome = RepairCastTranspose()(repaired)
    assert outcome.rewritten == len(casts)
    proto = ir.to_proto(repaired)
    onnx.checker.check_model(proto, full_check=True)
    values = feeds(order)
    actual = run(create_session(repaired), values)
    moved = np.transpose(values["x"], order)
    numbers = moved.astype(np.int64 if len(casts) > 1 else np.float32).astype(np.float32)
    np.testing.assert_allclose(actual[0], numbers @ values["w"], rtol=1e-5, atol=1e-5)
    if shared:
        np.testing.assert_array_equal(actual[1], moved)
        np.testing.assert_array_equal(actual[2], numbers)


def test_left_alone() -> None:
    """Two axes, and a cast that no product reads."""
    flat = ir.from_proto(model([1, 0]))
    assert not RepairCastTranspose()(flat).modified
    unread = model([1, 2, 0])
    unread.graph.node[-1].op_type, unread.graph.node[-1].input[1] = "Add", "cast0"
    assert not RepairCastTranspose()(ir.from_proto(unread)).modified


def test_optimize(tmp_path: Path) -> None:
    source, out = tmp_path / "in.onnx", tmp_path / "out.onnx"
    onnx.save(model([1, 2, 0]), source)
    assert any("28392" in line for line in hazards(ir.load(source)))
    report = optimize(source, out)
    assert report.verify is not None and report.verify.passed
    assert not hazards(ir.load(out))
