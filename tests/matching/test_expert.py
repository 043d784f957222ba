"""Experts read backwards: activation, gating and matrices, and what is not one."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from test_linear import graph

from sparse_onnx.blocks import Activation, GateLayout
from sparse_onnx.matching.expert import Expert, read_expert
from sparse_onnx.matching.kinds import find_kind

RNG = np.random.default_rng(0)
UP, GATE = (RNG.standard_normal((4, 6)).astype(np.float32) for _ in "ab")
BOTH = np.concatenate([GATE, UP], 1)
DOWN = RNG.standard_normal((6, 4)).astype(np.float32)


def constant(name: str, value: float) -> str:
    return f"{name} = Constant <value = float {{{value}}}> ()"


def read(body: str, opset: int = 20, **weights: np.ndarray) -> Expert | str:
    return read_expert(graph(f"{body} y = MatMul (h, d)", opset, d=DOWN, **weights).outputs[0])


ACTIVATIONS = {
    "relu": ("h = Relu (p)", Activation.RELU, 1.0),
    "relu by max": (f"{constant('z', 0)} h = Max (z, p)", Activation.RELU, 1.0),
    "relu2": ("r = Relu (p) h = Mul (r, r)", Activation.RELU2, 1.0),
    "relu2 by pow": (f"{constant('e', 2)} r = Relu (p) h = Pow (r, e)", Activation.RELU2, 1.0),
    "silu": ("s = Sigmoid (p) h = Mul (s, p)", Activation.SILU, 1.0),
    "silu spelled out": (
        f"{constant('o', 1)} n = Neg (p) x1 = Exp (n) s = Add (o, x1) h = Div (p, s)",
        Activation.SILU,
        1.0,
    ),
    "quick gelu": (
        f"{constant('a', 1.702)} q = Mul (a, p) s = Sigmoid (q) h = Mul (p, s)",
        Activation.SILU,
        1.702,
    ),
    "fused silu": ("h = com.microsoft.QuickGelu <alpha = 1.0> (p)", Activation.SILU, 1.0),
    "gelu": ("h = Gelu (p)", Activation.GELU, 1.0),
    "gelu by erf": (
        f"{constant('r', 1.4142135)} {constant('o', 1)} {constant('f', 0.5)}"
        "q = Div (p, r) e = Erf (q) s = Add (e, o) m = Mul (p, s) h = Mul (m, f)",
        Activation.GELU,
        1.0,
    ),
    "gelu by tanh": ('h = Gelu <approximate = "tanh"> (p)', Activation.GELU_TANH, 1.0),
    "softcapped silu": (
        f"{constant('c', 4)} q = Div (p, c) t = Tanh (q) k = Mul (t, c) s = Sigmoid (p) h = Mul (k, s)",
        Activation.SILU_SOFTCAP,
        4.0,
    ),
    "fast gelu": ("h = com.microsoft.FastGelu (p)", Activation.GELU_TANH, 1.0),
}


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_are_known_by_what_they_compute(name: str) -> None:
    text, activation, alpha = ACTIVATIONS[name]
    found = read(f"p = MatMul (x, w) {text}", w=UP)
    assert isinstance(found, Expert)
    assert (found.kind.activation, found.kind.gate_layout) == (activation, GateLayout.NONE)
    assert found.kind.alpha == pytest.approx(alpha, rel=1e-6)
    assert found.entry.name == "x" and set(found.layers) == {"fc1", "fc2"}


def test_the_activation_of_a_fused_gemm() -> None:
    found = read('h = com.microsoft.FusedGemm <activation = "Relu"> (x, w, b)', w=UP, b=UP[0])
    assert isinstance(found, Expert) and found.kind.activation is Activation.RELU
    assert found.layers["fc1"].bias is not None


def test_a_bias_fused_into_gelu() -> None:
    found = read("p = MatMul (x, w) h = com.microsoft.BiasGelu (p, b)", w=UP, b=UP[0])
    assert isinstance(found, Expert) and found.kind.activation is Activation.GELU
    assert found.layers["fc1"].bias is not None


SILU = "s = Sigmoid (g) a = Mul (g, s) h = Mul (a, u)"
EVEN = """z = Constant <value_ints = [0]> () o = Constant <value_ints = [1]> () t = Constant <value_ints = [2]> ()
          end = Constant <value_ints = [9223372036854775807]> ()"""
HALF = "h1 = Constant <value_ints = [6]> () z = Constant <value_ints = [0]> () o = Constant <value_ints = [1]> ()"
GATED = {
    "split": ("p = MatMul (x, w) g, u = Split <axis = 1, num_outputs = 2> (p)", GateLayout.CONCATENATED),
    "slices": (
        f"{HALF} e = Constant <value_ints = [12]> () p = MatMul (x, w) u = Slice (p, h1, e, o) g = Slice (p, z, h1, o)",
        GateLayout.CONCATENATED,
    ),
    "every second": (
        f"{EVEN} p = MatMul (x, w) g = Slice (p, z, end, o, t) u = Slice (p, o, end, o, t)",
        GateLayout.INTERLEAVED,
    ),
    "pairs": (
        """s6 = Constant <value_ints = [-1, 6, 2]> ()
           i0 = Constant <value = int64 {0}> () i1 = Constant <value = int64 {1}> ()
           p = MatMul (x, w) r = Reshape (p, s6) u = Gather <axis = 2> (r, i1) g = Gather <axis = 2> (r, i0)""",
        GateLayout.INTERLEAVED,
    ),
}


@pytest.mark.parametrize("name", GATED)
def test_gates_in_halves_of_one_layer(name: str) -> None:
    text, layout = GATED[name]
    found = read(f"{text} {SILU}", w=BOTH)
    assert isinstance(found, Expert)
    assert (found.kind.activation, found.kind.gate_layout) == (Activation.SILU, layout)


def test_a_gate_that_comes_second_becomes_a_matrix_of_its_own() -> None:
    found = read(f"p = MatMul (x, w) u, g = Split <axis = 1, num_outputs = 2> (p) {SILU}", w=BOTH)
    assert isinstance(found, Expert) and found.kind.gate_layout is GateLayout.SEPARATE
    assert (found.layers["gate"].weight.half, found.layers["up"].weight.half) == (1, 0)


def test_gate_and_up_apart() -> None:
    for first, second in (("w1", "w2"), ("w2", "w1")):
        body = f"g = MatMul (x, {first}) u = MatMul (x, {second}) {SILU}"
        found = read(body, w1=GATE, w2=UP)
        assert isinstance(found, Expert) and found.kind.gate_layout is GateLayout.SEPARATE
        assert found.layers["gate"].weight.source.name == first


def test_the_clamped_gate_of_gpt_oss() -> None:
    clamp = f"{constant('l', 7)} {constant('m', -7)} {constant('al', 1.702)} {constant('one', 1)}"
    body = f"""{EVEN} {clamp} p = MatMul (x, w) g0 = Slice (p, z, end, o, t) u0 = Slice (p, o, end, o, t)
      g = Min (g0, l) u1 = Clip (u0, m, l) q = Mul (g, al)
      s = Sigmoid (q) a = Mul (g, s) u = Add (u1, one) h = Mul (u, a)"""
    found = read(body, w=BOTH)
    assert isinstance(found, Expert)
    kind = found.kind
    assert (kind.limit, kind.beta, kind.gate_layout) == (7.0, 1.0, GateLayout.INTERLEAVED)
    assert kind.alpha == pytest.approx(1.702)


def softcapped(up: str) -> Expert | str:
    body = f"""{constant("a", 4)} {constant("b", 25)} g = MatMul (x, w1) u0 = MatMul (x, w2)
      q = Div (g, a) t = Tanh (q) k = Mul (t, a) s = Sigmoid (g) m = Mul (k, s) {up} h = Mul (m, u)"""
    return read(body, w1=GATE, w2=UP)


def test_the_soft_caps_of_inkling_2() -> None:
    found = softcapped("u1 = Div (u0, b) u2 = Tanh (u1) u = Mul (u2, b)")
    assert isinstance(found, Expert)
    kind = found.kind
    assert kind.activation is Activation.SILU_SOFTCAP and kind.gate_layout is GateLayout.SEPARATE
    assert (kind.alpha, kind.limit, kind.beta) == (4.0, 25.0, 0.0)
    assert found.layers["gate"].weight.source.name == "w1"


def test_a_soft_cap_beside_a_clamp_is_unknown() -> None:
    found = softcapped(f"{constant('n', -25)} u = Clip (u0, n, b)")
    assert isinstance(found, str) and "no known activation" in found


NOT_EXPERTS = {
    "unknown activation": ("p = MatMul (x, w) h = Tanh (p)", "no known activation"),
    "nearly silu": (
        f"{constant('a', 1.001)} p = MatMul (x, w) s0 = Sigmoid (p) s = Mul (s0, a) h = Mul (p, s)",
        "no known activation",
    ),
    "a clamp far out": (
        f"{constant('c', 20000)} p = MatMul (x, w) r = Relu (p) h = Min (r, c)",
        "no known activation",
    ),
    "an attribute that is none": (
        "p = MatMul (x, w) h = com.microsoft.QuickGelu <alpha = 1.0, slope = 2.0> (p)",
        "no known activation",
    ),
    "softmax between": ("p = MatMul (x, w) h = Softmax (p)", "Softmax"),
    "other rows": (
        "e = Exp (x) g = MatMul (x, w) u = MatMul (e, w) s = Sigmoid (g) a = Mul (g, s) h = Mul (a, u)",
        "rows",
    ),
    "unequal pieces": (
        """k = Constant <value_ints = [4, 8]> () p = MatMul (x, w) g, u = Split <axis = 1> (p, k) h = Relu (g)""",
        "Split",
    ),
}


@pytest.mark.parametrize("name", NOT_EXPERTS)
def test_what_is_no_expert_says_why(name: str) -> None:
    text, reason = NOT_EXPERTS[name]
    weights = {"w": BOTH if name == "unequal pieces" else UP}
    found = read(text, **weights)
    assert isinstance(found, str) and reason in found


def test_half_precision_constants() -> None:
    steps = (
        ("", "Mul", (("leaf", 0), ("constant", float(np.float16(1.702)))), ()),
        ("", "Sigmoid", (("step", 0),), ()),
        ("", "Mul", (("leaf", 0), ("step", 1)), ()),
    )
    found = find_kind(steps, (0,), GateLayout.NONE, True)
    assert found is not None and found[0].activation is Activation.SILU
    assert found[0].alpha == pytest.approx(1.702, abs=1e-3)


def test_gelu_by_erf_and_by_tanh_stay_apart_in_half_precision() -> None:
    for approximate, activation in (("none", Activation.GELU), ("tanh", Activation.GELU_TANH)):
        steps = (("", "Gelu", (("leaf", 0),), (("approximate", approximate),)),)
        found = find_kind(steps, (0,), GateLayout.NONE, True)
        assert found is not None and found[0].activation is activation


def test_dtype_casts_are_looked_through() -> None:
    found = read("p = MatMul (x, w) c = Cast <to = 1> (p) h = Relu (c)", w=UP)
    assert isinstance(found, Expert) and found.layers["fc1"].x.dtype == ir.DataType.FLOAT
