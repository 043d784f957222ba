"""Traps of rows: none of them, pieces of no rows, ties, and order. What the grouped dispatch rests on."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from contrib_models import packed
from onnx import numpy_helper
from ort.graphs import model, optimized, run, session, since

RNG = np.random.default_rng(0)


def products() -> dict[str, onnx.ModelProto]:
    """x `[T, 64] -> [T, 32]` by every product that a lowering writes."""
    weight = RNG.standard_normal((64, 32)).astype(np.float32)
    plain = {"w": weight, "b": np.ones(32, np.float32)}
    made = {
        "MatMul": ("MatMul (x, w)", plain),
        "Gemm": ("Gemm (x, w)", plain),
        "Gemm bias": ("Gemm (x, w, b)", plain),
    }
    for bits in (2, 4, 8):
        integers = packed(RNG.integers(0, 1 << bits, (32, 2, 32)).astype(np.uint8), bits)
        for accuracy in (0, 1, 4):
            settings = f"K = 64, N = 32, bits = {bits}, block_size = 32, accuracy_level = {accuracy}"
            call = f"com.microsoft.MatMulNBits <{settings}> (x, w, s)"
            scales = RNG.uniform(0.5, 1, (32, 2)).astype(np.float32)
            made[f"MatMulNBits {bits} bits, level {accuracy}"] = (call, {"w": integers, "s": scales})
    rounded = {"w": RNG.integers(-128, 128, (64, 32)).astype(np.int8), "s": np.full(32, 0.01, np.float32)}
    made["DynamicQuantizeMatMul"] = ("com.microsoft.DynamicQuantizeMatMul (x, w, s)", rounded)
    return {
        name: model("float[T,64] x", f"y = {call}", "float[T,32] y", held)
        for name, (call, held) in made.items()
    }


PRODUCTS = products()


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("name", PRODUCTS)
def test_products_of_no_rows(name: str, threads: int) -> None:
    """A cold expert's: no rows out, nothing read (`test_memory.py`), and the next product is not harmed. Were it not
    so, every expert of `fuse_gating` would need an If around it."""
    made = session(PRODUCTS[name], threads=threads)
    rows = RNG.standard_normal((3, 64)).astype(np.float32)
    [before] = made.run(None, {"x": rows})
    [nothing] = made.run(None, {"x": rows[:0]})
    assert nothing.shape == (0, 32)
    np.testing.assert_array_equal(made.run(None, {"x": rows})[0], before)


def test_the_combine_of_no_rows() -> None:
    """Gathering, and the product of weights `[T, 1, K]` and rows `[T, K, D]`."""
    made = model(
        "float[S,8] rows, int64[S,1] order, float[T,1,2] weight",
        "slots = GatherND (rows, order) by_token = Reshape (slots, shape) y = MatMul (weight, by_token)",
        "float[T,1,8] y",
        {"shape": np.asarray([-1, 2, 8])},
    )
    feeds = {
        "rows": np.zeros((0, 8), np.float32),
        "order": np.zeros((0, 1), np.int64),
        "weight": np.zeros((0, 1, 2), np.float32),
    }
    assert run(made, feeds)[0].shape == (0, 1, 8)


@pytest.mark.parametrize("sizes", [(0, 3, 0), (2, 0, 1), (0, 0, 0)])
@pytest.mark.parametrize("level", [0, 99])
def test_split_takes_its_sizes_at_run_time_and_zeros_among_them(sizes: tuple[int, ...], level: int) -> None:
    """Tokens an expert, in `emit_pieces`. The values come from the run: sizes are an input here."""
    made = model("float[T,4] x, int64[3] sizes", "a, b, c = Split <axis = 0> (x, sizes)", "a, b, c")
    for value in made.graph.output:
        value.type.tensor_type.elem_type = onnx.TensorProto.FLOAT
    x = np.arange(4 * sum(sizes), dtype=np.float32).reshape(-1, 4)
    pieces = run(made, {"x": x, "sizes": np.asarray(sizes)}, level=level)
    assert [len(piece) for piece in pieces] == list(sizes)
    np.testing.assert_array_equal(np.concatenate(pieces), x)


def test_split_refuses_sizes_that_leave_rows_over() -> None:
    """Counts of tokens that do not add up end in an error of the grouped form, not in rows of other tokens."""
    made = model(
        "float[T,4] x, int64[2] sizes", "a, b = Split <axis = 0> (x, sizes)", "float[A,4] a, float[B,4] b"
    )
    for sizes in ((1, 1), (2, 2)):
        with pytest.raises(Exception, match=r"Cannot split|exceeds the remaining size"):
            run(made, {"x": np.zeros((3, 4), np.float32), "sizes": np.asarray(sizes)})


@pytest.mark.parametrize("dtype", ["int64", "float"])
@pytest.mark.parametrize("largest", [0, 1])
def test_topk_of_everything_is_a_stable_sort(largest: int, dtype: str) -> None:
    """`emit_dispatch`: slots of one expert in the order of their tokens, at every length and with two threads. ONNX
    says so (of equals the lower index first); a provider that does not breaks the order, not the answer."""
    made = session(
        model(
            f"{dtype}[N] x, int64[1] k",
            f"v, i = TopK <axis = 0, largest = {largest}> (x, k)",
            f"{dtype}[M] v, int64[M] i",
        ),
        threads=2,
    )
    for length in (0, 1, 2, 7, 64, 513, 8192, 65536):
        x = RNG.integers(0, 7, length).astype(np.int64 if dtype == "int64" else np.float32)
        order = made.run(["i"], {"x": x, "k": np.asarray([length])})[0]
        expected = np.argsort(-x if largest else x, kind="stable")
        np.testing.assert_array_equal(order, expected, err_msg=f"{length} values")


@pytest.mark.parametrize(
    ("experts", "top_k"), [(8, 2), (64, 8), (128, 8), (128, 100), (512, 3), (2048, 1000)]
)
def test_topk_takes_the_first_of_equals(experts: int, top_k: int) -> None:
    """Each of its ways (a heap, a selection, a sort) does, on several threads: a router's ties are the same before and
    after a rewrite, and those of `recognise_contrib` come out as it means them."""
    made = session(
        model("float[T,E] x, int64[1] k", "v, i = TopK <axis = -1> (x, k)", "float[T,K] v, int64[T,K] i"),
        threads=2,
    )
    scores = RNG.integers(0, 3, (333, experts)).astype(np.float32)
    index = made.run(["i"], {"x": scores, "k": np.asarray([top_k])})[0]
    np.testing.assert_array_equal(index, np.argsort(-scores, axis=-1, kind="stable")[:, :top_k])


@pytest.mark.parametrize("level", [0, 99])
@pytest.mark.parametrize("declared", [False, True], ids=["no rank", "rank"])
def test_branches_of_other_heights(declared: bool, level: int) -> None:
    """Rows in one branch of an If, a constant of no rows in the other, as conditional experts have it. ORT wants no
    rank declared; OpenVINO does, so the lowerings declare it (`body_rows.py`)."""
    made = model(
        "float[N,4] x, bool flag",
        """y = If (flag) <then_branch = hot () => (float[A,4] a) { a = Neg (x) },
                          else_branch = cold () => (float[B,4] b) { b = Identity (nothing) }>
            z = Concat <axis = 0> (y, x)""",
        "float[M,4] z",
        {"nothing": np.zeros((0, 4), np.float32)},
    )
    if not declared:
        for branch in made.graph.node[0].attribute:
            branch.g.output[0].type.tensor_type.ClearField("shape")
    for flag, height in ((True, 6), (False, 3)):
        feeds = {"x": np.ones((3, 4), np.float32), "flag": np.asarray(flag)}
        assert run(made, feeds, level=level)[0].shape == (height, 4)


def reshaped(shape: tuple[int, ...], target: list[int]) -> tuple[int, ...]:
    axes = ",".join(f"d{axis}" for axis in range(len(shape)))
    made = model(f"float[{axes}] x, int64[{len(target)}] to", "y = Reshape (x, to)", "y")
    made.graph.output[0].type.tensor_type.elem_type = onnx.TensorProto.FLOAT
    return run(made, {"x": np.zeros(shape, np.float32), "to": np.asarray(target)})[0].shape


def test_reshape_works_out_no_size_beside_a_copied_zero() -> None:
    """Why `body_rows.py` guards a Reshape of an expert's rows, and puts -1 where the rows are."""
    assert reshaped((0, 8), [-1, 2, 4]) == (0, 2, 4)
    for target in ([0, -1], [0, 2, -1]):
        with pytest.raises(Exception, match="cannot be reshaped"):
            reshaped((0, 8), target)


