"""Traps of functions and subgraphs: what ORT makes of a definition that it inlines, and of equal nodes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto
from ort.graphs import VERSION, model, operators, optimized, run, session

VECTOR = {"x": np.asarray([-1, 2], np.float32)}


def test_overloads_of_a_function() -> None:
    """ORT 1.24 runs the last body for both; 1.27 is mended. Once that is the oldest version that is supported, the
    neutral operators may be overloads instead of one name for each number of inputs."""
    made = model(
        "float[N] x",
        "a = t.F:one (x) b = t.F:two (x)",
        "float[N] a, float[N] b",
        functions="""
            <domain: "t", opset_import: ["" : 20], overload: "one"> F (x) => (y) { y = Neg (x) }
            <domain: "t", opset_import: ["" : 20], overload: "two"> F (x) => (y) { y = Abs (x) }""",
    )
    negated, absolute = run(made, VECTOR)
    np.testing.assert_array_equal(absolute, [1, 2])
    if VERSION >= (1, 27):
        np.testing.assert_array_equal(negated, [1, -2])
    project = Path(__file__).parents[2] / "pyproject.toml"
    [oldest] = [line for line in project.read_text().splitlines() if '"onnxruntime>=' in line]
    assert '"onnxruntime>=1.24"' in oldest, (
        "if the oldest ORT knows overloads now, the neutral operators may use them"
    )


def test_an_omitted_input_fails_in_a_branch_that_is_never_taken() -> None:
    """Why biases of the neutral operators are always present, zeros where there are none."""
    made = model(
        "float[N] x",
        "y = t.F <use = 0> (x)",
        "float[N] y",
        functions="""
            <domain: "t", opset_import: ["" : 20]> F <use> (x, bias) => (y) {
                used = Constant <value_int: int = @use> ()
                one = Constant <value_int = 1> ()
                has = Equal (used, one)
                y = If (has) <then_branch = with () => (p) { p = Add (x, bias) },
                              else_branch = without () => (q) { q = Identity (x) }>
            }""",
    )
    with pytest.raises(Exception, match="marked single but has an empty string"):
        run(made, VECTOR)


def test_more_inputs_than_a_function_names_are_refused() -> None:
    """No variadic inputs: why `Combine` takes its experts' results stacked."""
    made = model(
        "float[N] x",
        "y = t.F (x, x)",
        "float[N] y",
        functions='<domain: "t", opset_import: ["" : 20]> F (x) => (y) { y = Neg (x) }',
    )
    with pytest.raises(Exception, match="cannot exceed number of formal parameters"):
        run(made, VECTOR)


def test_a_branch_that_is_never_taken_must_fit() -> None:
    """Shape inference runs over both: why the neutral bodies keep every branch well-shaped, whatever the attributes."""
    made = model(
        "float[N,4] x, float[6,5] w",
        """never = Constant <value = bool {0}> ()
           y = If (never) <then_branch = product () => (p) { p = MatMul (x, w) },
                           else_branch = plain () => (q) { q = Identity (x) }>""",
        "y",
    )
    made.graph.output[0].type.tensor_type.elem_type = TensorProto.FLOAT
    with pytest.raises(Exception, match="Incompatible dimensions for matrix multiplication"):
        session(made)


OLD_BODIES = {
    "refused": ("ReduceSum <axes = [1], keepdims = 0> (x)", 11),
    "another meaning": ("Softmax <axis = 1> (x)", 11),
}


@pytest.mark.parametrize("name", OLD_BODIES)
def test_a_body_of_another_opset_is_not_converted(name: str) -> None:
    """Inlined as it stands, under the model's opset: refused where an attribute has gone, and silently another thing
    where only the meaning changed (Softmax flattened before 13). Why `attach_functions` writes bodies at the model's
    opset, and `convert_opset` runs before recognition."""
    call, opset = OLD_BODIES[name]
    made = model(
        "float[A,B,C] x",
        "y = t.F (x)",
        "y",
        functions=f'<domain: "t", opset_import: ["" : {opset}]> F (x) => (y) {{ y = {call} }}',
    )
    made.graph.output[0].type.tensor_type.elem_type = TensorProto.FLOAT
    feeds = {"x": np.ones((1, 2, 3), np.float32)}
    if name == "refused":
        with pytest.raises(Exception, match="Unrecognized attribute: axes"):
            run(made, feeds)
    else:
        [actual] = run(made, feeds)
        assert actual.sum() == pytest.approx(3), (
            "bodies keep the meaning of their own opset now: one text serves every model"
        )


@pytest.mark.parametrize("told", [True, False])
def test_a_loop_needs_the_shape_of_its_counter(told: bool) -> None:
    """Of rank 0, which is not assumed: `make_function` and every lowering with a Loop declare it."""
    made = model(
        "float[N] x",
        """n = Constant <value_int = 3> ()
           yes = Constant <value = bool {1}> ()
           y = Loop (n, yes, x) <body = again (int64 i, bool go, float[N] v) => (bool on, float[N] w) {
               on = Identity (go)
               w = Add (v, v)
           }>""",
        "float[N] y",
    )
    body = made.graph.node[2].attribute[0].g
    for value in body.input[:2]:
        value.type.tensor_type.ClearField("shape")
        if told:
            value.type.tensor_type.shape.SetInParent()
    if told:
        np.testing.assert_array_equal(run(made, VECTOR)[0], [-8, 16])
    else:
        with pytest.raises(Exception, match="has unknown shape: i"):
            run(made, VECTOR)


def test_equal_products_become_one_and_equal_weights_do_not(tmp_path: Path) -> None:
    """A benchmark whose experts share one initializer runs fewer of them than it says; with equal bytes under names of
    their own, it does not: `bench` and the suite give every expert its own weights."""
    w = np.random.default_rng(0).standard_normal((64, 64)).astype(np.float32)

    def products(second: str) -> int:
        made = model(
            "float[T,64] x",
            f"a = MatMul (x, w1) b = MatMul (x, {second}) y = Concat <axis = 0> (a, b)",
            "float[N,64] y",
            {"w1": w, second: w},
        )
        return operators(optimized(made, tmp_path)).count("MatMul")

    assert products("w1") == 1, "equal nodes stay two: benchmarks may share weights between experts"
    assert products("w2") == 2, "ORT now merges weights of equal bytes: benchmarks must not repeat any"


@pytest.mark.parametrize("inside", [False, True], ids=["graph", "branch"])
def test_silu_becomes_one_kernel(inside: bool, tmp_path: Path) -> None:
    """What `emit_activation` counts on when it writes x * sigmoid(x): one node a cold expert instead of two, also in a
    branch."""
    silu = "s = Sigmoid (x) a = Mul (x, s)"
    body = f"{silu} y = Identity (a)"
    if inside:
        body = f"""y = If (flag) <then_branch = hot () => (float[N,4] a) {{ {silu} }},
                                  else_branch = cold () => (float[M,4] b) {{ b = Identity (nothing) }}>"""
    made = model("float[N,4] x, bool flag", body, "float[K,4] y", {"nothing": np.zeros((0, 4), np.float32)})
    onnx.checker.check_model(made)
    kinds = operators(optimized(made, tmp_path))
    assert "QuickGelu" in kinds and "Sigmoid" not in kinds, (
        f"{kinds}: a silu costs two nodes, and a pass over the rows more"
    )
