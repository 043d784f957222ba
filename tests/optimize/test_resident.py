"""What a session keeps in memory, told from the graph and compared with the memory of a process that holds one."""

from __future__ import annotations

import itertools
import platform
import subprocess
import sys
import textwrap
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from sparse_onnx import kernels
from sparse_onnx.blocks import attach_functions
from sparse_onnx.graph import io
from sparse_onnx.optimize.resident import Residency, amount, note, residency

K = 1024
MB = 2**20
SEEDS = itertools.count()


def float_chain(op: str, count: int = 8, dtype: str = "f") -> tuple[list, dict]:
    nodes, weights, last = [], {}, "x"
    for number in range(count):
        weights[f"w{number}"] = noise((K, K)).astype(dtype)
        attributes = {"transB": 1} if op == "Gemm" else {}
        nodes.append(helper.make_node(op, [last, f"w{number}"], [f"y{number}"], **attributes))
        last = f"y{number}"
    return [*nodes, helper.make_node("Identity", [last], ["y"])], weights


def noise(shape: tuple[int, ...]) -> np.ndarray:
    """Other numbers in each matrix: ORT would hold equal ones once."""
    return np.random.default_rng(next(SEEDS)).standard_normal(shape, dtype=np.float32) / 32


def stacked() -> tuple[list, dict]:
    nodes = [helper.make_node("MatMul", ["x", "w"], ["y"])]
    return nodes, {"w": noise((8, K, K))}