@since(1, 27)
def test_ort_writes_such_a_target_itself(tmp_path: Path) -> None:
    """ReshapeFusion: a target that is computed from sizes, and right for no rows, becomes [0, 2, -1]. So `body_rows.py`
    trusts no target that is a Concat."""
    body = """
        s = Shape (x)
        rows = Gather (s, i0)
        columns = Gather (s, i1)
        row = Unsqueeze (rows, first)
        column = Unsqueeze (columns, first)
        half = Div (column, two)
        to = Concat <axis = 0> (row, two, half)
        y = Reshape (x, to)"""
    constants = {
        "i0": np.asarray(0),
        "i1": np.asarray(1),
        "first": np.asarray([0]),
        "two": np.asarray([2]),
    }
    made = model("float[N,M] x", body, "float[A,B,C] y", constants)
    targets = [numpy_helper.to_array(each).tolist() for each in optimized(made, tmp_path).initializer]
    assert targets == [[0, 2, -1]], f"{targets}: body_rows.py may trust targets that are computed from sizes"
    nothing = {"x": np.zeros((0, 8), np.float32)}
    assert run(made, nothing, level=0)[0].shape == (0, 2, 4)
    with pytest.raises(Exception, match="cannot be reshaped"):
        run(made, nothing)


def test_einsum_of_no_images_ends_the_process(tmp_path: Path) -> None:
    """A batch of 0 in a product of two batched operands is divided by, in a process of its own here. Why `body_rows.py`
    puts such experts behind an If, and `verify` runs nothing without a token where there is an Einsum."""
    made = model("float[N,3,4] x", 'y = Einsum <equation = "nsd,ntd->nst"> (x, x)', "float[N,3,3] y")
    path = tmp_path / "einsum.onnx"
    onnx.save(made, path)
    code = """
import sys, numpy, onnxruntime
session = onnxruntime.InferenceSession(sys.argv[1], providers=["CPUExecutionProvider"])
print(session.run(None, {"x": numpy.zeros((int(sys.argv[2]), 3, 4), numpy.float32)})[0].shape)
"""

    def ended(images: int) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", code, str(path), str(images)]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    assert ended(2).stdout.strip() == "(2, 3, 3)"
    nothing = ended(0)
    assert nothing.returncode != 0 and not nothing.stdout, (
        f"{nothing.stdout}: Einsum runs on 0 rows: it may stand in RUNS_ON_NO_ROWS, and `verify` run without tokens"
    )


@pytest.mark.parametrize("shape", [(0, 3, 8), (1, 0, 8)], ids=["no batch", "no sequence"])
def test_attention_of_no_rows_fails(shape: tuple[int, ...]) -> None:
    """Why the operator is not among those of `body_rows.py` that run on 0 rows."""
    made = model(
        "float[B,S,8] x",
        "y = Attention <q_num_heads = 2, kv_num_heads = 2> (x, x, x)",
        "float[B,S,8] y",
        opset=23,
    )
    assert run(made, {"x": np.ones((1, 3, 8), np.float32)})[0].shape == (1, 3, 8)
    with pytest.raises(Exception, match="running Attention node"):
        run(made, {"x": np.ones(shape, np.float32)})
