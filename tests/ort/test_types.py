"""Traps of element types on CPU: float16 through float32, no bfloat16, and products that round their rows."""

from __future__ import annotations

import platform
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import pytest
from contrib_models import Case
from contrib_models import model as contrib_model
from onnx import TensorProto
from onnx_ir import to_proto
from ort.graphs import model, nodes, operators, optimized, run, session, since

#: Arm has arithmetic in float16, and kernels for it in some versions.
x86 = pytest.mark.skipif(platform.machine().lower() not in ("x86_64", "amd64"), reason="of x86 processors")


@x86
@pytest.mark.parametrize("operator", ["MatMul", "Gemm"])
def test_float16_products_run_in_float32(operator: str, tmp_path: Path) -> None:
    """Casts around the product, and a float32 copy of the weights: why `targets/cpu.toml` says so of float16, and why
    `--target cpu` may widen the weights for nothing."""
    w = np.ones((8, 6), np.float16)
    made = model("float16[T,8] x", f"y = {operator} (x, w)", "float16[T,6] y", {"w": w})
    graph = optimized(made, tmp_path)
    assert operators(graph) == ["Cast", operator, "Cast"] and [w.data_type for w in graph.initializer] == [
        TensorProto.FLOAT
    ], "float16 is multiplied as it is: keep float16 weights on this target, and measure them"


@x86
def test_a_cast_moves_in_front_of_a_gather_in_a_loop(tmp_path: Path) -> None:
    """Weights of float16 that a Loop takes by Gather and multiplies by are cast whole, all experts, once an iteration.
    Why the neutral bodies (`blocks/body.py`) gather a row and squeeze it: that stops the cast."""
    loop = """
        n = Size (hit)
        yes = Constant <value = bool {1}> ()
        y = Loop (n, yes, x) <body = expert (int64 i, bool go, float16[T,8] v) => (bool on, float16[T,8] r) {
            on = Identity (go)
            e = Gather (hit, i)
            TAKE
            r = MatMul (v, m)
        }>"""
    plain = "m = Gather <axis = 0> (w, e)"
    squeezed = "at = Unsqueeze (e, first) row = Gather <axis = 0> (w, at) m = Squeeze (row, first)"

    def casts(take: str) -> bool:
        made = model(
            "float16[T,8] x, int64[M] hit, float16[4,8,8] w",
            loop.replace("TAKE", take),
            "float16[T,8] y",
            {"first": np.asarray([0])},
        )
        graph = optimized(made, tmp_path)
        return any(node.op_type == "Cast" and "w" in node.input for node in nodes(graph))

    assert casts(plain), (
        "the cast stays behind the Gather: blocks/body.py may gather a scalar index, without Squeeze"
    )
    assert not casts(squeezed)


BFLOAT16 = ["MatMul (x, w)", "Gemm (x, w)", "Add (x, w)", "Mul (x, w)", "Sigmoid (x)", "Softmax (x)"]


@pytest.mark.parametrize("call", BFLOAT16)
def test_bfloat16_has_no_arithmetic(call: str) -> None:
    """Why a bfloat16 export is checked on its float32 twin (`export/twin.py`), and `targets/cpu.toml` does not list the
    type."""
    made = model("bfloat16[8,8] x, bfloat16[8,8] w", f"y = {call}", "bfloat16[8,8] y")
    with pytest.raises(Exception, match="Could not find an implementation"):
        session(made)


@since(1, 32)
def test_bfloat16_has_no_qmoe() -> None:
    """ORT 1.32 has its kernel registered, but for weights in a layout of a GPU's."""
    with pytest.raises(Exception, match="bfloat16 QMoE requires a shared layout"):
        session(to_proto(contrib_model(Case(bits=4, block=16, dtype=ml_dtypes.bfloat16))))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("operator", ["ScatterND", "ScatterElements"])
def test_half_precision_is_not_reduced_by_scatters(operator: str, dtype: str) -> None:
    """Loaded, and refused while it runs: why `repair_scatter_add` sums these types in float32."""
    columns = 1 if operator == "ScatterND" else 4
    inputs = f"float[3,4] d, int64[2,{columns}] i, float[2,4] u"
    body = f"""
        data = Cast <to = {getattr(TensorProto, dtype.upper())}> (d)
        updates = CastLike (u, data)
        summed = {operator} <reduction = "REDUCTION"> (data, i, updates)
        y = Cast <to = 1> (summed)"""
    feeds = {
        "d": np.zeros((3, 4), np.float32),
        "i": np.zeros((2, columns), np.int64),
        "u": np.ones((2, 4), np.float32),
    }
    run(model(inputs, body.replace("REDUCTION", "none"), "float[3,4] y"), feeds)
    with pytest.raises(Exception, match=r"not supported with Scatter.* when reduction is 'add'"):
        run(model(inputs, body.replace("REDUCTION", "add"), "float[3,4] y"), feeds)


def test_a_dynamically_quantized_row_depends_on_the_others() -> None:
    """One scale for all rows of DynamicQuantizeMatMul: a large token spoils the others of its expert. Why its form is
    lossy, whatever the weights are; MatMulNBits that rounds rows to 8 bits (accuracy_level 4) scales each block."""
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((2, 64)).astype(np.float32)
    larger = rows * np.asarray([[1], [50]], np.float32)
    integers = rng.integers(-128, 128, (64, 32)).astype(np.int8)
    dynamic = model(
        "float[T,64] x",
        "y = com.microsoft.DynamicQuantizeMatMul (x, w, s)",
        "float[T,32] y",
        {"w": integers, "s": np.full(32, 0.01, np.float32)},
    )
    blocks = rng.integers(0, 256, (32, 2, 16)).astype(np.uint8)
    rounded = model(
        "float[T,64] x",
        "y = com.microsoft.MatMulNBits <K = 64, N = 32, bits = 4, block_size = 32, accuracy_level = 4> (x, w, s)",
        "float[T,32] y",
        {"w": blocks, "s": np.full((32, 2), 0.01, np.float32)},
    )

    def change(made: onnx.ModelProto) -> float:
        before, after = (run(made, {"x": x})[0][0] for x in (rows, larger))
        return float(np.abs(after - before).max() / np.abs(before).max())

    assert change(dynamic) > 1e-2, (
        "rows are scaled one by one: the int8 form does not depend on the batch any more"
    )
    assert change(rounded) < 1e-6
