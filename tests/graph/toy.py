"""Small models and their files, built with onnx.helper and plain file calls."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper


def external(
    name: str,
    dims: Sequence[int],
    location: str | None,
    offset: object = None,
    length: object = None,
    dtype: int = TensorProto.FLOAT,
    **extra: str,
) -> TensorProto:
    """A tensor that claims to lie in a file, whether or not it does."""
    tensor = TensorProto(name=name, data_type=dtype, dims=dims, data_location=TensorProto.EXTERNAL)
    for key, value in {"location": location, "offset": offset, "length": length, **extra}.items():
        if value is not None:
            tensor.external_data.add(key=key, value=str(value))
    return tensor


def model(
    initializers: Sequence[TensorProto] = (),
    nodes: Sequence[onnx.NodeProto] = (),
    functions: Sequence[onnx.FunctionProto] = (),
) -> onnx.ModelProto:
    """x -> Identity -> y, and what is given."""
    value = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 4])
    out = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 4])
    graph = helper.make_graph(
        [helper.make_node("Identity", ["x"], ["y"], name="copy"), *nodes],
        "main",
        [value],
        [out],
        initializers,
    )
    imports = [helper.make_opsetid("", 20), helper.make_opsetid("test", 1)]
    return helper.make_model(graph, opset_imports=imports, ir_version=10, functions=functions)


def function(name: str, nodes: Sequence[onnx.NodeProto]) -> onnx.FunctionProto:
    """A function a -> b in the domain "test"."""
    imports = [helper.make_opsetid("", 20), helper.make_opsetid("test", 1)]
    return helper.make_function("test", name, ["a"], ["b"], nodes, imports)


def call(name: str, source: str = "a", result: str = "b") -> onnx.NodeProto:
    return helper.make_node(name, [source], [result], domain="test")


def branch(body: onnx.GraphProto, output: str = "branched") -> onnx.NodeProto:
    """An If on a constant with `body` twice. `body` has the output "out"."""
    condition = numpy_helper.from_array(np.asarray(True), "condition")
    inner = helper.make_graph(
        [
            helper.make_node("Constant", [], ["condition"], value=condition),
            helper.make_node("If", ["condition"], ["out"], then_branch=body, else_branch=body),
        ],
        "outer",
        [],
        [helper.make_tensor_value_info("out", TensorProto.FLOAT, None)],
    )
    outer = helper.make_node("If", ["cond"], [output], then_branch=inner, else_branch=inner)
    return outer


def write(proto: onnx.ModelProto, path: Path) -> Path:
    path.write_bytes(proto.SerializeToString())
    return path


def packed_model(folder: Path, experts: int = 4, rows: int = 32, columns: int = 16, name: str = "in") -> Path:
    """x [n, columns] -> x @ w[0].T + b[0]; `w` [E, rows, columns] and `b` [E, rows] lie in a file."""
    rng = np.random.default_rng(0)
    w = rng.standard_normal((experts, rows, columns)).astype(np.float32)
    b = rng.standard_normal((experts, rows)).astype(np.float32)
    (folder / f"{name}.bin").write_bytes(b"\0" * 100 + w.tobytes() + b.tobytes())
    nodes = [
        helper.make_node("Gather", ["w", "zero"], ["w0"], name="w0"),
        helper.make_node("Gather", ["b", "zero"], ["b0"], name="b0"),
        helper.make_node("Gemm", ["x", "w0", "b0"], ["y"], transB=1, name="gemm"),
    ]
    graph = helper.make_graph(
        nodes,
        "packed",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", columns])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", rows])],
        [
            external("w", w.shape, f"{name}.bin", 100, w.nbytes),
            external("b", b.shape, f"{name}.bin", 100 + w.nbytes, b.nbytes),
            numpy_helper.from_array(np.asarray(0), "zero"),
        ],
    )
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    return write(proto, folder / f"{name}.onnx")


_watching: list[list[tuple[str, str]]] = []
_WATCHED = ("open", "exec", "compile", "import", "ctypes", "subprocess", "os.", "socket", "pickle")
_HARMLESS = ("os.listdir", "os.scandir")


def _hook(event: str, arguments: tuple[object, ...]) -> None:
    if _watching and event.startswith(_WATCHED) and event not in _HARMLESS:
        _watching[-1].append((event, str(arguments[0]) if arguments else ""))


sys.addaudithook(_hook)


@contextmanager
def watched() -> Iterator[list[tuple[str, str]]]:
    """What this process opens, imports, executes or changes inside the block: (audit event, first argument)."""
    _watching.append([])
    try:
        yield _watching[-1]
    finally:
        _watching.pop()