def integers(bits: int, accuracy: int, count: int = 32) -> tuple[list, dict]:
    nodes, weights, last = [], {}, "x"
    rng = np.random.default_rng(bits)
    for number in range(count):
        weights[f"B{number}"] = rng.integers(0, 256, (K, K // 32, 4 * bits), dtype=np.uint8)
        weights[f"S{number}"] = rng.uniform(0.5, 1.5, K * K // 32).astype(np.float32) / (1 << bits) / 8
        nodes.append(
            helper.make_node(
                "MatMulNBits", [last, f"B{number}", f"S{number}"], [f"y{number}"], domain="com.microsoft",
                K=K, N=K, bits=bits, block_size=32, accuracy_level=accuracy,
            )
        )  # fmt: skip
        last = f"y{number}"
    return [*nodes, helper.make_node("Identity", [last], ["y"])], weights


def thresholded(stored: str | None) -> tuple[list, dict]:
    """Layers of floats, or of integers with scales of 8 inputs."""
    nodes, last = [], "x"
    weights: dict[str, np.ndarray] = {"tau": np.zeros(1, "f"), "bias": np.zeros(K, "f")}
    rng = np.random.default_rng(5)
    for number in range(8):
        own = {f"w{number}": noise((K, K))}
        if stored is not None:
            own = {f"w{number}": rng.integers(-128, 127, (K, K), dtype=np.int8)}
            own[f"s{number}"] = rng.uniform(0.5, 1, (K // 8, K)).astype("f") / 999
            own[f"z{number}"] = np.zeros((K // 8, K), np.int8)
        op, attributes = ("ThresholdedLinear", {})
        if stored is not None:
            op, attributes = "ThresholdedLinearNBits", {"axis": 0, "block_size": 8}
        inputs = [last, *own, "tau", "tau", "bias"]
        nodes.append(helper.make_node(op, inputs, [f"y{number}"], domain="sparse_onnx", **attributes))
        weights |= own
        last = f"y{number}"
    return [*nodes, helper.make_node("Identity", [last], ["y"])], weights


def thresholded_branch(local: bool) -> tuple[list, dict]:
    """A layer within a condition."""
    tensor = noise((K, K))
    weights = {"tau": np.zeros(1, "f"), "bias": np.zeros(K, "f")} | ({} if local else {"w": tensor})
    layer = helper.make_node(
        "ThresholdedLinear", ["x", "w", "tau", "tau", "bias"], ["a"], domain="sparse_onnx"
    )
    nodes = [
        helper.make_node("ReduceMax", ["x"], ["most"], keepdims=0),
        helper.make_node("Cast", ["most"], ["flag"], to=TensorProto.BOOL),
        helper.make_node(
            "If", ["flag"], ["y"],
            then_branch=helper.make_graph(
                [layer], "then", [], [value("a")], [numpy_helper.from_array(tensor, "w")] if local else []
            ),
            else_branch=helper.make_graph([helper.make_node("Identity", ["x"], ["b"])], "else", [], [value("b")]),
        ),
    ]  # fmt: skip
    return nodes, weights


def thresholded_experts(stored: str | None) -> tuple[list, dict]:
    """A layer of 8 experts, of which one alone gets rows; of integers with scales of 8 inputs."""
    rng = np.random.default_rng(5)
    own = {"w": noise((8, K, K))}
    op, attributes = "ThresholdedExpertLinear", {}
    if stored is not None:
        own = {"w": rng.integers(-128, 127, (8, K, K), dtype=np.int8)}
        own["s"] = rng.uniform(0.5, 1, (8, K // 8, K)).astype("f") / 999
        own["z"] = np.zeros((8, K // 8, K), np.int8)
        op, attributes = "ThresholdedExpertLinearNBits", {"axis": 1, "block_size": 8}
    zero = helper.make_tensor("zero", TensorProto.INT64, [1], [0])
    nodes = [
        helper.make_node("Shape", ["x"], ["rows"], start=0, end=1),
        helper.make_node("ConstantOfShape", ["rows"], ["index"], value=zero),
        helper.make_node(
            op, ["x", "index", *own, "tau", "tau", "bias"], ["y"], domain="sparse_onnx", **attributes
        ),
    ]
    return nodes, {**own, "tau": np.zeros(1, "f"), "bias": np.zeros((8, K), "f")}


def biased() -> tuple[list, dict]:
    """One input and many outputs: the bias is as large as the weights, and tau, read twice, is as large."""
    wide = 4 * MB
    weights = {name: np.full(wide, at, "f") for at, name in enumerate(("bias", "tau"))}
    inputs = ["x", "w", "tau", "tau", "bias"]
    return [helper.make_node("ThresholdedLinear", inputs, ["y"], domain="sparse_onnx")], {
        "w": noise((1, wide)),
        **weights,
    }


def nibbles() -> tuple[list, dict]:
    """The same with integers of 4 bits, in half of the bytes."""
    nodes, weights = thresholded_experts("int8")
    for name in "wz":
        weights[name] = (weights[name] >> 4).astype(ml_dtypes.int4)
    return nodes, weights


def dynamic() -> tuple[list, dict]:
    rng = np.random.default_rng(0)
    nodes, weights, last = [], {}, "x"
    for number in range(32):
        weights[f"B{number}"] = rng.integers(-128, 127, (K, K), dtype=np.int8)
        weights[f"S{number}"] = rng.uniform(0.5, 1.5, K).astype(np.float32) / 1000
        inputs = [last, f"B{number}", f"S{number}"]
        nodes.append(
            helper.make_node("DynamicQuantizeMatMul", inputs, [f"y{number}"], domain="com.microsoft")
        )
        last = f"y{number}"
    return [*nodes, helper.make_node("Identity", [last], ["y"])], weights


def fused(
    bits: int | None = None, accuracy: int = 0, experts: int = 8, inner: int = 512
) -> tuple[list, dict]:
    rng = np.random.default_rng(0)
    attributes = {
        "k": 2, "activation_type": "swiglu", "swiglu_fusion": 1, "normalize_routing_weights": 1,
        "activation_alpha": 1.0, "activation_beta": 0.0,
    }  # fmt: skip
    weights = {"router": noise((K, experts))}
    if bits is None:
        weights |= {"fc1": noise((experts, 2 * inner, K)), "fc2": noise((experts, K, inner))}
        op, inputs = "MoE", ["x", "logits", "fc1", "", "fc2"]
    else:
        op, inputs = "QMoE", ["x", "logits", "fc1", "s1", "", "fc2", "s2"]
        attributes |= {"expert_weight_bits": bits, "block_size": 32, "accuracy_level": accuracy}
        for name, scales, rows, columns in (("fc1", "s1", 2 * inner, K), ("fc2", "s2", K, inner)):
            weights[name] = rng.integers(0, 256, (experts, rows, columns * bits // 8), dtype=np.uint8)
            weights[scales] = rng.uniform(0.5, 1.5, (experts, rows, columns // 32)).astype(np.float32) / 99
    nodes = [
        helper.make_node("MatMul", ["x", "router"], ["logits"]),
        helper.make_node(op, inputs, ["y"], domain="com.microsoft", **attributes),
    ]
    return nodes, weights


def branches(depth: int, local: bool) -> tuple[list, dict]:
    """`depth` conditions in each other around each product, whose matrices are the main graph's or their own."""
    weights: dict[str, np.ndarray] = {}
    nodes, last = [helper.make_node("ReduceMax", ["x"], ["most"], keepdims=0)], "x"
    nodes.append(helper.make_node("Cast", ["most"], ["flag"], to=TensorProto.BOOL))
    for number in range(8):
        tensor, name = noise((K, K)), f"y{number}"
        body = [helper.make_node("MatMul", [last, f"w{number}"], [f"{name}.0"])]
        own = [numpy_helper.from_array(tensor, f"w{number}")] if local else []
        if not local:
            weights[f"w{number}"] = tensor
        for level in range(depth):
            here, above = f"{name}.{level}", f"{name}.{level + 1}"
            empty = helper.make_node("Identity", [last], [f"{above}.no"])
            body = [
                helper.make_node(
                    "If", ["flag"], [above],
                    then_branch=helper.make_graph(body, f"{above}.then", [], [value(here)], own),
                    else_branch=helper.make_graph([empty], f"{above}.else", [], [value(f"{above}.no")]),
                )
            ]  # fmt: skip
            own = []
        nodes += body
        last = f"{name}.{depth}"
    return [*nodes, helper.make_node("Identity", [last], ["y"])], weights


def value(name: str, dtype: int = TensorProto.FLOAT, shape: list | None = None) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, dtype, shape)


def written(made: tuple[list, dict], path: Path, half: bool = False) -> Path:
    nodes, weights = made
    rank = (
        [8, "T", K]
        if len(next(iter(weights.values()), np.zeros(2)).shape) == 3 and len(nodes) == 1
        else ["T", K]
    )
    kind = TensorProto.FLOAT16 if half else TensorProto.FLOAT
    graph = helper.make_graph(
        nodes, "g", [value("x", kind, rank)], [value("y", kind)],
        [numpy_helper.from_array(array, name) for name, array in weights.items()],
    )  # fmt: skip
    imports = [helper.make_opsetid("", 20), helper.make_opsetid("com.microsoft", 1)]
    imports.append(helper.make_opsetid("sparse_onnx", 1))
    model = helper.make_model(graph, opset_imports=imports, ir_version=10)
    onnx.save(
        model, path, save_as_external_data=True, location="data", size_threshold=64, convert_attribute=True
    )
    return path


OWN = """
    import ctypes, sys, onnxruntime

    def own():
        ctypes.CDLL(None).malloc_trim(0)
        with open("/proc/self/status") as file:
            return next(int(line.split()[1]) for line in file if line.startswith("RssAnon")) * 1024

    before = own()
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    if len(sys.argv) > 2:
        options.register_custom_ops_library(sys.argv[2])
    session = onnxruntime.InferenceSession(sys.argv[1], options, providers=["CPUExecutionProvider"])
    print(own() - before)
"""


def own_memory(path: Path, library: Path | None = None) -> int:
    """Bytes that a session adds to the memory that is only the process's."""
    command = [
        sys.executable,
        "-c",
        textwrap.dedent(OWN),
        str(path),
        *([] if library is None else [str(library)]),
    ]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


MATRIX = K * K * 4
QUANTIZED = 32 * K * K // 8  # of one bit
SCALES = 32 * K * K // 32
EXPERTS = 8 * 3 * 512 * K

CASES = {
    "Gemm": (lambda: float_chain("Gemm"), 8 * MATRIX, 0),
    "MatMul": (lambda: float_chain("MatMul"), 8 * MATRIX, 0),
    "stack of matrices": (stacked, 0, 0),
    "float16": (lambda: float_chain("Gemm", dtype="e"), 0, 8 * MATRIX),
    "4 bits": (lambda: integers(4, 0), 4 * QUANTIZED, 0),
    "4 bits, rounded": (lambda: integers(4, 4), 4 * QUANTIZED + 8 * SCALES, 0),
    "8 bits": (lambda: integers(8, 1, 16), 0, 0),
    "8 bits, rounded": (lambda: integers(8, 4, 16), (8 * QUANTIZED + 8 * SCALES) // 2, 0),
    "2 bits, rounded": (lambda: integers(2, 4), 2 * QUANTIZED + 8 * SCALES, 0),
    "dynamic": (dynamic, 32 * K * K, 0),
    "MoE": (fused, 8 * K * 4, 0),
    "QMoE 4 bits": (lambda: fused(4, experts=32), 4 * EXPERTS // 2 + 32 * K * 4, 0),
    "QMoE 4 bits, rounded": (
        lambda: fused(4, 4, experts=32), 4 * EXPERTS // 2 + EXPERTS + 32 * K * 4, 0
    ),
    "QMoE 8 bits": (lambda: fused(8), EXPERTS + EXPERTS // 4 + 8 * K * 4, 0),
    "QMoE 2 bits, rounded": (
        lambda: fused(2, 4, experts=32), 4 * EXPERTS // 4 + EXPERTS // 2 + 32 * K * 4, 0
    ),
    "branches": (lambda: branches(1, local=False), 8 * MATRIX, 0),
    "branches with their own": (lambda: branches(1, local=True), 0, 8 * MATRIX),
    "branches in branches": (lambda: branches(2, local=False), 0, 0),
    "branches in branches with their own": (lambda: branches(2, local=True), 0, 8 * MATRIX),
}  # fmt: skip


@pytest.mark.skipif(
    sys.platform != "linux" or platform.machine() != "x86_64",
    reason="which weights are packed is the processor's",
)
@pytest.mark.parametrize("name", CASES)
def test_the_graph_tells_what_a_session_holds(name: str, tmp_path: Path) -> None:
    build, movable, fixed = CASES[name]
    path = written(build(), tmp_path / "m.onnx", half=name == "float16")
    found = residency(io.load(path))
    assert found == Residency(movable, fixed)
    assert abs(own_memory(path) - movable - fixed) < 6 * MB, "of at least 16, or none"


THRESHOLDED = {
    "floats": (lambda: thresholded(None), 8 * MATRIX),
    "integers": (lambda: thresholded("int8"), 8 * (K * K + 5 * K * K // 8)),
    "experts": (lambda: thresholded_experts(None), 8 * MATRIX),
    "experts of integers": (lambda: thresholded_experts("int8"), 8 * (K * K + 5 * K * K // 8)),
    "bias and thresholds": (biased, 4 * 4 * MATRIX),
    "branch": (lambda: thresholded_branch(False), MATRIX),
    "branch with its own": (lambda: thresholded_branch(True), MATRIX),
}


@pytest.mark.skipif(sys.platform != "linux", reason="kernels copy weights on Linux alone")
@pytest.mark.parametrize("name", THRESHOLDED)
def test_native_kernels_hold_what_the_graph_tells(name: str, tmp_path: Path) -> None:
    build, size = THRESHOLDED[name]
    library = kernels.build()
    path = written(build(), tmp_path / "m.onnx")
    found = residency(io.load(path))
    assert found == Residency(0, 0, size)
    assert abs(own_memory(path, library) - size) < MATRIX


BODIES = {
    "floats": (lambda: thresholded_experts(None), 0),
    "integers": (lambda: thresholded_experts("int8"), 0),
    "integers of 4 bits": (nibbles, 8 * (K * K + K * K // 8)),
}


@pytest.mark.skipif(sys.platform != "linux", reason="memory is told apart by what Linux counts")
@pytest.mark.parametrize("name", BODIES)
def test_bodies_of_experts_hold_only_what_they_widen(name: str, tmp_path: Path) -> None:
    build, size = BODIES[name]
    model = io.load(written(build(), tmp_path / "plain.onnx"))
    model.opset_imports[""] = 21
    attach_functions(model)
    io.save(model, tmp_path / "m.onnx")
    assert abs(own_memory(tmp_path / "m.onnx") - size) < MATRIX


def test_inputs_and_shared_matrices(tmp_path: Path) -> None:
    path = written(float_chain("Gemm", 2), tmp_path / "m.onnx")
    model = io.load(path)
    shared = next(iter(model.graph))
    second = list(model.graph)[1]
    second.replace_input_with(1, shared.inputs[1])
    assert residency(model) == Residency(MATRIX, 0), "two products by one matrix"
    model.graph.inputs.append(model.graph.initializers["w0"])
    assert residency(model) == Residency(0, 0), "a caller may pass another"


def test_one_line_says_it() -> None:
    line = note(Residency(1_150_000_000, 0))
    assert line is not None and "1.1 GB of packed weights, copied at creation" in line
    assert "--weights prepacked leaves them in the file" in line
    line = note(Residency(1_150_000_000, 0), 1_150_000_000)
    assert line is not None and line.startswith(
        "resident: only weights that are used; 1.1 GB of packed weights stay"
    )
    line = note(Residency(5_000_000, 48_000_000), 5_000_000)
    assert line is not None and "48 MB of packed weights that ORT has to copy" in line and "5.0 MB" in line
    line = note(Residency(5_000_000, 0), 0)
    assert line is not None and "this ORT stores none" in line and "had no packed weights to store" in line
    assert note(Residency(40_000, 0)) is None
    assert note(Residency(0, 0)) is None
    assert (
        note(Residency(0, 0), 0)
        == "resident: only weights that are used; ONNX Runtime had no packed weights to store"
    )


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.0 kB"),
        (48_300_000, "48 MB"),
        (1_150_000_000, "1.1 GB"),
        (2 * 10**15, "2000 TB"),
    ],
)
def test_amounts(size: int, text: str) -> None:
    assert amount(size) == text
